"""Acceptance length, exactly: from the accepted drafts of every step follow tau, histogram, survival and intervals.

tau (mean accepted length) = tokens emitted / target forward passes, pooled over all prompts. The first pass prefills
the prompt and verifies the first draft; the target's own token counts; tokens past the end of the turn or the length
limit do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Legend: P prompts, K draft tokens, N tokens of an answer.

NUM_BOOTSTRAP = 1000  # resamples of prompts for the 95% interval
POSITION_WIDTH = 64  # tokens of an answer that are one group of places


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
        matches: for each answer token j, how many draft tokens in a row, proposed from just before j, are the target's;
            those past the end of the answer do not count.
        num_draft_tokens: K.

    Example: a five-token answer, matches [2, 0, 1, 0, 0]. K = 8 emits tokens 0 1 2 (two accepted, one own), then 3, 4.

        >>> walk([2, 0, 1, 0, 0], 8)
        Trace(accepted=[2, 0, 0], num_tokens=5)
    """
    accepted, place = [], 0
    while place < len(matches):
        accepted.append(min(matches[place], num_draft_tokens, len(matches) - place))
        place += accepted[-1] + 1
    return Trace(accepted, len(matches))


def vllm_counts(matches: Sequence[int], num_draft_tokens: int, num_tokens: int | None = None) -> tuple[int, list[int]]:
    """What vLLM's counters show for one answer: drafts, and accepted draft tokens per position.

    vLLM takes the first token from the target's prefill and then drafts exactly K tokens every step until the answer
    ends; matches past the end count too. A cached answer shows those only where `replay` was told what would follow
    (extra_ids): without that, up to K - 1 per answer are missing.

    Args:
        matches: for each token, how many draft tokens in a row, proposed from just before it, are the target's.
        num_draft_tokens: K.
        num_tokens: tokens of the answer, if `matches` goes on after its end.

    Returns:
        Number of drafts, and how often position 1..K was accepted, [K].

    >>> vllm_counts([9, 2, 0, 0, 3, 2], 4)  # token 0 is the prefill's, token 5 the last
    (2, [2, 2, 1, 0])
    """
    num_drafts, per_position, place = 0, [0] * num_draft_tokens, 1
    while place < (len(matches) if num_tokens is None else num_tokens):
        accepted = min(matches[place], num_draft_tokens)
        num_drafts += 1
        for position in range(accepted):
            per_position[position] += 1
        place += accepted + 1
    return num_drafts, per_position


def walk_as_vllm(matches: Sequence[int], num_draft_tokens: int) -> tuple[int, int]:
    """(drafts, accepted) of `vllm_counts`."""
    num_drafts, per_position = vllm_counts(matches, num_draft_tokens)
    return num_drafts, sum(per_position)


@dataclass(frozen=True)
class Acceptance:
    """Pooled acceptance at one K.

    Attributes:
        num_prompts: P.
        num_turns: answers; one prompt may have several.
        histogram: number of steps that accepted 0..K draft tokens, [K + 1].
        num_tokens: tokens emitted.
        tau_low, tau_high: bootstrap 95% interval over prompts.
        mean_prompt_tau: mean of tokens / steps over prompts that have a step.
    """

    num_draft_tokens: int
    num_prompts: int
    num_turns: int
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
            "num_turns": self.num_turns,
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


def pool(traces: Sequence[Trace], num_draft_tokens: int, *, prompts: Sequence[str] | None = None) -> Acceptance:
    """Pool the traces of some answers.

    Args:
        traces: one per answer.
        num_draft_tokens: K.
        prompts: which prompt each answer belongs to. The turns of one prompt are drawn together for the interval; None
            takes every answer for a prompt of its own.

    Raises:
        ValueError: if there is no step to count.
    """
    items = [(trace.num_tokens, len(trace.accepted)) for trace in traces]
    counts = counts_per_prompt(items, prompts if prompts is not None else range(len(traces)))
    num_tokens, num_steps = counts.sum(axis=0)
    if num_steps == 0:
        raise ValueError("no decoding step to count")
    histogram = np.bincount([a for trace in traces for a in trace.accepted], minlength=num_draft_tokens + 1)
    low, high = tau_interval(counts)
    answered = counts[counts[:, 1] > 0]
    return Acceptance(
        num_draft_tokens=num_draft_tokens,
        num_prompts=len(counts),
        num_turns=len(traces),
        num_tokens=int(num_tokens),
        histogram=histogram.tolist(),
        tau_low=low,
        tau_high=high,
        mean_prompt_tau=float((answered[:, 0] / answered[:, 1]).mean()),
    )


