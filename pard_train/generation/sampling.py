"""Sampling, and the rule that keeps speculative sampling lossless.

A draft token d, proposed with probability q(d), is kept with probability min(1, p(d) / q(d)), p being the target's. The
first token that is not kept is drawn anew from what p has more of than q, max(p - q, 0) normalised; if all are kept,
one more token is drawn from p. Every token then has exactly the target's distribution, whatever the draft
(Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). A draft that takes its most likely token, as
engines do with parallel drafting, is the case q = 1: kept with probability p(d), and d is left out of the new draw.

Chance comes in as uniform numbers: the functions here are pure, and each answer has a stream of numbers of its own, so
that what a prompt gets depends neither on the batch nor on the order of prompts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Legend: B rows, K draft tokens, V vocabulary of the target, W <= V vocabulary that a draft speaks.

NO_TOKEN = -1  # fills up the rows that have fewer draft tokens than others


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely one.
        top_p: share of the probability that is drawn from.
        seed: of the draws; with the prompt it decides them.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def is_greedy(self) -> bool:
        """Whether there is no chance in it."""
        return self.temperature == 0

    def seed_of(self, key: str) -> int:
        """Seed of the answer to one prompt, whatever else is asked. 31 bits, which every engine takes."""
        return int(hashlib.sha256(f"{self.seed} {key}".encode()).hexdigest()[:8], 16) >> 1


GREEDY = Sampling()


class Dice:
    """A stream of uniform numbers for each of B answers, decided by the seed and the answer's prompt alone.

    Where a prompt is asked several times, each asking has a stream of its own.
    """

    def __init__(self, prompts: Sequence[list[int]], sampling: Sampling):
        times_asked: Counter[str] = Counter()
        self._streams = []
        for prompt in map(str, prompts):
            seed = sampling.seed_of(f"{times_asked[prompt]} {prompt}")
            self._streams.append(torch.Generator().manual_seed(seed))
            times_asked[prompt] += 1

    def roll(self, rows: list[int], num_rolls: int) -> Tensor:
        """The next numbers of some answers: float64 [rows, num_rolls], each in [0, 1)."""
        rolls = [torch.rand(num_rolls, generator=self._streams[row], dtype=torch.float64) for row in rows]
        return torch.stack(rolls)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from.

    Args:
        logits: [..., V], any floating type.
        sampling: temperature first, then top-p: the fewest most likely tokens that hold at least `top_p` together.

    Returns:
        float32 [..., V]; at temperature 0, one for the most likely token.
    """
    if sampling.is_greedy:
        return torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    probs = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ranked, order = probs.sort(stable=True, dim=-1, descending=True)
        is_outside = ranked.cumsum(-1) - ranked >= sampling.top_p  # what is more likely already holds enough
        probs = probs.scatter(-1, order, ranked.masked_fill(is_outside, 0.0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(weights: Tensor, rolls: Tensor) -> Tensor:
    """One token for each row, by inversion of the cumulated weights.

    Args:
        weights: [..., V], not negative, not all zero; they need not sum to one.
        rolls: float64 [...], in [0, 1).

    Returns:
        int64 [...].
    """
    total = weights.double().cumsum(-1)
    return torch.searchsorted(total, (rolls[..., None] * total[..., -1:]), right=True).squeeze(-1)


def verify(
    draft_tokens: Tensor, draft_probs: Tensor | None, target_probs: Tensor, rolls: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep a prefix of the draft and add one token, so that every token has the target's distribution.

    Args:
        draft_tokens: int64 [B, K]; NO_TOKEN at the end of rows that have fewer.
        draft_probs: what they were drawn from, float32 [B, K, W]; None for a draft that takes its most likely tokens.
        target_probs: the target's probabilities after the text and after each draft token, float32 [B, K + 1, V].
        rolls: uniform numbers, float64 [B, K + 1].

    Returns:
        Number of draft tokens kept, int64 [B], and the token after them, int64 [B].

    Example: p gives token 0 a quarter, the draft is token 0. A roll of 0.2 keeps it, 0.3 does not:

        >>> p = torch.tensor([[[0.25, 0.75], [0.25, 0.75]]])
        >>> [verify(torch.tensor([[0]]), None, p, torch.tensor([[r, 0.1]])) for r in (0.2, 0.3)]
        [(tensor([1]), tensor([0])), (tensor([0]), tensor([1]))]
    """
    rows, num_draft_tokens = torch.arange(len(draft_tokens), device=target_probs.device), draft_tokens.shape[1]
    named = draft_tokens.clamp(min=0)[..., None]
    p = target_probs[:, :num_draft_tokens].gather(-1, named).squeeze(-1)  # [B, K]
    q = torch.ones_like(p) if draft_probs is None else draft_probs.gather(-1, named).squeeze(-1)
    is_kept = (rolls[:, :-1] * q < p) & (draft_tokens != NO_TOKEN)
    num_kept = is_kept.long().cumprod(-1).sum(-1)  # [B]
    own = target_probs[rows, num_kept]  # [B, V]
    end = draft_tokens.new_full((len(draft_tokens), 1), NO_TOKEN)
    refused = torch.cat([draft_tokens, end], dim=1)[
        rows, num_kept
    ]  # [B] the draft token there; NO_TOKEN after the last
    rest = _beyond_draft(own, refused.clamp(min=0), draft_probs, num_kept)
    is_redrawn = (refused != NO_TOKEN) & (rest.sum(-1) > 0)  # nothing is left only where rounding refused a token
    return num_kept, draw(torch.where(is_redrawn[:, None], rest, own), rolls[:, -1])


def _beyond_draft(own: Tensor, refused: Tensor, draft_probs: Tensor | None, num_kept: Tensor) -> Tensor:
    """max(p - q, 0) at the refused token of each row: [B, V] from p [B, V]."""
    if draft_probs is None:
        return own.scatter(-1, refused[:, None], 0.0)
    rows = torch.arange(len(own), device=own.device)
    rest = own.clone()
    rest[:, : draft_probs.shape[-1]] -= F.pad(draft_probs, (0, 0, 0, 1))[rows, num_kept]
    return rest.clamp(min=0.0)
