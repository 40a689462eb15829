"""Bootstrap intervals over prompts, which are resampled with all their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# Legend: P prompts.

NUM_BOOTSTRAP = 1000  # resamples of prompts for a 95% interval


def tau_interval(counts: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of tokens / steps, the same on every call.

    Args:
        counts: tokens and steps of every prompt, [P, 2].
    """
    draws = np.random.default_rng(0).integers(len(counts), size=(NUM_BOOTSTRAP, len(counts)))
    tokens, steps = counts[draws].sum(axis=1).T  # [NUM_BOOTSTRAP] each
    low, high = np.quantile(tokens / np.maximum(steps, 1), [0.025, 0.975])
    return float(low), float(high)


def ratio_interval(first: np.ndarray, later: np.ndarray) -> tuple[float, float]:
    """Bootstrap 95% interval of the ratio of two taus on the same prompts, which are resampled in pairs.

    Most of the variance of tau lies between prompts and cancels, so the interval is narrower than those of two taus.

    Args:
        first: tokens and steps of every prompt, [P, 2].
        later: those of the other draft, [P, 2].

    Example: a draft that needs half the steps on every prompt.

        >>> ratio_interval(np.array([[8, 4], [9, 6]]), np.array([[8, 2], [9, 3]]))
        (2.0, 2.0)
    """
    draws = np.random.default_rng(0).integers(len(first), size=(NUM_BOOTSTRAP, len(first)))
    taus = [tokens / np.maximum(steps, 1) for tokens, steps in (c[draws].sum(axis=1).T for c in (later, first))]
    low, high = np.quantile(taus[0] / taus[1], [0.025, 0.975])
    return float(low), float(high)


def counts_per_prompt(items: Sequence[tuple[float, float]], prompts: Sequence[Any]) -> np.ndarray:
    """(tokens, steps) of some items, summed by prompt: [P, 2]."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    counts = np.zeros((len(numbers), 2))
    np.add.at(counts, [numbers[prompt] for prompt in prompts], np.reshape(items, (-1, 2)))
    return counts