def tau_interval(counts: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of tokens / steps, the same on every call.

    Args:
        counts: tokens and steps of every prompt, [P, 2].
    """
    draws = np.random.default_rng(0).integers(len(counts), size=(NUM_BOOTSTRAP, len(counts)))
    tokens, steps = counts[draws].sum(axis=1).T  # [NUM_BOOTSTRAP] each
    low, high = np.quantile(tokens / np.maximum(steps, 1), [0.025, 0.975])
    return float(low), float(high)


def counts_per_prompt(items: Sequence[tuple[float, float]], prompts: Sequence[Any]) -> np.ndarray:
    """(tokens, steps) of some items, summed by prompt: [P, 2]."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    counts = np.zeros((len(numbers), 2))
    np.add.at(counts, [numbers[prompt] for prompt in prompts], np.reshape(items, (-1, 2)))
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


def group_traces(
    traces: Sequence[Trace],
    *,
    prompts: Sequence[str],
    names: Mapping[str, Sequence[str]],
    width: int = POSITION_WIDTH,
) -> list[dict[str, Any]]:
    """Acceptance by kinds of answers, and by the place in the answer where a step starts.

    Args:
        traces: one per answer, all of one K.
        prompts: which prompt each answer belongs to.
        names: for each kind (category, turn, prompt_length, ...) the group of each answer; empty is in none.
        width: tokens of a group of places.

    Returns:
        For each group its kind (`by`), name, tokens, steps, tau and 95% interval, as in acceptance.json. Kinds come in
        the order of `names`, `position` is the last; groups by number where they have one, else by name.
    """
    totals = [(trace.num_tokens, len(trace.accepted)) for trace in traces]
    groups = [g for by, of in names.items() for g in _groups(by, list(zip(of, prompts, totals, strict=True)))]
    steps = [
        (f"{start // width * width}-{start // width * width + width - 1}", prompt, (num_tokens, 1))
        for trace, prompt in zip(traces, prompts, strict=True)
        for start, num_tokens in _steps(trace)
    ]
    return groups + _groups("position", steps)


def length_bucket(num_tokens: int) -> str:
    """Group of a length of at least one token, by powers of two.

    >>> [length_bucket(n) for n in (1, 64, 127, 128)]
    ['1-1', '64-127', '64-127', '128-255']
    """
    low = 1 << (num_tokens.bit_length() - 1)
    return f"{low}-{2 * low - 1}"


def _steps(trace: Trace) -> Iterator[tuple[int, int]]:
    """(token that it starts at, tokens that it emits) of every step."""
    start = 0
    for accepted in trace.accepted:
        yield start, min(accepted + 1, trace.num_tokens - start)
        start += accepted + 1


def _groups(by: str, items: Sequence[tuple[str, str, tuple[int, int]]]) -> list[dict[str, Any]]:
    """One row per group of (group, prompt, (tokens, steps))."""
    rows = []
    for name in sorted({name for name, _, _ in items} - {""}, key=_natural_order):
        mine = [(prompt, counts) for group, prompt, counts in items if group == name]
        counts = counts_per_prompt([c for _, c in mine], [prompt for prompt, _ in mine])
        num_tokens, num_steps = (int(total) for total in counts.sum(axis=0))
        if num_steps:
            low, high = tau_interval(counts)
            tau = {"tau": num_tokens / num_steps, "tau_low": low, "tau_high": high}
            rows.append({"by": by, "name": name, "num_tokens": num_tokens, "num_steps": num_steps, **tau})
    return rows


def _natural_order(name: str) -> tuple[float, str]:
    number = name.split("-")[0]
    return (int(number) if number.isdecimal() else float("inf"), name)
