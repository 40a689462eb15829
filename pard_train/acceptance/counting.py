"""Exact acceptance length: tau, histogram, survival and intervals from the accepted draft tokens of every step.

tau (mean accepted length) = tokens emitted / target forward passes, pooled over all prompts. The first pass prefills
the prompt and verifies the first draft. The target's own token counts. Tokens past the end of the turn or the length
limit do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pard_train.bootstrap import counts_per_prompt, tau_interval

# Legend: P prompts, K draft tokens, N tokens of an answer.

POSITION_WIDTH = 64  # tokens of an answer per group of positions


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
    """Steps of one answer at one K.

    Args:
        matches: for each answer token j, how many draft tokens in a row, proposed from just before j, are the target's;
            those past the end of the answer do not count.
        num_draft_tokens: K.

    Example: five tokens at K = 8. The steps emit tokens 0 1 2 (two accepted, one of the target), then 3, then 4:

        >>> walk([2, 0, 1, 0, 0], 8)
        Trace(accepted=[2, 0, 0], num_tokens=5)
    """
    accepted, place = [], 0
    while place < len(matches):
        accepted.append(min(matches[place], num_draft_tokens, len(matches) - place))
        place += accepted[-1] + 1
    return Trace(accepted, len(matches))


def accepted_by_step(
    matches: Sequence[int], num_draft_tokens: int, *, num_prefilled: int, counts_past_end: bool = True
) -> list[int]:
    """Draft tokens that an engine accepts at every step of one answer.

    Args:
        matches: for each answer token, how many draft tokens in a row, proposed from just before it, are the target's.
        num_draft_tokens: K.
        num_prefilled: tokens that no draft predicts: 1 in vLLM, whose prefill gives the first token, otherwise 0.
        counts_past_end: the last step counts matches past the end, as far as `matches` shows them, as in vLLM and PACE.
            Without it every step emits a token of the target within the answer, as in Transformers.

    >>> accepted_by_step([9, 2, 0, 0, 3, 2], 4, num_prefilled=1)
    [2, 3]
    >>> accepted_by_step([2, 2, 0, 3, 2, 1], 4, num_prefilled=0, counts_past_end=False)
    [2, 2]
    """
    accepted = walk(matches[num_prefilled:], num_draft_tokens).accepted
    if accepted:
        last = num_prefilled + sum(accepted[:-1]) + len(accepted) - 1  # first token of the last draft
        most = num_draft_tokens if counts_past_end else len(matches) - last - 1
        accepted[-1] = min(matches[last], num_draft_tokens, most)
    return accepted


def count_as_vllm(matches: Sequence[int], num_draft_tokens: int) -> tuple[int, int]:
    """vLLM's counters for one answer: (drafts, accepted draft tokens).

    Matches past the end of a cached answer are unknown, so up to K - 1 accepted tokens are missing, unless `replay`
    received the continuation (`extra_ids`).
    """
    accepted = accepted_by_step(matches, num_draft_tokens, num_prefilled=1)
    return len(accepted), sum(accepted)


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
        prompt_counts: tokens and steps of every prompt, [P, 2].
    """

    num_draft_tokens: int
    num_prompts: int
    num_turns: int
    num_tokens: int
    histogram: Sequence[int]
    tau_low: float
    tau_high: float
    mean_prompt_tau: float
    prompt_counts: Sequence[Sequence[int]]

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
        derived = ("num_steps", "tau", "survival", "conditional")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def pool(traces: Sequence[Trace], num_draft_tokens: int, *, prompts: Sequence[str] | None = None) -> Acceptance:
    """Pool the traces of some answers.

    Args:
        traces: one per answer.
        num_draft_tokens: K.
        prompts: prompt of each answer, whose turns are resampled together for the interval; None: one answer each.

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
        prompt_counts=counts.astype(int).tolist(),
    )


# ---- Groups ---------------------------------------------------------------------------------------------------------


def group_traces(
    traces: Sequence[Trace],
    *,
    prompts: Sequence[str],
    names: Mapping[str, Sequence[str]],
    prompt_lengths: Sequence[int] = (),
    width: int = POSITION_WIDTH,
) -> list[dict[str, Any]]:
    """Acceptance by groups of answers, and by the place in answer and context at which a step starts.

    Args:
        traces: one per answer, all of one K.
        prompts: prompt of each answer.
        names: for each kind (category, turn, prompt_length, ...) the group of each answer; empty: in no group.
        prompt_lengths: tokens before each answer, for `context`; empty: no such groups.
        width: tokens of a group of positions.

    Returns:
        For each group its kind (`by`), name, tokens, steps, tau and 95% interval, as in acceptance.json: kinds in the
        order of `names`, then `position` and `context`; groups by number, else by name.
    """
    totals = [(trace.num_tokens, len(trace.accepted)) for trace in traces]
    groups = [g for by, of in names.items() for g in _groups(by, list(zip(of, prompts, totals, strict=True)))]
    steps = [
        (f"{start // width * width}-{start // width * width + width - 1}", prompt, (num_tokens, 1))
        for trace, prompt in zip(traces, prompts, strict=True)
        for start, num_tokens in _steps(trace)
    ]
    places = [
        (length_bucket(length + start), prompt, (num_tokens, 1))
        for trace, prompt, length in zip(traces, prompts, prompt_lengths or [], strict=bool(prompt_lengths))
        for start, num_tokens in _steps(trace)
    ]
    return groups + _groups("position", steps) + _groups("context", places)


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
