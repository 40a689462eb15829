"""Verification: a serving engine must accept the draft tokens that replay predicts.

The engine writes its greedy text twice, plainly and with the draft. The two texts must be equal, and at every step the
engine must accept as many draft tokens as replay finds in that text. The first difference is reported with its prompt,
step and draft position.

Engines count in three ways. vLLM takes the first token of an answer from the prefill, then drafts exactly K tokens at
every step, and counts matches past the end of the answer; so its plain text continues for K tokens past the end.
PACE and Transformers verify the first draft in the pass that reads the prompt, and count all but one token of each pass
as accepted; PACE counts past the end of the answer, Transformers does not.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pard_train.acceptance.counting import accepted_by_step
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, VerifyConfig, decisive
from pard_train.data.benchmarks import load_benchmarks
from pard_train.data.chat import ChatEncoder
from pard_train.device import default_device
from pard_train.downloads import local_model
from pard_train.engines.process import run
from pard_train.engines.transformers_engine import run_transformers
from pard_train.engines.worker import Counters, EngineRequest, EngineResult
from pard_train.generation.decoding import Limits, end_ids_of
from pard_train.generation.proposers import Drafter
from pard_train.model import DTYPES
from pard_train.publishing.differences import Difference, Expectation, find_difference
from pard_train.runs import check_run, claim_run, locked, provenance, write_json
from pard_train.targets.compatibility import OK, Finding, Model, check_pair, require
from pard_train.targets.serving import check_served, check_serving
from pard_train.targets.target import first_target
from pard_train.training.checkpoints import find_checkpoint, resolve_draft
from pard_train.training.trackers import Outcome, check_trackers, log_outcome

VERIFICATION_FILE = "verification.json"
SCHEMA_VERSION = 1
PLAIN_FOLDER, SPECULATIVE_FOLDER = "plain", "speculative"  # requests, results and logs of the engine
COUNTED = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
# By engine: tokens of an answer that no draft predicts, and whether matches past its end count.
CONVENTIONS = {"vllm": (1, True), "pace": (0, True), "transformers": (0, False)}


def verify(config: Config) -> dict[str, Any]:
    """Run the engine, replay its text, compare, and write verification.json.

    Args:
        config: validated. The first target is used.

    Returns:
        Content of verification.json; `agrees` is the outcome, `difference` the first difference.

    Raises:
        UserError: if draft and target do not fit, two benchmarks have one name, or the engine fails.
    """
    with locked(Path(config.output_dir)):
        return _verify(config)


def _verify(config: Config) -> dict[str, Any]:
    settings, folder, trust = config.verify, Path(config.output_dir), config.model.trust_remote_code
    check_trackers(config.logger)
    names = {"draft": resolve_draft(config.draft.path or ""), "target": first_target(config)}
    decides = {**names, **decisive(settings), "template_kwargs": dict(config.data.template_kwargs)}
    check_run(folder, decides, resume=True)
    draft, target, prompts, request = _prepare(config, names)
    needs: dict[str, Any] = {"num_tokens": _context(request), "dtype": request.dtype}
    is_vllm = settings.engine == "vllm"  # the others take vocabularies of two sizes
    findings = (
        check_served(draft, target, **needs, num_gpus=_num_gpus(request))
        if is_vllm
        else check_pair(draft, target, **needs)
    )
    require(findings)
    for finding in findings:
        if finding.subject == "trained length" and finding.level != OK:
            print(finding)
    claim_run(folder, decides)
    (folder / VERIFICATION_FILE).unlink(missing_ok=True)  # of an earlier run
    is_ours = settings.engine == "transformers"
    texts, result = run_transformers(request) if is_ours else _run_engine(request, settings, folder)
    dtype = DTYPES[settings.dtype]
    drafter = Drafter.load(draft.name, dtype=dtype, device=default_device(), trust_remote_code=trust)
    limits, k = Limits(request.max_new_tokens, frozenset(request.end_ids)), request.num_draft_tokens
    expectations = expect(drafter, prompts, texts, limits, num_draft_tokens=k, engine=settings.engine)
    report = {
        "schema_version": SCHEMA_VERSION,
        "engine_version": result.version,
        **{key: decides[key] for key in ("engine", "draft", "target", "dtype", "num_draft_tokens", "max_new_tokens")},
        **compare_prompts(drafter, expectations, result, k),
        "made_by": provenance(),
    }
    write_json(folder / VERIFICATION_FILE, report)
    counts = {f"{who}/{name}": report[who][name] for who in ("expected", "observed") for name in COUNTED}
    values = {f"verify/{name}": number for name, number in {"agrees": int(report["agrees"]), **counts}.items()}
    training, facts = find_checkpoint(draft.name).run, {"difference": report["difference"], **names}
    log_outcome(config, Outcome("verify", folder, values, rows=report["prompts"], training=training, facts=facts))
    return report


def preflight(config: Config) -> list[Finding]:
    """Everything that can be known about serving this draft before the engine starts.

    Args:
        config: as for `verify`; nothing is written.

    Raises:
        UserError: if draft, target or prompts cannot be read.
    """
    names = {"draft": resolve_draft(config.draft.path or ""), "target": first_target(config)}
    draft, target, _, request = _prepare(config, names)
    needs: dict[str, Any] = {"num_tokens": _context(request), "dtype": request.dtype}
    if request.engine != "vllm":
        return check_pair(draft, target, **needs)
    k, python = request.num_draft_tokens, config.verify.engine_python
    return check_serving(draft, target, num_draft_tokens=k, python=python, num_gpus=_num_gpus(request), **needs)


def _num_gpus(request: EngineRequest) -> int:
    """GPUs that share every layer in vLLM."""
    return int(request.engine_arguments.get("tensor_parallel_size", 1))


def _prepare(config: Config, names: Mapping[str, str]) -> tuple[Model, Model, dict[str, list[int]], EngineRequest]:
    """Draft, target, prompts by name, and the request to the engine."""
    settings, trust = config.verify, config.model.trust_remote_code
    benchmarks = load_benchmarks(settings.benchmarks, settings.max_prompts)
    draft, target = (Model.load(names[kind], trust_remote_code=trust) for kind in ("draft", "target"))
    encoder = ChatEncoder(target.tokenizer, config.data.template_kwargs)
    prompts = {f"{b.name} {p.id}": encoder.encode_prompt(p.turns[0]) for b in benchmarks for p in b.prompts}
    request = EngineRequest(
        target=local_model(target.name),
        draft=local_model(draft.name),
        num_draft_tokens=settings.num_draft_tokens,
        prompts=list(prompts.values()),
        max_new_tokens=settings.max_new_tokens,
        end_ids=sorted(end_ids_of(target.name, target.tokenizer)),
        dtype=settings.dtype,
        trust_remote_code=trust,
        engine=settings.engine,
        engine_arguments=dict(settings.engine_arguments),
    )
    return draft, target, prompts, request


def _context(request: EngineRequest) -> int:
    """Positions of the longest request: plain texts continue for K tokens past their end."""
    return request.num_positions + request.num_draft_tokens


def _run_engine(request: EngineRequest, settings: VerifyConfig, folder: Path) -> tuple[list[list[int]], EngineResult]:
    """Plain texts, which continue for K tokens past their end, and speculative answers. Raises UserError."""
    start = time.monotonic()
    plain = replace(request, draft=None, max_new_tokens=request.max_new_tokens + request.num_draft_tokens, end_ids=[])
    results = []
    for each, name in ((plain, PLAIN_FOLDER), (request, SPECULATIVE_FOLDER)):
        left = max(1.0, settings.timeout - (time.monotonic() - start))
        results.append(run(each, python=settings.engine_python, folder=folder / name, timeout=left))
    return [answer.token_ids for answer in results[0].answers], results[1]


def expect(
    drafter: Drafter,
    prompts: Mapping[str, list[int]],
    texts: Sequence[list[int]],
    limits: Limits,
    *,
    num_draft_tokens: int,
    engine: str,
) -> list[Expectation]:
    """What an engine should do, by replay of the target's text.

    Args:
        drafter: draft model.
        prompts: ids by name.
        texts: the target's greedy text after each prompt; for vLLM and PACE, K tokens longer than the answer.
        limits: when an answer ends.
        num_draft_tokens: K.
        engine: whose convention counts, see CONVENTIONS.
    """
    num_prefilled, past_end = CONVENTIONS[engine]
    answers = [limits.cut(text, 0) for text in texts]
    extras = [text[len(answer) :] for text, answer in zip(texts, answers, strict=True)]
    pairs = list(zip(prompts.values(), answers, strict=True))
    matches = replay_all(drafter, pairs, num_draft_tokens, extra_ids=extras)
    count = partial(accepted_by_step, num_prefilled=num_prefilled, counts_past_end=past_end)
    steps = [count(found.tolist(), num_draft_tokens) for found in matches]
    return [
        Expectation(name, prompt, answer, extra, num_prefilled, accepted)
        for (name, prompt), answer, extra, accepted in zip(prompts.items(), answers, extras, steps, strict=True)
    ]


def compare_prompts(
    drafter: Drafter, expectations: Sequence[Expectation], result: EngineResult, num_draft_tokens: int
) -> dict[str, Any]:
    """Compare texts and counters prompt by prompt: the part of verification.json that follows from them."""
    pairs = list(zip(expectations, result.answers, strict=True))
    differences = (find_difference(drafter, *pair, num_draft_tokens) for pair in pairs)
    first = next((difference for difference in differences if difference is not None), None)
    expected = [Counters.of(e.accepted, num_draft_tokens) for e in expectations]
    prompts = [
        {
            "id": e.prompt_id,
            "num_tokens": len(e.answer_ids),
            "is_text_equal": e.answer_ids == answer.token_ids,
            "expected": asdict(counters),
            "observed": asdict(answer.counters),
        }
        for (e, answer), counters in zip(pairs, expected, strict=True)
    ]
    return {
        "agrees": first is None,
        "difference": asdict(first) if first else None,
        "num_prompts": len(pairs),
        "num_equal_texts": sum(prompt["is_text_equal"] for prompt in prompts),
        "expected": asdict(Counters.total(expected)),
        "observed": asdict(Counters.total([answer.counters for answer in result.answers])),
        "prompts": prompts,
    }


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
