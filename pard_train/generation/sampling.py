"""Sampling, and the verification rule that makes speculative sampling lossless.

A draft proposes its most likely tokens at any temperature, as engines do with parallel drafting. A draft token d is
accepted with probability p(d), where p is the target's distribution. The first rejected token is resampled from the
rest of p; if all are accepted, one more token is sampled from p. Every token then has exactly the target's
distribution, for any draft (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318: the case q(d) = 1).

All functions here are pure: random numbers are arguments. Each answer has its own generator, so the answer to a prompt
depends neither on the batch nor on the order of prompts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Legend: B rows, K draft tokens, V vocabulary of the target.

NO_TOKEN = -1  # pads the rows that have fewer draft tokens than others


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: nucleus: share of the probability that is sampled from.
        seed: with the prompt, it determines the answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always chosen."""
        return self.temperature == 0

    def seed_of(self, key: str) -> int:
        """Seed of the answer to one prompt, independent of other prompts. 31 bits, which every engine accepts."""
        return int(hashlib.sha256(f"{self.seed} {key}".encode()).hexdigest()[:8], 16) >> 1


GREEDY = Sampling()


class SequenceRandom:
    """A random generator for each of B answers, seeded by the sampling seed and the prompt alone.

    Repeated prompts get different generators.
    """

    def __init__(self, prompts: Sequence[list[int]], sampling: Sampling):
        num_earlier: Counter[str] = Counter()
        self._generators = []
        for prompt in map(str, prompts):
            seed = sampling.seed_of(f"{num_earlier[prompt]} {prompt}")
            self._generators.append(torch.Generator().manual_seed(seed))
            num_earlier[prompt] += 1

    def uniform(self, rows: list[int], count: int) -> Tensor:
        """The next uniform numbers in [0, 1) of some answers: float64 [rows, count]."""
        return torch.stack([torch.rand(count, generator=self._generators[row], dtype=torch.float64) for row in rows])


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are sampled from.

    Args:
        logits: [..., V], any floating type.
        sampling: temperature first, then top-p: the fewest most likely tokens with a total of at least `top_p`.

    Returns:
        float32 [..., V]; one-hot at temperature 0.
    """
    if sampling.is_greedy:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probs.sort(stable=True, dim=-1, descending=True)
        is_outside = ranked.cumsum(-1) - ranked >= sampling.top_p  # more likely tokens already reach top_p
        probs = probs.scatter(-1, order, ranked.masked_fill(is_outside, 0.0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Sample one token per row by inversion of the cumulative weights.

    Args:
        weights: [..., V], not negative, not all zero, not necessarily normalized.
        uniforms: float64 [...], in [0, 1).

    Returns:
        int64 [...].
    """
    total = weights.double().cumsum(-1)
    return torch.searchsorted(total, (uniforms[..., None] * total[..., -1:]), right=True).squeeze(-1)


def verify(draft_tokens: Tensor, target_probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Accept a prefix of the draft and add one token, so that every token has the target's distribution.

    Args:
        draft_tokens: int64 [B, K]; NO_TOKEN at the end of rows that have fewer.
        target_probs: the target's probabilities after the text and after each draft token, float32 [B, K + 1, V].
        uniforms: float64 [B, K + 1].

    Returns:
        Number of accepted draft tokens, int64 [B], and the token after them, int64 [B].

    Example: p gives token 0 a quarter, the draft is token 0. A uniform number of 0.2 accepts it, 0.3 does not:

        >>> p = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]])
        >>> [verify(torch.tensor([[0]]), p, torch.tensor([[u, 0.1]])) for u in (0.2, 0.3)]
        [(tensor([1]), tensor([0])), (tensor([0]), tensor([1]))]
    """
    rows, num_draft_tokens = torch.arange(len(draft_tokens), device=target_probs.device), draft_tokens.shape[1]
    named = draft_tokens.clamp(min=0)[..., None]
    p = target_probs[:, :num_draft_tokens].gather(-1, named).squeeze(-1)  # [B, K]
    is_accepted = (uniforms[:, :-1] < p) & (draft_tokens != NO_TOKEN)
    num_accepted = is_accepted.long().cumprod(-1).sum(-1)  # [B]
    own = target_probs[rows, num_accepted]  # [B, V]
    end = draft_tokens.new_full((len(draft_tokens), 1), NO_TOKEN)
    rejected = torch.cat([draft_tokens, end], dim=1)[rows, num_accepted]  # [B]; NO_TOKEN after the last
    rest = own.scatter(-1, rejected.clamp(min=0)[:, None], 0.0)
    is_resampled = (rejected != NO_TOKEN) & (rest.sum(-1) > 0)  # all zero only where rounding rejected a token
    return num_accepted, draw(torch.where(is_resampled[:, None], rest, own), uniforms[:, -1])
