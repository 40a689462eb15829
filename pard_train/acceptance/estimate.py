"""Expected acceptance at a temperature above 0, from cached log-probabilities: exact replay is impossible there.

Speculative sampling keeps a draft token by chance. Where the target drew its text in the same way, and the text has
token x, a draft token drawn from q was kept with probability min(1, q(x) / p(x)); a draft that takes its most likely
token was right if that is x. p is the target's distribution (arXiv 2211.17192, section 3). The tokens of one draft do
not depend on each other, so the expected steps, given the text, are exact, and their mean over texts has no bias.

The log-probabilities of the target are cached (`scores.py`); the distributions of the draft come from one packed
forward pass per depth, as in replay. Only the k most likely tokens of p are known. The unknown rest is bounded such
that tau is rather too low than too high; `mass_outside_top_k` is its probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pard_train.acceptance.chains import PackedChains, pack_texts
from pard_train.acceptance.counting import Acceptance
from pard_train.acceptance.replay import LOGIT_CHUNK, SLOT_BUDGET
from pard_train.bootstrap import counts_per_prompt, tau_interval
from pard_train.core.head import logits_after_norm
from pard_train.generation.proposers import Drafter
from pard_train.generation.sampling import Sampling, probabilities

# Legend: N tokens of an answer, A chains, K draft tokens, V vocabulary, k tokens cached per position.

MIN_SURVIVAL = 1e-4  # chains below this probability are not deepened: each would add less than this to a step


@dataclass(frozen=True)
class ScoredText:
    """A text that the target drew, with its log-probabilities, as `scores.py` caches them.

    Attributes:
        label_logprobs: log p(token | text before it) at temperature 1, float [N].
        top_logprobs: log-probabilities of the k most likely tokens, float [N, k], largest first.
        prompt_id: texts of one prompt are resampled together for the interval.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    label_logprobs: np.ndarray
    top_logprobs: np.ndarray
    prompt_id: str


@dataclass(frozen=True)
class Estimate(Acceptance):
    """Expected acceptance at one K.

    Attributes:
        mass_outside_top_k: mean probability of the target that the cached tokens do not cover.
    """

    mass_outside_top_k: float

    def record(self) -> dict[str, Any]:
        """The fields of acceptance.json that follow from the estimate."""
        return super().record() | {"mode": "estimate", "estimator": "sampled_text"}


@torch.inference_mode()
def estimate_acceptance(
    drafter: Drafter,
    texts: Sequence[ScoredText],
    num_draft_tokens: int,
    sampling: Sampling,
    *,
    slot_budget: int = SLOT_BUDGET,
) -> Estimate:
    """Expected acceptance of a draft on texts that the target drew.

    Args:
        drafter: draft model; `is_sampled` says whether it draws its tokens or takes the most likely ones.
        texts: with the target's log-probabilities.
        num_draft_tokens: K.
        sampling: how the target drew them, at a temperature above 0.
        slot_budget: text slots of a pack.

    Raises:
        ValueError: at temperature 0, where replay is exact.
    """
    if sampling.is_greedy:
        raise ValueError("temperature 0 needs no estimate: replay is exact")
    counts, prompts, outside = [], [], []
    histogram = np.zeros(num_draft_tokens + 1)
    for pack in pack_texts([(t.prompt_ids, t.answer_ids) for t in texts], slot_budget):
        members = [texts[text.number] for text in pack]
        label_probs, missing = _label_probabilities(members, sampling, drafter.model.config.vocab_size)
        chains = PackedChains(drafter, pack)
        kept = _kept(chains, label_probs, num_draft_tokens, sampling)
        for text, own in zip(members, np.split(kept, np.cumsum(chains.lengths)[:-1]), strict=True):
            steps = expected_steps(own)
            histogram += steps
            counts.append((len(own), float(steps.sum())))
            prompts.append(text.prompt_id)
        outside.append(missing)
    per_prompt = counts_per_prompt(counts, prompts)
    low, high = tau_interval(per_prompt)
    return Estimate(
        num_draft_tokens=num_draft_tokens,
        num_prompts=len(per_prompt),
        num_turns=len(counts),
        num_tokens=int(per_prompt[:, 0].sum()),
        histogram=histogram.tolist(),
        tau_low=low,
        tau_high=high,
        mean_prompt_tau=None,
        prompt_counts=per_prompt.tolist(),
        mass_outside_top_k=float(np.concatenate(outside).mean()),
    )


