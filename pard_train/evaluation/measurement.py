"""What one draft does on one case, as records of acceptance.json: by replay, and live.

Each measurement is a cell of the matrix: finished once, it is never computed again for the same models and settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pard_train.acceptance.counting import Trace, count_as_vllm, group_traces, length_bucket, pool, walk
from pard_train.acceptance.estimate import estimate_acceptance
from pard_train.acceptance.replay import replay_all
from pard_train.device import default_device, device_name
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.speed import Latencies, measure_latencies, prediction, time_proposers
from pard_train.fingerprints import model_fingerprint
from pard_train.generation.proposers import Drafter, PromptLookup, Proposer, SequentialDrafter
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import Sampling
from pard_train.model import DTYPES
from pard_train.reports.records import Record, renamed
from pard_train.targets.cases import Case, ScoredCase, Turn
from pard_train.targets.compatibility import Model
from pard_train.targets.target import Target

NO_DRAFT = "-"  # stands for a draft model where prompt look-up drafts

Matches = list[list[int]]


class Draft:
    """A draft model whose weights are loaded when something needs them, and only then."""

    def __init__(self, name: str, model: Model, matrix: Matrix):
        self.name, self.model = name, model
        self.fingerprint = model_fingerprint(model.name)
        self._matrix = matrix
        self._drafter: Drafter | None = None

    def drafter(self) -> Drafter:
        """The draft model on the device."""
        if self._drafter is None:
            trust, dtype = self._matrix.trust_remote_code, DTYPES[self._matrix.dtype]
            self._drafter = Drafter.load(self.model.name, dtype=dtype, device=default_device(), trust_remote_code=trust)
            if self._matrix.settings.live_compiled:
                self._drafter.runner = Runner(self._drafter.model, is_compiled=True)
        return self._drafter

    def unload(self) -> None:
        """Free its memory."""
        self._drafter = None


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------


def replay_case(matrix: Matrix, draft: Draft, case: Case) -> tuple[list[list[int]], dict[str, Any]]:
    """For every turn, the leading matches of the drafts at each place of the answer; and the provenance."""
    max_k = max(matrix.settings.num_draft_tokens)
    identity = {**case.identity, "draft_fingerprint": draft.fingerprint, "max_draft_tokens": max_k}

    def compute() -> list[list[int]]:
        pairs = [(turn.prompt_ids, turn.answer.ids) for turn in case.turns]
        description = f"replay {draft.name} on {case.benchmark.name}"
        return [matches.tolist() for matches in replay_all(draft.drafter(), pairs, max_k, description=description)]

    return matrix.cell("replay", identity | {"dtype": matrix.dtype}, compute)


def replay_records(
    matrix: Matrix, draft: Draft, case: Case, matches: list[list[int]], made_by: dict[str, Any]
) -> Iterator[Record]:
    """One record per K, all from one replay."""
    for k in sorted(set(matrix.settings.num_draft_tokens)):
        drafts, accepted = np.sum([count_as_vllm(m, k) for m in matches], axis=0).tolist()
        yield {
            **head(matrix, draft.name, draft.fingerprint, case),
            "mode": "replay",
            "method": "pard",
            "temperature": 0.0,
            "top_p": 1.0,
            "batch_size": None,
            **measured([walk(m, k) for m in matches], case.turns, k),
            "vllm_drafts": drafts,
            "vllm_accepted": accepted,
            "vllm_tau": 1 + accepted / drafts if drafts else None,
            "speed": None,
            "provenance": made_by,
        }


def head(matrix: Matrix, draft: str, draft_fingerprint: str, case: Case) -> Record:
    """What a record is about."""
    return {
        "draft": draft,
        "target": case.target,
        "benchmark": case.benchmark.name,
        "max_new_tokens": matrix.settings.max_new_tokens,
        "dtype": matrix.dtype,
        "system_prompt": matrix.settings.system_prompt,
        "template_kwargs": matrix.template_kwargs,
        "prompt_template": case.benchmark.instruction,
        "draft_fingerprint": draft_fingerprint,
        "target_fingerprint": case.identity["target_fingerprint"],
        "benchmark_fingerprint": case.benchmark.fingerprint,
    }


def measured(traces: Sequence[Trace], turns: Sequence[Turn], num_draft_tokens: int) -> Record:
    """Numbers of one record: pooled, and by category, turn, length and position."""
    prompts = [turn.prompt_id for turn in turns]
    names = {
        "category": [turn.category for turn in turns],
        "turn": [str(turn.number + 1) for turn in turns],
        "prompt_length": [length_bucket(len(turn.prompt_ids)) for turn in turns],
    }
    return {
        **pool(traces, num_draft_tokens, prompts=prompts).record(),
        "groups": group_traces(traces, prompts=prompts, names=names),
    }


def estimate_records(matrix: Matrix, draft: Draft, scored: ScoredCase) -> Iterator[Record]:
    """One record per K: expected acceptance on texts that the target drew at a temperature."""
    sampling, case = scored.sampling, scored.case
    for k in sorted(set(matrix.settings.num_draft_tokens)):
        identity = {**case.identity, "draft_fingerprint": draft.fingerprint, "num_draft_tokens": k}

        def compute(k: int = k) -> Record:
            drafter = draft.drafter()
            return estimate_acceptance(drafter, scored.texts, k, sampling).record()

        estimated, made_by = matrix.cell("estimate", identity, compute)
        yield {
            **head(matrix, draft.name, draft.fingerprint, case),
            "method": "pard",
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "batch_size": None,
            **renamed(estimated),
            "mean_prompt_tau": None,
            "groups": [],
            "speed": None,
            "provenance": made_by,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Live
# ---------------------------------------------------------------------------------------------------------------------


def live_turns(case: Case, num_prompts: int) -> list[Turn]:
    """All turns of the first prompts of a case."""
    ids = list(dict.fromkeys(turn.prompt_id for turn in case.turns))
    return [turn for turn in case.turns if turn.prompt_id in ids[:num_prompts]]


def live_records(matrix: Matrix, drafts: Sequence[Draft], target: Target, case: Case) -> Iterator[Record]:
    """One record per way to draft, temperature and batch size; all ways take turns on the same prompts."""
    for temperature in matrix.settings.temperatures:
        for batch_size in matrix.settings.live_batch_sizes:
            with matrix.keep_going(target=case.target, benchmark=case.benchmark.name):
                yield from _timed_records(matrix, drafts, target, case, matrix.sampling(temperature), batch_size)


def _timed_records(
    matrix: Matrix,
    drafts: Sequence[Draft],
    target: Target,
    case: Case,
    sampling: Sampling,
    batch_size: int,
) -> Iterator[Record]:
    config = matrix.settings
    turns, k = live_turns(case, config.live_prompts), config.live_num_draft_tokens
    ways = [(method, draft) for method in config.live_methods for draft in (drafts if method != "ngram" else [None])]
    identity = {
        **case.identity,
        "prompts": sorted({turn.prompt_id for turn in turns}),
        "sampling": asdict(sampling),
        "num_draft_tokens": k,
        "batch_size": batch_size,
        "num_rounds": config.live_rounds,
        "is_compiled": config.live_compiled,
        "device": device_name(),
    }

    def compute() -> list[dict[str, Any]]:
        timings = time_proposers(
            target.runner(is_compiled=config.live_compiled),
            {str(number): _proposer(method, draft) for number, (method, draft) in enumerate(ways)},
            [turn.prompt_ids for turn in turns],
            case.limits,
            num_draft_tokens=k,
            batch_size=batch_size,
            num_rounds=config.live_rounds,
            sampling=sampling,
        )
        return [{"traces": [asdict(trace) for trace in t.traces], "speed": t.record()} for t in timings]

    if not matrix.is_finished("live", identity | _named(ways)):
        loaded = _loaded(matrix, [draft for _, draft in ways if draft], case)
        ways = [(method, draft) for method, draft in ways if draft is None or draft in loaded]
    timings, made_by = matrix.cell("live", identity | _named(ways), compute) if ways else ([], {})
    for (method, draft), timing in zip(ways, timings, strict=True):
        yield {
            **head(matrix, draft.name if draft else NO_DRAFT, draft.fingerprint if draft else NO_DRAFT, case),
            "mode": "live",
            "method": method,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "batch_size": batch_size,
            **measured([Trace(**trace) for trace in timing["traces"]], turns, k),
            "speed": renamed(timing["speed"]),
            "provenance": made_by,
        }


def _named(ways: Sequence[tuple[str, Draft | None]]) -> dict[str, Any]:
    return {"ways": [[method, draft.fingerprint if draft else None] for method, draft in ways]}


def _loaded(matrix: Matrix, drafts: Sequence[Draft], case: Case) -> list[Draft]:
    """Those that can be loaded. What keeps another from it is noted, and the rest can be timed."""
    loaded = []
    for draft in dict.fromkeys(drafts):
        with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
            draft.drafter()
            loaded.append(draft)
    return loaded


def _proposer(method: str, draft: Draft | None) -> Proposer:
    if draft is None:
        return PromptLookup()
    return draft.drafter() if method == "pard" else SequentialDrafter(draft.drafter())


def measure_steps(
    matrix: Matrix, drafts: Sequence[Draft], target: Target, cases: Sequence[Case]
) -> Iterator[tuple[Draft, Target, Latencies]]:
    """Single forward passes of every draft and the target, in the middle of a typical answer."""
    config = matrix.settings
    lengths = [len(turn.prompt_ids) + len(turn.answer.ids) // 2 for case in cases for turn in case.turns]
    if not lengths or 0.0 not in config.temperatures:
        return
    context = int(np.median(lengths))
    for draft in drafts:
        for batch_size in config.live_batch_sizes:
            with matrix.keep_going(draft=draft.name, target=target.label):
                identity = {
                    "models": [draft.fingerprint, target.fingerprint],
                    "settings": [matrix.dtype, sorted(config.num_draft_tokens), batch_size, context],
                    "is_compiled": config.live_compiled,
                    "device": device_name(),
                }

                def compute(draft: Draft = draft, batch_size: int = batch_size) -> dict[str, Any]:
                    ks = config.num_draft_tokens
                    runner = target.runner(is_compiled=config.live_compiled)
                    return asdict(measure_latencies(runner, draft.drafter(), ks, batch_size, context))

                kept, _ = matrix.cell("latencies", identity, compute)
                by_k = {
                    name: {int(k): s for k, s in kept[name].items()} for name in ("draft_seconds", "verify_seconds")
                }
                yield draft, target, Latencies(**{**kept, **by_k})


def predict_speedup(records: Sequence[Record], draft: Draft, target: Target, latencies: Latencies) -> dict[str, Any]:
    """Speed-up of every K from tau over all benchmarks and measured latencies."""
    names = {"draft": draft.name, "target": target.label}
    mine = [r for r in records if r["mode"] == "replay" and {"draft": r["draft"], "target": r["target"]} == names]
    tau_by_k = {
        k: sum(r["num_tokens"] for r in mine if r["num_draft_tokens"] == k)
        / sum(r["num_steps"] for r in mine if r["num_draft_tokens"] == k)
        for k in {r["num_draft_tokens"] for r in mine}
    }
    return names | prediction(tau_by_k, latencies)
