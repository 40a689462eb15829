"""vLLM with a draft model: its own counters on a case, and its text compared with its plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from pard_train.acceptance.counting import Trace
from pard_train.device import device_name
from pard_train.downloads import local_model
from pard_train.engines.process import run
from pard_train.engines.worker import EngineRequest
from pard_train.evaluation.live import live_turns
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.measurement import Draft, make_record, pooled_numbers, vllm_numbers
from pard_train.evaluation.speed import Timing
from pard_train.reports.records import Record
from pard_train.targets.cases import Case
from pard_train.targets.target import Target

TIMEOUT = 7200.0  # seconds that one engine may take for its prompts


def engine_records(matrix: Matrix, draft: Draft, target: Target, case: Case) -> Iterator[Record]:
    """One record of mode `engine`: the first `live_prompts` prompts, decoded plainly and with the draft, one by one.

    The prefill is a step that accepts nothing. Speeds are those of the most exact mode (eager, one prompt at a time),
    not of a server under load.

    Raises:
        UserError: if the engine fails; the message names its log.
    """
    settings = matrix.settings
    turns, k = live_turns(case, settings.live_prompts), settings.live_num_draft_tokens
    request = EngineRequest(
        target=local_model(target.name),
        draft=local_model(draft.path),
        num_draft_tokens=k,
        prompts=[turn.prompt_ids for turn in turns],
        max_new_tokens=settings.max_new_tokens,
        end_ids=sorted(case.limits.end_ids),
        dtype=matrix.dtype,
        trust_remote_code=matrix.trust_remote_code,
        engine_arguments=dict(settings.engine_arguments),
    )
    identity = {
        **case.identity,
        "engine_arguments": request.engine_arguments,
        "draft_fingerprint": draft.fingerprint,
        "num_draft_tokens": k,
        "device": device_name(),
    }

    def _compute() -> dict[str, Any]:
        folder = matrix.folder / "engine" / f"{draft.name}-{case.target.replace('/', '--')}-{case.benchmark.name}"
        plain, speculative = (
            run(each, python=settings.engine_python, folder=folder / name, timeout=TIMEOUT)
            for name, each in (("plain", replace(request, draft=None)), ("speculative", request))
        )
        return {"version": plain.version, "plain": asdict(plain)["answers"], "own": asdict(speculative)["answers"]}

    stored, made_by = matrix.result("engine", identity | {"prompts": request.prompts}, _compute)
    plain, own = stored["plain"], stored["own"]
    traces = [engine_trace(answer) for answer in own]
    num_identical = sum(a["token_ids"] == b["token_ids"] for a, b in zip(own, plain, strict=True))
    timing = Timing(traces, [_tokens_per_second(own)], [_tokens_per_second(plain)], num_identical)
    counts = (sum(answer["counters"][name] for answer in own) for name in ("num_drafts", "num_accepted_tokens"))
    numbers = pooled_numbers(traces, turns, k) | vllm_numbers(*counts)
    provenance = {**made_by, "versions": {**made_by["versions"], "vllm": stored["version"]}}
    measured = {**numbers, "batch_size": 1, "speed": timing.record(), "provenance": provenance}
    yield make_record(matrix, draft, case, mode="engine", **measured)


def _tokens_per_second(answers: list[dict[str, Any]]) -> float:
    return sum(len(answer["token_ids"]) for answer in answers) / sum(answer["seconds"] for answer in answers)


def engine_trace(answer: dict[str, Any]) -> Trace:
    """An engine's steps: the prefill, then its drafts, of which matches past the end of the answer do not count."""
    num_tokens, accepted, start = len(answer["token_ids"]), [0], 1
    for count in answer["accepted"]:
        accepted.append(min(count, num_tokens - start))
        start += accepted[-1] + 1
    return Trace(accepted, num_tokens)
