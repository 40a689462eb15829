"""Verification: does a serving engine do with an exported draft what replay says it will?

The engine writes its own greedy text twice, plainly and with the draft. The two texts must be equal, and what it
accepted while it drafted must be what replay finds in that text: the same steps, of which the same number of draft
tokens was accepted. Where they part, the first slot that differs is named: prompt, step, draft position.

Two engines count in two ways. vLLM takes the first token of an answer from the target's prefill, then drafts exactly K
tokens every step, and counts matches past the end of the answer; so it writes K tokens past the end when it is alone.
Transformers verifies the first draft in the pass that reads the prompt, and what a pass emits beyond its first token
counts as accepted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pard_train.acceptance.counting import accepted_by_step
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, VerifyConfig, decisive
from pard_train.data.benchmarks import load_benchmarks
from pard_train.data.chat import ChatEncoder
from pard_train.device import default_device
from pard_train.downloads import local_model
from pard_train.engines.transformers_engine import run_transformers
from pard_train.engines.vllm_engine import Counters, EngineAnswer, EngineRequest, EngineResult, run
from pard_train.errors import UserError
from pard_train.generation.decoding import Drafter, Limits, end_ids_of
from pard_train.model import DTYPES
from pard_train.runs import check_run, claim_run, provenance, write_json
from pard_train.targets.compatibility import OK, Finding, Model, check_pair, require
from pard_train.targets.target import first_target
from pard_train.training.checkpoints import resolve_draft

# Legend: N tokens of an answer, K draft tokens, V vocabulary.

VERIFICATION_FILE = "verification.json"
SCHEMA_VERSION = 1
PLAIN_FOLDER, SPECULATIVE_FOLDER = "plain", "speculative"  # requests, results and logs of vLLM
NEAR_TIE = 1e-3  # logits closer than this may fall either way between two float32 implementations

NOT_LOSSLESS = "the engine's text depends on the draft: a near tie (float32 has the fewest), or a fault of the engine"
NOT_K = "the engine did not draft K tokens at every step"
NOT_DRAFTED = "replay never drafts the mask token or a row that is no token, the engine may: train the draft further"
NOT_EXACT = "two implementations agree to the last counter in float32 only: set dtype=float32"
FIRST_POSITION = "no mask token has a part in the first draft token: the engine runs other weights or other positions"
LATER_POSITION = "the draft's first token is right and a later one is not: the engine uses another mask token or mask"


@dataclass(frozen=True)
class Expectation:
    """What the engine should do with one prompt.

    Attributes:
        prompt_id: benchmark and prompt.
        prompt_ids: as rendered.
        answer_ids: the target's own greedy answer, [N].
        extra_ids: what it would say after that.
        num_prefilled: leading tokens of the answer that no draft predicts: 1 in vLLM, else 0.
        accepted: draft tokens accepted at every step.
    """

    prompt_id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    extra_ids: list[int]
    num_prefilled: int
    accepted: list[int]


@dataclass(frozen=True)
class Difference:
    """The first place where engine and replay part.

    Attributes:
        prompt_id: benchmark and prompt.
        step: number of the draft, from 0; None if it is not about one.
        position: of the draft token within its draft, from 1; None if it is not about one.
        token: number of the answer's token that it is about, from 0; None if it is about all.
        expected: what replay, or plain decoding, says.
        observed: what the engine did.
        hint: where to look.
    """

    prompt_id: str
    step: int | None
    position: int | None
    token: int | None
    expected: str
    observed: str
    hint: str

    def __str__(self) -> str:
        places = {"step": self.step, "draft position": self.position, "token": self.token}
        where = [f"{name} {place}" for name, place in places.items() if place is not None]
        place = ", ".join([f"prompt {self.prompt_id}", *where])
        return f"{place}: expected {self.expected}; observed {self.observed}; {self.hint}"


# ---------------------------------------------------------------------------------------------------------------------
# The whole check
# ---------------------------------------------------------------------------------------------------------------------


def verify(config: Config) -> dict[str, Any]:
    """Run the engine, replay its text, compare, and write verification.json.

    Args:
        config: validated. The first target is used.

    Returns:
        Content of verification.json; `agrees` is the outcome, `difference` the first difference.

    Raises:
        UserError: if draft and target do not fit, two benchmarks have one name, or the engine fails.
    """
    settings, folder, k = config.verify, Path(config.output_dir), config.verify.num_draft_tokens
    benchmarks = load_benchmarks(settings.benchmarks, settings.max_prompts)
    names = {"draft": resolve_draft(config.draft.path or ""), "target": first_target(config)}
    decides = {**names, **decisive(settings), "template_kwargs": dict(config.data.template_kwargs)}
    check_run(folder, decides, resume=True)
    draft, target = (Model.load(name) for name in names.values())
    limits = Limits(settings.max_new_tokens, end_ids_of(target.name, target.tokenizer))
    encoder = ChatEncoder(target.tokenizer, config.data.template_kwargs)
    prompts = {
        f"{b.name} {prompt.id}": encoder.encode_prompt(prompt.turns[0]) for b in benchmarks for prompt in b.prompts
    }
    request = EngineRequest(
        target=local_model(target.name),
        draft=local_model(draft.name),
        num_draft_tokens=k,
        prompts=list(prompts.values()),
        max_new_tokens=settings.max_new_tokens,
        end_ids=sorted(limits.end_ids),
        dtype=settings.dtype,
    )
    _require_served(check_pair(draft, target, num_tokens=request.num_positions, dtype=settings.dtype))
    claim_run(folder, decides)
    (folder / VERIFICATION_FILE).unlink(missing_ok=True)  # of another engine, perhaps
    is_vllm = settings.engine == "vllm"
    texts, result = ask_vllm(request, settings, folder) if is_vllm else run_transformers(request)
    drafter = Drafter.load(draft.name, dtype=DTYPES[settings.dtype], device=default_device())
    expectations = expect(drafter, prompts, texts, limits, k, num_prefilled=int(is_vllm))
    report = {
        "schema_version": SCHEMA_VERSION,
        "engine_version": result.version,
        **{key: decides[key] for key in ("engine", "draft", "target", "dtype", "num_draft_tokens", "max_new_tokens")},
        **compare(drafter, expectations, result, k),
        "made_by": provenance(),
    }
    write_json(folder / VERIFICATION_FILE, report)
    return report


def _require_served(findings: Sequence[Finding]) -> None:
    """Stop at what cannot work, or at sizes that vLLM would refuse. Raises UserError."""
    require(findings)
    for finding in findings:
        if finding.subject == "vocabulary rows" and finding.level != OK:
            raise UserError(f"{finding.subject}: {finding.text}")


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------------


def ask_vllm(request: EngineRequest, settings: VerifyConfig, folder: Path) -> tuple[list[list[int]], EngineResult]:
    """vLLM's answers; the plain ones continue for K tokens past their end. Raises UserError if it fails."""
    start = time.monotonic()
    plain = replace(request, draft=None, max_new_tokens=request.max_new_tokens + request.num_draft_tokens, end_ids=[])
    results = []
    for what, name in ((plain, PLAIN_FOLDER), (request, SPECULATIVE_FOLDER)):
        left = max(1.0, settings.timeout - (time.monotonic() - start))
        results.append(run(what, python=settings.engine_python, folder=folder / name, timeout=left))
    return [answer.token_ids for answer in results[0].answers], results[1]