def expected_steps(kept: np.ndarray) -> np.ndarray:
    """Expected number of steps of one answer, by the number of draft tokens that they accept.

    Args:
        kept: [N, K]: probability that the draft token of depth d of a step that starts at token j is kept, given that
            those before it were.

    Returns:
        [K + 1]. A step that reaches the end of the answer accepts at most what is left of it.

    Example: two tokens, K = 1. The first step keeps token 0 half of the time and then adds token 1 of its own. Else
    token 0 is the target's, and another step keeps token 1 with probability 0.8:

        >>> expected_steps(np.array([[0.5], [0.8]])).tolist()
        [0.6, 0.9]
    """
    num_tokens, num_draft_tokens = kept.shape
    starts = np.zeros(num_tokens + num_draft_tokens + 1)  # probability that a step starts here
    starts[0] = 1.0
    histogram = np.zeros(num_draft_tokens + 1)
    for place in range(num_tokens):
        most = min(num_draft_tokens, num_tokens - place)
        survival = np.concatenate([[1.0], np.cumprod(kept[place, :most]), [0.0]])  # accepts at least 0, 1, ..., most
        steps = starts[place] * -np.diff(survival)
        histogram[: most + 1] += steps
        starts[place + 1 : place + most + 2] += steps
    return histogram


def _label_probabilities(
    texts: Sequence[ScoredText], sampling: Sampling, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each answer token: an upper bound of the target's probability, and the probability not cached; [A] each."""
    top_logprobs = np.concatenate([text.top_logprobs for text in texts]).astype(np.float64)
    label_logprobs = np.concatenate([text.label_logprobs for text in texts]).astype(np.float64)
    top_probs, log_total = temper(top_logprobs, sampling.temperature, num_rows)
    label_probs = np.exp(label_logprobs / sampling.temperature - log_total)
    if sampling.top_p < 1:
        is_inside = top_probs.cumsum(axis=1) - top_probs < sampling.top_p
        total = np.where(is_inside, top_probs, 0.0).sum(axis=1, keepdims=True)
        least = np.where(is_inside, top_logprobs, np.inf).min(axis=1)
        label_probs = np.where(label_logprobs >= least - 1e-3, label_probs / total[:, 0], 0.0)
        top_probs = np.where(is_inside, top_probs / total, 0.0)
    return np.minimum(label_probs, 1.0), np.maximum(1 - top_probs.sum(axis=1), 0)


def temper(top_logprobs: np.ndarray, temperature: float, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at a temperature from the largest log-probabilities at temperature 1.

    The weight of the unknown tokens at the temperature lies between two cases: all are equally likely, or a few are as
    likely as the last known one. At temperature 1 both are the remaining probability.

    Args:
        top_logprobs: [A, k], largest first.
        temperature: above 0.
        num_rows: V.

    Returns:
        The least probabilities that the known tokens can have, [A, k], and the log of the least that they may have been
        divided by, [A].
    """
    num_others = max(num_rows - top_logprobs.shape[1], 1)
    rest = np.maximum(1 - np.exp(top_logprobs).sum(axis=1), 0.0)
    alike = num_others * (rest / num_others) ** (1 / temperature)
    few = rest * np.exp(top_logprobs[:, -1] * (1 / temperature - 1))
    weights = np.exp(top_logprobs / temperature)
    most, least = (weights.sum(axis=1) + tail(alike, few) for tail in (np.maximum, np.minimum))
    return weights / most[:, None], np.log(least)


def _kept(chains: PackedChains, label_probs: np.ndarray, num_draft_tokens: int, sampling: Sampling) -> np.ndarray:
    """Probability that each draft token is kept, [A, K]; 0 past the end and in chains of negligible probability."""
    kept = np.zeros((len(chains.chain), num_draft_tokens))
    survival = np.ones(len(chains.chain))
    hidden: Tensor | None = chains.prefill()
    while hidden is not None:
        drafted = np.concatenate(list(_draft_probabilities(chains, hidden, sampling)))
        position = chains.chain + chains.depth  # answer tokens and chains are numbered alike
        ratio = np.minimum(1.0, drafted / np.maximum(label_probs[position], 1e-12))
        kept[chains.chain, chains.depth] = ratio
        survival[chains.chain] *= ratio
        is_wanted = survival[chains.chain] > MIN_SURVIVAL
        hidden = chains.deepen(is_wanted) if chains.depth + 1 < num_draft_tokens else None
    return kept


def _draft_probabilities(chains: PackedChains, hidden: Tensor, sampling: Sampling) -> Iterator[np.ndarray]:
    """The draft's probabilities of the text's own tokens, chunk by chunk; of a greedy draft each is 0 or 1."""
    drafter, labels = chains.drafter, torch.from_numpy(chains.labels).to(hidden.device)
    own = sampling if drafter.is_sampled else Sampling()
    for chunk, label in zip(hidden.split(LOGIT_CHUNK), labels.split(LOGIT_CHUNK), strict=True):
        probs = probabilities(drafter.mask_non_tokens(logits_after_norm(drafter.runner.model, chunk)), own)
        probs = torch.nn.functional.pad(probs, (0, drafter.model.config.vocab_size - probs.shape[1]))
        yield probs.gather(1, label[:, None])[:, 0].double().cpu().numpy()
