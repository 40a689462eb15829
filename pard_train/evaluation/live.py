"""Live decoding of some prompts: speed and sampled acceptance of every method, and latencies for predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pard_train.acceptance.counting import Trace
from pard_train.device import device_name
from pard_train.errors import UserError
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.measurement import Draft, make_record, pooled_numbers
from pard_train.evaluation.speed import Latencies, measure_latencies, predict, time_proposers
from pard_train.generation.proposers import PromptLookup, Proposer, SequentialDrafter
from pard_train.generation.sampling import Sampling
from pard_train.reports.records import Record, grouped, pooled_by_label, pooled_tau
from pard_train.targets.cases import Case, Turn
from pard_train.targets.target import Target


def live_turns(case: Case, num_prompts: int) -> list[Turn]:
    """All turns of the first prompts of a case."""
    ids = list(dict.fromkeys(turn.prompt_id for turn in case.turns))
    return [turn for turn in case.turns if turn.prompt_id in ids[:num_prompts]]


def live_records(matrix: Matrix, drafts: Sequence[Draft], target: Target, case: Case) -> Iterator[Record]:
    """One record per method, draft, temperature and batch size; all take turns on the same prompts."""
    for temperature in matrix.settings.temperatures:
        for batch_size in matrix.settings.live_batch_sizes:
            with matrix.keep_going(target=case.target, benchmark=case.benchmark.name):
                yield from _time_methods(matrix, drafts, target, case, matrix.sampling(temperature), batch_size)


def _time_methods(
    matrix: Matrix, drafts: Sequence[Draft], target: Target, case: Case, sampling: Sampling, batch_size: int
) -> Iterator[Record]:
    settings = matrix.settings
    turns, k = live_turns(case, settings.live_prompts), settings.live_num_draft_tokens
    if batch_size > len(turns):
        raise UserError(f"batch size {batch_size}, but only {len(turns)} answers: raise evaluate.live_prompts")
    methods = [(name, draft) for name in settings.live_methods for draft in (drafts if name != "ngram" else [None])]
    identity = {
        **case.identity,
        "prompts": sorted({turn.prompt_id for turn in turns}),
        "sampling": asdict(sampling),
        "num_draft_tokens": k,
        "batch_size": batch_size,
        "num_rounds": settings.live_rounds,
        "is_compiled": settings.live_compiled,
        "device": device_name(),
    }

    def _compute() -> list[dict[str, Any]]:
        timings = time_proposers(
            target.runner(is_compiled=settings.live_compiled),
            {str(number): _proposer(*method) for number, method in enumerate(methods)},
            [turn.prompt_ids for turn in turns],
            case.limits,
            num_draft_tokens=k,
            batch_size=batch_size,
            num_rounds=settings.live_rounds,
            sampling=sampling,
        )
        return [{"traces": [asdict(trace) for trace in t.traces], "speed": t.record()} for t in timings.values()]

    if not matrix.has_result("live", identity | _fingerprints(methods)):
        methods = _loadable(matrix, methods, case)
    timings, provenance = matrix.result("live", identity | _fingerprints(methods), _compute) if methods else ([], {})
    for (name, draft), timing in zip(methods, timings, strict=True):
        numbers = pooled_numbers([Trace(**trace) for trace in timing["traces"]], turns, k)
        how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "batch_size": batch_size, "method": name}
        measured = {**how, **numbers, "speed": timing["speed"], "provenance": provenance}
        yield make_record(matrix, draft, case, mode="live", **measured)


Method = tuple[str, Draft | None]  # one of evaluate.live_methods, and the draft that it uses


def _fingerprints(methods: Sequence[Method]) -> dict[str, Any]:
    return {"ways": [[name, draft.fingerprint if draft else None] for name, draft in methods]}


def _loadable(matrix: Matrix, methods: Sequence[Method], case: Case) -> list[Method]:
    """The methods whose draft can be loaded; a draft that cannot is recorded as a failure."""
    loaded: list[Draft | None] = [None]
    for draft in dict.fromkeys(draft for _, draft in methods if draft):
        with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
            draft.drafter()
            loaded.append(draft)
    return [method for method in methods if method[1] in loaded]


def _proposer(method: str, draft: Draft | None) -> Proposer:
    if draft is None:
        return PromptLookup()
    return draft.drafter() if method == "pard" else SequentialDrafter(draft.drafter())


def measure_steps(
    matrix: Matrix, drafts: Sequence[Draft], target: Target, cases: Sequence[Case]
) -> Iterator[tuple[dict[str, str], Latencies]]:
    """Names of draft and target, and latencies of their forward passes in the middle of a typical answer."""
    settings = matrix.settings
    lengths = [len(turn.prompt_ids) + len(turn.answer.ids) // 2 for case in cases for turn in case.turns]
    if not lengths or 0.0 not in settings.temperatures:
        return
    context = int(np.median(lengths))
    for draft in drafts:
        for batch_size in settings.live_batch_sizes:
            with matrix.keep_going(draft=draft.name, target=target.label):
                identity = {
                    "models": [draft.fingerprint, target.fingerprint],
                    "settings": [matrix.dtype, sorted(settings.num_draft_tokens), batch_size, context],
                    "is_compiled": settings.live_compiled,
                    "device": device_name(),
                }

                def _compute(draft: Draft = draft, batch_size: int = batch_size) -> dict[str, Any]:
                    runner, ks = target.runner(is_compiled=settings.live_compiled), settings.num_draft_tokens
                    return asdict(measure_latencies(runner, draft.drafter(), ks, batch_size, context))

                stored, _ = matrix.result("latencies", identity, _compute)
                yield {"draft": draft.name, "target": target.label}, Latencies.from_json(stored)


def predict_speedup(records: Sequence[Record], names: dict[str, str], latencies: Latencies) -> dict[str, Any]:
    """One entry of predictions.json: speed-up of every K from tau over all benchmarks and measured latencies."""
    replayed = [r for r in records if r["mode"] == "replay" and r["target"] == names["target"]]
    by_k = grouped(pooled_by_label(replayed).get(names["draft"], []), lambda record: record["num_draft_tokens"])
    return names | predict({k: pooled_tau(group) for k, group in by_k.items()}, latencies)
