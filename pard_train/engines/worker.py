"""vLLM and PACE as engines: greedy answers to prompts of token ids, with or without a draft, with acceptance counters.

Both pin other versions than we do, so each has its own virtual environment (launch/vllm_cpu.sh, launch/pace_cpu.sh).
`process.run` starts this file with that environment's Python, so its top imports the standard library only. One process
is one engine, which frees all memory when it ends.

Prompts run one at a time and step by step, so that a difference can be traced to its prompt and step.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EngineRequest:
    """Models, prompts and limits for an engine.

    Attributes:
        target: folder or hub name.
        draft: exported folder; None decodes without draft.
        num_draft_tokens: K.
        prompts: token ids of each.
        max_new_tokens: of each answer.
        end_ids: ids that end an answer; if empty, answers run to the limit.
        dtype: of weights and activations.
        trust_remote_code: run code of the model's folder.
        engine: vllm or pace.
        engine_arguments: of `vllm.LLM`, besides ours; for Transformers a `device_map`.
    """

    target: str
    draft: str | None
    num_draft_tokens: int
    prompts: list[list[int]]
    max_new_tokens: int
    end_ids: list[int]
    dtype: str = "float32"
    trust_remote_code: bool = False
    engine: str = "vllm"
    engine_arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def num_positions(self) -> int:
        """Context that the engine needs: with less than 2 K positions left, it drafts zeros."""
        return max(map(len, self.prompts)) + self.max_new_tokens + 2 * self.num_draft_tokens + 1


@dataclass(frozen=True)
class Counters:
    """Counters of speculative decoding, in vLLM `vllm:spec_decode_*_total`.

    Attributes:
        num_drafts: verified drafts; in vLLM, steps after the prefill.
        num_draft_tokens: their tokens.
        num_accepted_tokens: of them, accepted.
        accepted_per_position: drafts whose position i = 1..K was accepted, [K].
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: list[int]

    @classmethod
    def of(cls, accepted: list[int], num_draft_tokens: int) -> Counters:
        """Counters of drafts of K tokens, given the accepted tokens of each.

        >>> Counters.of([2, 0], 3)
        Counters(num_drafts=2, num_draft_tokens=6, num_accepted_tokens=2, accepted_per_position=[1, 1, 0])
        """
        per_position = [sum(a > i for a in accepted) for i in range(num_draft_tokens)]
        return cls(len(accepted), len(accepted) * num_draft_tokens, sum(accepted), per_position)

    @classmethod
    def total(cls, parts: Sequence[Counters]) -> Counters:
        """The sum of one or more."""
        return cls(
            sum(part.num_drafts for part in parts),
            sum(part.num_draft_tokens for part in parts),
            sum(part.num_accepted_tokens for part in parts),
            [sum(column) for column in zip(*(part.accepted_per_position for part in parts), strict=True)],
        )

    def __sub__(self, before: Counters) -> Counters:
        pairs = zip(self.accepted_per_position, before.accepted_per_position, strict=True)
        return Counters(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            [now - then for now, then in pairs],
        )


@dataclass(frozen=True)
class EngineAnswer:
    """An engine's answer to one prompt.

    Attributes:
        token_ids: the answer, its end-of-turn token included.
        accepted: accepted tokens of each verified draft, matches past the end of the answer included.
        drafts: tokens of each verified draft; empty if the engine does not expose them.
        counters: the engine's own, of this prompt.
        seconds: wall-clock, prefill included.
    """

    token_ids: list[int]
    accepted: list[int]
    drafts: list[list[int]]
    counters: Counters
    seconds: float


@dataclass(frozen=True)
class EngineResult:
    """Answers in the order of the prompts, and the engine's version."""

    version: str
    answers: list[EngineAnswer]


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def _work_in_vllm(request: EngineRequest) -> EngineResult:
    """Answer every prompt with vLLM, in this process."""
    import vllm

    llm = vllm.LLM(**engine_arguments(request))
    limits: dict[str, Any] = {"stop_token_ids": request.end_ids} if request.end_ids else {"ignore_eos": True}
    # Sets every value that a model's generation config could change.
    sampling = vllm.SamplingParams(
        temperature=0.0, repetition_penalty=1.0, max_tokens=request.max_new_tokens, detokenize=False, **limits
    )
    answers = [
        _answer(llm, sampling, str(number), ids, request.draft is not None)
        for number, ids in enumerate(request.prompts)
    ]
    return EngineResult(vllm.__version__, answers)


def engine_arguments(request: EngineRequest) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, for exact results rather than speed."""
    arguments: dict[str, Any] = {
        "model": request.target,
        "dtype": request.dtype,
        "max_model_len": request.num_positions,
        "max_num_seqs": 1,
        "enforce_eager": True,  # no compilation
        "enable_prefix_caching": False,  # results do not depend on earlier prompts
        "async_scheduling": False,  # a draft can be read before it is verified
        "disable_log_stats": False,
        "generation_config": "vllm",  # ignores the model's sampling settings
        "trust_remote_code": request.trust_remote_code,
    }
    if request.draft is not None:
        drafting = speculative_config(request.draft, request.num_draft_tokens, request.num_positions)
        arguments["speculative_config"] = drafting
        arguments["disable_hybrid_kv_cache_manager"] = True  # vLLM wants the layers of a draft in one group of caches
    return arguments | request.engine_arguments


def speculative_config(draft: str, num_draft_tokens: int, max_model_len: int) -> dict[str, Any]:
    """vLLM's settings of a parallel draft."""
    how = {"method": "draft_model", "parallel_drafting": True}
    return {**how, "model": draft, "num_speculative_tokens": num_draft_tokens, "max_model_len": max_model_len}


