"""Tokens per second under load, predicted for every K from step times and replay: which K to serve, or no draft.

An engine with B requests in its batch does one step for all of them: it drafts K tokens for each and verifies them. So
a load is replayed step by step: a request occupies its place for as many steps as replay says it takes at this K, each
step costs what such a step was measured to cost, and a prompt is prefilled before its request joins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pard_train.acceptance.counting import accepted_by_step

MIN_GAIN = 1.03  # a draft must be predicted to gain that much, or it is not worth its memory
LAST_BATCH = 65536  # the last range of a schedule goes on to any batch size
VLLM_WARNING = (
    "vLLM 0.32 has no schedule for parallel drafts: num_speculative_tokens_per_batch_size ends its engine at the first "
    "batch with a smaller K. Serve the K of your usual load."
)


@dataclass(frozen=True)
class StepTimes:
    """What an engine's steps take.

    Attributes:
        seconds: of a step by K and batch size; K = 0 is the target alone.
        prefill_seconds: of one prompt alone, by K.
        prefill_tokens: tokens of that prompt.
    """

    seconds: Mapping[int, Mapping[int, float]]
    prefill_seconds: Mapping[int, float]
    prefill_tokens: int

    def step(self, num_draft_tokens: int, batch_size: int) -> float:
        """Seconds of a step, linear between measured batch sizes and between measured K."""
        return self._between(num_draft_tokens, lambda k: _interpolate(self.seconds[k], batch_size))

    def prefill(self, num_draft_tokens: int, num_tokens: int) -> float:
        """Seconds to read a prompt; proportional to its tokens, but not below a step."""
        share = num_tokens / self.prefill_tokens
        return self._between(
            num_draft_tokens, lambda k: max(self.prefill_seconds[k] * share, _interpolate(self.seconds[k], 1))
        )

    def _between(self, num_draft_tokens: int, of: Any) -> float:
        if num_draft_tokens == 0:
            return of(0)
        return _interpolate({k: of(k) for k in self.seconds if k}, num_draft_tokens)

    @property
    def values_of_k(self) -> list[int]:
        """Every K from the smallest to the largest measured one."""
        measured = [k for k in self.seconds if k]
        return list(range(min(measured), max(measured) + 1))


def _interpolate(points: Mapping[int, float], at: float) -> float:
    return float(np.interp(at, sorted(points), [points[x] for x in sorted(points)]))


@dataclass(frozen=True)
class Request:
    """One request of a load: tokens of its prompt, and the matches of its answer by `replay_all`."""

    num_prompt_tokens: int
    matches: Sequence[int]

    def steps(self, num_draft_tokens: int) -> int:
        """Steps after the prefill, which gives the first token."""
        if num_draft_tokens == 0:
            return len(self.matches) - 1
        return len(accepted_by_step(self.matches, num_draft_tokens, num_prefilled=1))


def simulate(requests: Sequence[Request], times: StepTimes, num_draft_tokens: int, concurrency: int) -> float:
    """Seconds that an engine takes for a load of `concurrency` clients, each of which asks again once it is answered.

    >>> times = StepTimes({0: {1: 1.0, 2: 1.5}}, {0: 2.0}, 10)
    >>> simulate([Request(10, [0, 0, 0])] * 2, times, 0, 1)  # twice: a prefill of 2 s, then two steps of 1 s
    8.0
    """
    waiting = [(times.prefill(num_draft_tokens, r.num_prompt_tokens), r.steps(num_draft_tokens)) for r in requests]
    running: list[int] = []  # steps left
    seconds = 0.0
    while waiting or running:
        joining = [waiting.pop(0) for _ in range(min(concurrency - len(running), len(waiting)))]
        if running:
            seconds += times.step(num_draft_tokens, len(running))
        seconds += sum(prefill for prefill, _ in joining)
        running = [left - 1 for left in running if left > 1] + [steps for _, steps in joining if steps]
    return seconds


def predict_load(requests: Sequence[Request], times: StepTimes, concurrency: int) -> list[dict[str, Any]]:
    """Predicted speed of the target alone and of every K between the measured ones, for so many clients."""
    num_tokens = sum(len(request.matches) for request in requests)
    plain = num_tokens / simulate(requests, times, 0, concurrency)
    rows = []
    for k in (0, *times.values_of_k):
        steps = sum(request.steps(k) for request in requests)
        speed = num_tokens / simulate(requests, times, k, concurrency)
        rows.append(
            {
                "concurrency": concurrency,
                "num_draft_tokens": k,
                "vllm_tau": (num_tokens - len(requests)) / steps if steps else 1.0,
                "step_seconds": times.step(k, concurrency),
                "is_interpolated": k not in times.seconds,
                "tokens_per_second": speed,
                "speedup": speed / plain,
            }
        )
    return rows


def best_k(rows: Sequence[Mapping[str, Any]]) -> int:
    """K of the fastest prediction at one concurrency; 0, no draft, unless one gains at least MIN_GAIN."""
    best = max(rows, key=lambda row: row["speedup"])
    return best["num_draft_tokens"] if best["speedup"] >= MIN_GAIN else 0


def schedules(best: Mapping[int, int]) -> dict[str, Any]:
    """The best K by batch size, as engines read it.

    Args:
        best: K by concurrency; 0 is no draft.

    Returns:
        `tensorrt_llm`: `max_draft_len` and `draft_len_schedule`, K by the last batch size of a range, at least 1: a
        length of 0 leaves a stale draft cache. `vllm`: `num_speculative_tokens` by concurrency, one of which a server
        has at every batch size.

    >>> schedules({1: 8, 4: 4, 16: 0})["tensorrt_llm"]["draft_len_schedule"]
    {1: 8, 4: 4, 65536: 1}
    """
    sizes = sorted(best)
    lasts, lengths = [*sizes[:-1], LAST_BATCH], [max(1, best[size]) for size in sizes]
    shortened = [min(lengths[0], length) for length in lengths]  # TensorRT-LLM refuses one longer than the first
    return {
        "tensorrt_llm": {
            "max_draft_len": lengths[0],
            "draft_len_schedule": dict(zip(lasts, shortened, strict=True)),
        },
        "vllm": {"num_speculative_tokens": {size: best[size] for size in sizes}, "warning": VLLM_WARNING},
    }