# ---------------------------------------------------------------------------------------------------------------------
# What is expected
# ---------------------------------------------------------------------------------------------------------------------


def expect(
    drafter: Drafter,
    prompts: dict[str, list[int]],
    texts: Sequence[list[int]],
    limits: Limits,
    num_draft_tokens: int,
    *,
    num_prefilled: int,
) -> list[Expectation]:
    """What an engine should do, by replay of the target's text.

    Args:
        drafter: draft model.
        prompts: ids by name.
        texts: the target's greedy text after each; for vLLM, K tokens past its end.
        limits: when an answer ends.
        num_draft_tokens: K.
        num_prefilled: 1 to count as vLLM does, 0 as Transformers does.
    """
    answers = [limits.cut(text, 0) for text in texts]
    extras = [text[len(answer) :] for text, answer in zip(texts, answers, strict=True)]
    pairs = list(zip(prompts.values(), answers, strict=True))
    matches = replay_all(drafter, pairs, num_draft_tokens, extra_ids=extras)
    steps = [accepted_by_step(m.tolist(), num_draft_tokens, num_prefilled=num_prefilled) for m in matches]
    return [
        Expectation(name, prompt, answer, extra, num_prefilled, accepted)
        for (name, prompt), answer, extra, accepted in zip(prompts.items(), answers, extras, steps, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def compare(
    drafter: Drafter, expectations: Sequence[Expectation], result: EngineResult, num_draft_tokens: int
) -> dict[str, Any]:
    """Texts and counters, prompt by prompt.

    Args:
        drafter: names what it would have drafted where they differ.
        expectations: of every prompt.
        result: what the engine did with them, in the same order.
        num_draft_tokens: K.

    Returns:
        The part of verification.json that this decides.
    """
    pairs = list(zip(expectations, result.answers, strict=True))
    expected = [Counters.of(e.accepted, num_draft_tokens) for e in expectations]
    differences = (find_difference(drafter, *pair, num_draft_tokens) for pair in pairs)
    first = next((difference for difference in differences if difference is not None), None)
    return {
        "agrees": first is None,
        "difference": asdict(first) if first else None,
        "num_prompts": len(pairs),
        "num_equal_texts": sum(e.answer_ids == answer.token_ids for e, answer in pairs),
        "expected": asdict(Counters.total(expected)),
        "observed": asdict(result.counters),
        "prompts": [
            {
                "id": e.prompt_id,
                "num_tokens": len(e.answer_ids),
                "is_text_equal": e.answer_ids == answer.token_ids,
                "expected": asdict(counters),
                "observed": asdict(answer.counters),
            }
            for (e, answer), counters in zip(pairs, expected, strict=True)
        ],
    }


def find_difference(
    drafter: Drafter, expectation: Expectation, answer: EngineAnswer, num_draft_tokens: int
) -> Difference | None:
    """Where the engine first does something else with one prompt than is expected; None if it never does."""
    place = first_difference(expectation.answer_ids, answer.token_ids)
    if place is not None:
        expected, observed = (_named(drafter, ids, place) for ids in (expectation.answer_ids, answer.token_ids))
        return Difference(expectation.prompt_id, None, None, place, expected, observed, NOT_LOSSLESS)
    step = first_difference(expectation.accepted, answer.accepted)
    if step is not None:
        return _slot_difference(drafter, expectation, answer, step, num_draft_tokens)
    counters = Counters.of(expectation.accepted, num_draft_tokens)
    if counters != answer.counters:
        expected, observed = (f"{c.num_draft_tokens} draft tokens" for c in (counters, answer.counters))
        return Difference(expectation.prompt_id, None, None, None, expected, observed, NOT_K)
    return None


def first_difference(expected: Sequence[int], observed: Sequence[int]) -> int | None:
    """Where two sequences first differ; the length of the shorter if it is the beginning of the other.

    >>> first_difference([1, 2, 3], [1, 2, 4])
    2
    """
    common = min(len(expected), len(observed))
    place = next((i for i in range(common) if expected[i] != observed[i]), common)
    return None if place == len(expected) == len(observed) else place


def _slot_difference(
    drafter: Drafter, expectation: Expectation, answer: EngineAnswer, step: int, num_draft_tokens: int
) -> Difference:
    """Name the slot: the draft token that only one of the two accepted."""
    first = expectation.num_prefilled + sum(a + 1 for a in expectation.accepted[:step])  # that this draft predicts
    ours, theirs = (steps[step] if step < len(steps) else 0 for steps in (expectation.accepted, answer.accepted))
    depth = min(ours, theirs)
    text = expectation.answer_ids + expectation.extra_ids
    draft, margins = propose(drafter, expectation.prompt_ids + text[:first], num_draft_tokens)
    seen = answer.drafts[step][depth] if step < len(answer.drafts) else None
    says = f"replay drafts {_named(drafter, draft, depth)} and the target says {_named(drafter, text, first + depth)}"
    drafted = "" if seen is None else f" (the engine drafts {_named(drafter, [seen], 0)})"
    return Difference(
        expectation.prompt_id,
        step,
        depth + 1,
        first + depth,
        f"{ours} accepted ({says})",
        f"{theirs} accepted{drafted}",
        _hint(drafter, depth, seen, margins[depth]),
    )


def _hint(drafter: Drafter, depth: int, seen: int | None, margin: float) -> str:
    if seen is not None and (seen == drafter.mask_token_id or seen >= len(drafter.tokenizer)):
        return NOT_DRAFTED
    if drafter.model.dtype != torch.float32:
        return f"{NOT_EXACT} (the draft's two best logits are {margin:.2g} apart)"
    if margin < NEAR_TIE:
        return f"a near tie: the draft's two best logits are {margin:.1e} apart"
    return LATER_POSITION if depth else FIRST_POSITION


def _named(drafter: Drafter, ids: Sequence[int], place: int) -> str:
    if place >= len(ids):
        return "the end"
    return f"{drafter.tokenizer.decode([ids[place]])!r} (id {ids[place]})"


@torch.inference_mode()
def propose(drafter: Drafter, text_ids: list[int], num_draft_tokens: int) -> tuple[list[int], list[float]]:
    """One draft from scratch, by the plain causal forward pass that engines run.

    Returns:
        K draft tokens, and how far apart the two best logits of each are.
    """
    masks = [drafter.mask_token_id] * (num_draft_tokens - 1)
    ids = torch.tensor([text_ids + masks], device=drafter.model.device)
    logits = drafter.model(ids, logits_to_keep=num_draft_tokens).logits[0]  # [K, V]
    best = logits.float().topk(2, dim=-1).values
    return drafter.choose(logits).tolist(), (best[:, 0] - best[:, 1]).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# For people
# ---------------------------------------------------------------------------------------------------------------------


def render_verification(report: dict[str, Any]) -> str:
    """A table of counters, and the outcome in a sentence."""
    draft, target = (Path(report[name]).name for name in ("draft", "target"))
    lines = [
        f"{report['engine']} {report['engine_version']}: {draft} drafts K = {report['num_draft_tokens']} for {target} "
        f"in {report['dtype']}, {report['num_prompts']} prompts",
        f"{report['num_equal_texts']} of {report['num_prompts']} texts are those of plain decoding",
        f"{'':13}{'drafts':>8}{'drafted':>9}{'accepted':>9}  by position",
    ]
    for name, counters in (("replay", report["expected"]), (report["engine"], report["observed"])):
        numbers = (counters["num_drafts"], counters["num_draft_tokens"], counters["num_accepted_tokens"])
        by_position = "".join(f"{number:>6}" for number in counters["accepted_per_position"])
        lines.append("{:13}{:>8}{:>9}{:>9}".format(name, *numbers) + by_position)
    if report["agrees"]:
        lines.append("agrees: text and counters are equal, prompt by prompt and position by position")
    else:
        lines.append(f"differs: {Difference(**report['difference'])}")
    return "\n".join(lines)