def _answer(llm: Any, sampling: Any, name: str, prompt_ids: list[int], is_speculative: bool) -> EngineAnswer:
    """One prompt, step by step."""
    engine, first, seconds = llm.llm_engine, _read_counters(llm, is_speculative), 0.0
    engine.add_request(name, {"prompt_token_ids": prompt_ids}, sampling)
    token_ids: list[int] = []
    accepted, drafts, before = [], [], first
    while engine.has_unfinished_requests():
        draft, start = _pending_draft(engine), time.perf_counter()
        outputs = engine.step()
        seconds += time.perf_counter() - start  # without the counters, which are read of a draft only
        for output in outputs:
            token_ids = list(output.outputs[0].token_ids)
        now = _read_counters(llm, is_speculative)
        if now.num_drafts > before.num_drafts:
            accepted.append(now.num_accepted_tokens - before.num_accepted_tokens)
            drafts += draft
        before = now
    return EngineAnswer(token_ids, accepted, drafts, before - first, seconds)


def _read_counters(llm: Any, is_speculative: bool) -> Counters:
    """The engine's counters since it started."""
    if not is_speculative:
        return Counters(0, 0, 0, [])
    found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    drafts, draft_tokens, accepted_tokens = (
        found[name].value for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return Counters(drafts, draft_tokens, accepted_tokens, list(found["num_accepted_tokens_per_pos"].values))


def _pending_draft(engine: Any) -> list[list[int]]:
    """Draft tokens that the next step verifies, as a list of one draft; empty if the engine does not expose them.

    They are not part of vLLM's interface, and only describe differences.
    """
    try:
        (request,) = engine.engine_core.engine_core.scheduler.requests.values()
        return [list(request.spec_token_ids)]
    except (AttributeError, ValueError):
        return []


# ---- PACE -----------------------------------------------------------------------------------------------------------


class Blocks:
    """A streamer for `generate` that collects the prompt, then the tokens of each target pass."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def put(self, value: Any) -> None:
        """Add one block of ids."""
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing to flush."""


def _work_in_pace(request: EngineRequest) -> EngineResult:
    """Answer every prompt with AMD's PACE, in this process."""
    import torch
    from pace.llm import LLMModel, SamplingConfig
    from pace.llm.configs import PardSpecDecodeConfig

    k = request.num_draft_tokens
    drafting = PardSpecDecodeConfig(request.draft, num_speculative_tokens=k) if request.draft else None
    model = LLMModel(request.target, dtype=getattr(torch, request.dtype), spec_config=drafting, disable_tqdm=True)
    limits = {"eos_token_id": request.end_ids or [0], "ignore_eos": not request.end_ids, "min_new_tokens": 0}
    sampling = SamplingConfig(
        max_new_tokens=request.max_new_tokens, do_sample=False, repetition_penalty=1.0, frequency_penalty=0.0, **limits
    )
    answers = []
    for prompt in request.prompts:
        blocks, start = Blocks(), time.perf_counter()
        output = model.generate(torch.tensor([prompt]), sampling, text_streamer=blocks)
        seconds = time.perf_counter() - start
        token_ids = output.output_token_ids[0, len(prompt) :].tolist()
        ends = [place + 1 for place, token in enumerate(token_ids) if token in request.end_ids]
        token_ids = token_ids[: min([request.max_new_tokens, *ends])]  # its last step may write past both
        accepted = [len(tokens) - 1 for tokens in blocks.tokens[1:]] if drafting else []
        counters = Counters.of(accepted, k)
        if drafting:  # of the engine's own statistics, tokens and tokens per step
            stats = output.speculative_stats
            num_drafts = round(stats.total_speculated_tokens / stats.mean_accepted_tokens)
            num_accepted, by_position = stats.total_speculated_tokens - num_drafts, counters.accepted_per_position
            counters = Counters(num_drafts, num_drafts * k, num_accepted, by_position)
        answers.append(EngineAnswer(token_ids, accepted, [], counters, seconds))
    return EngineResult(metadata.version("amd-pace"), answers)


# ---- The engine's process -------------------------------------------------------------------------------------------

WORK = {"vllm": _work_in_vllm, "pace": _work_in_pace}


def main(request_path: str, result_path: str) -> int:
    """Read a request and write its result. An error goes into the result, its traceback into the log."""
    request = EngineRequest(**json.loads(Path(request_path).read_text()))
    result: dict[str, Any]
    try:
        result = asdict(WORK[request.engine](request))
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    partial = Path(result_path + ".partial")
    partial.write_text(json.dumps(result))
    partial.replace(result_path)
    return int("error" in result)


if __name__ == "__main__":
    # Python puts the folder of this file first, which has our modules; its option -P needs 3.11.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    sys.exit(main(*sys.argv[1:]))
