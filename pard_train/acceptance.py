"""Acceptance length, exactly: from the accepted drafts of every step follow tau, histogram, survival and intervals.

tau (mean accepted length) = tokens emitted / target forward passes, pooled over all prompts. The first pass prefills
the prompt and verifies the first draft; the target's own token counts; tokens past the end of the turn or the length
limit do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Legend: P prompts, K draft tokens, N tokens of an answer.

NUM_BOOTSTRAP = 1000  # resamples of prompts for the 95% interval


@dataclass(frozen=True)
class Trace:
    """One answer's decoding.

    Attributes:
        accepted: accepted draft tokens of each step, 0..K.
        num_tokens: tokens emitted.
    """

    accepted: list[int]
    num_tokens: int


def walk(matches: Sequence[int], num_draft_tokens: int) -> Trace:
    """Replay one answer's steps for one K.

    Args:
        matches: for each answer token j, how many draft tokens in a row, proposed from just before j, are the answer's.
        num_draft_tokens: K.

    Example: a five-token answer, matches [2, 0, 1, 0, 0]. K = 8 emits tokens 0 1 2 (two accepted, one own), then 3, 4.

        >>> walk([2, 0, 1, 0, 0], 8)
        Trace(accepted=[2, 0, 0], num_tokens=5)
    """
    accepted, place = [], 0
    while place < len(matches):
        accepted.append(min(matches[place], num_draft_tokens))
        place += accepted[-1] + 1
    return Trace(accepted, len(matches))


def walk_as_vllm(matches: Sequence[int], num_draft_tokens: int) -> tuple[int, int]:
    """(drafts, accepted) as vLLM counts: the first token comes from the target's prefill, then K drafts every step.

    vLLM also counts matches past the end of an answer, which a cached text cannot show: up to K - 1 per answer fewer.
    """
    trace = walk(matches[1:], num_draft_tokens)
    return len(trace.accepted), sum(trace.accepted)


@dataclass(frozen=True)
class Acceptance:
    """Pooled acceptance of P answers at one K.

    Attributes:
        histogram: number of steps that accepted 0..K draft tokens, [K + 1].
        num_tokens: tokens emitted.
        tau_low, tau_high: bootstrap 95% interval over prompts.
        mean_prompt_tau: mean over prompts of tokens / steps.
    """

    num_draft_tokens: int
    num_prompts: int
    num_tokens: int
    histogram: list[int]
    tau_low: float
    tau_high: float
    mean_prompt_tau: float

    @property
    def num_steps(self) -> int:
        """Target forward passes."""
        return sum(self.histogram)

    @property
    def tau(self) -> float:
        """Tokens per target forward pass."""
        return self.num_tokens / self.num_steps

    @property
    def survival(self) -> list[float]:
        """Share of steps in which draft position i = 1..K is accepted, [K]."""
        at_least = np.cumsum(self.histogram[::-1])[::-1]  # [K + 1]
        return (at_least[1:] / self.num_steps).tolist()

    @property
    def conditional(self) -> list[float | None]:
        """Share accepted of position i where i - 1 was accepted, [K]; None where that never happened."""
        before = [1.0, *self.survival[:-1]]
        return [now / b if b else None for now, b in zip(self.survival, before, strict=True)]

    def record(self) -> dict[str, Any]:
        """The fields of acceptance.json that follow from the counts."""
        return {
            "num_draft_tokens": self.num_draft_tokens,
            "num_prompts": self.num_prompts,
            "num_tokens": self.num_tokens,
            "num_steps": self.num_steps,
            "tau": self.tau,
            "tau_low": self.tau_low,
            "tau_high": self.tau_high,
            "mean_prompt_tau": self.mean_prompt_tau,
            "survival": self.survival,
            "conditional": self.conditional,
            "histogram": self.histogram,
        }


def pool(traces: Sequence[Trace], num_draft_tokens: int) -> Acceptance:
    """Pool the traces of P answers.

    Raises:
        ValueError: if there is no step to count.
    """
    tokens = np.array([trace.num_tokens for trace in traces])
    steps = np.array([len(trace.accepted) for trace in traces])
    if steps.sum() == 0:
        raise ValueError("no decoding step to count")
    histogram = np.bincount([a for trace in traces for a in trace.accepted], minlength=num_draft_tokens + 1)
    draws = np.random.default_rng(0).integers(len(traces), size=(NUM_BOOTSTRAP, len(traces)))
    low, high = np.quantile(tokens[draws].sum(axis=1) / np.maximum(steps[draws].sum(axis=1), 1), [0.025, 0.975])
    return Acceptance(
        num_draft_tokens=num_draft_tokens,
        num_prompts=len(traces),
        num_tokens=int(tokens.sum()),
        histogram=histogram.tolist(),
        tau_low=float(low),
        tau_high=float(high),
        mean_prompt_tau=float((tokens / np.maximum(steps, 1)).mean()),
    )
