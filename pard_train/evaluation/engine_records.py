"""vLLM with a draft model: its own counters on a case, and its text compared with its plain text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from pard_train.acceptance.counting import Trace
from pard_train.device import device_name
from pard_train.downloads import local_model
from pard_train.engines.vllm_engine import EngineRequest, run
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.measurement import Draft, head, live_turns, measured
from pard_train.reports.records import Record
from pard_train.targets.cases import Case
from pard_train.targets.target import Target

TIMEOUT = 7200.0  # seconds that one engine may take for its prompts


def engine_records(matrix: Matrix, draft: Draft, target: Target, case: Case) -> Iterator[Record]:
    """One record of mode `engine`: the first `live_prompts` prompts, decoded plainly and with the draft, one by one.

    The pass that reads the prompt is a step that accepts nothing. Speeds are of the engine at its most exact (eager,
    one prompt at a time), not of a server under load.

    Raises:
        UserError: if the engine fails; the message names its log.
    """
    config = matrix.settings
    turns, k = live_turns(case, config.live_prompts), config.live_num_draft_tokens
    request = EngineRequest(
        target=local_model(target.name),
        draft=local_model(draft.model.name),
        num_draft_tokens=k,
        prompts=[turn.prompt_ids for turn in turns],
        max_new_tokens=config.max_new_tokens,
        end_ids=sorted(case.limits.end_ids),
        dtype=matrix.dtype,
        trust_remote_code=matrix.trust_remote_code,
    )
    identity = {**case.identity, "draft_fingerprint": draft.fingerprint, "num_draft_tokens": k, "device": device_name()}

    def compute() -> dict[str, Any]:
        folder = matrix.folder / "engine" / f"{draft.name}-{case.target.replace('/', '--')}-{case.benchmark.name}"
        plain, speculative = (
            run(what, python=config.engine_python, folder=folder / name, timeout=TIMEOUT)
            for name, what in (("plain", replace(request, draft=None)), ("speculative", request))
        )
        return {"version": plain.version, "plain": asdict(plain)["answers"], "own": asdict(speculative)["answers"]}

    kept, made_by = matrix.cell("engine", identity | {"prompts": request.prompts}, compute)
    plain, own = kept["plain"], kept["own"]
    drafts, accepted = (sum(a["counters"][name] for a in own) for name in ("num_drafts", "num_accepted_tokens"))
    num_tokens = sum(len(answer["token_ids"]) for answer in own)
    rate, ar_rate = num_tokens / _seconds(own), sum(len(a["token_ids"]) for a in plain) / _seconds(plain)
    speedup = rate / ar_rate
    yield {
        **head(matrix, draft.name, draft.fingerprint, case),
        "mode": "engine",
        "method": "pard",
        "temperature": 0.0,
        "top_p": 1.0,
        "batch_size": 1,
        **measured([engine_trace(answer) for answer in own], turns, k),
        "vllm_drafts": drafts,
        "vllm_accepted": accepted,
        "vllm_tau": 1 + accepted / drafts if drafts else None,
        "speed": {
            "tokens_per_second": rate,
            "tokens_per_second_low": rate,
            "tokens_per_second_high": rate,
            "ar_tokens_per_second": ar_rate,
            "speedup": speedup,
            "speedup_low": speedup,
            "speedup_high": speedup,
            "num_identical_answers": sum(a["token_ids"] == b["token_ids"] for a, b in zip(own, plain, strict=True)),
            "num_rounds": 1,
        },
        "provenance": {**made_by, "versions": {**made_by["versions"], "vllm": kept["version"]}},
    }


def _seconds(answers: list[dict[str, Any]]) -> float:
    return sum(answer["seconds"] for answer in answers)


def engine_trace(answer: dict[str, Any]) -> Trace:
    """An engine's steps: the prefill, then its drafts, of which matches past the end of the answer do not count."""
    num_tokens, accepted, place = len(answer["token_ids"]), [0], 1
    for count in answer["accepted"]:
        accepted.append(min(count, num_tokens - place))
        place += accepted[-1] + 1
    return Trace(accepted, num_tokens)
