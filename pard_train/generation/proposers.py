"""Proposers of draft tokens: a PARD draft in one forward pass, the same weights autoregressively, and prompt lookup.

`start` begins a batch of texts; the stream it returns drafts for them as they grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.generation.runner import Runner
from pard_train.generation.sampling import Sampling, SequenceRandom, draw, probabilities
from pard_train.mask_token import required_mask_token_of
from pard_train.model import load_causal_lm, load_config, load_tokenizer

# Legend: B texts, K draft tokens, V vocabulary rows of the draft model, W entries of its tokenizer.

MAX_NGRAM = 3  # longest end of a text that prompt lookup searches for


@dataclass(frozen=True)
class Proposal:
    """Draft tokens for B texts.

    Attributes:
        tokens: at most K of each.
        probs: distributions they were sampled from, float32 [B, K, W]; None if they were not sampled.
    """

    tokens: list[list[int]]
    probs: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """A batch of texts to draft for.

    Attributes:
        num_rows: B.
        max_length: tokens of the longest text, draft tokens included.
        num_draft_tokens: K.
        sampling: of the answers.
        random: their random numbers; None if they are greedy.
    """

    num_rows: int
    max_length: int
    num_draft_tokens: int
    sampling: Sampling
    random: SequenceRandom | None


class DraftStream(Protocol):
    """Drafts for B growing texts."""

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """Draft tokens after each text.

        Args:
            rows: index of each text in the task.
            texts: each that of the previous call or longer.
        """
        ...

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts."""
        ...


class Proposer(Protocol):
    """A source of draft tokens."""

    def start(self, task: Task) -> DraftStream:
        """Start B texts."""
        ...


class Drafter:
    """A parallel draft model: K draft tokens from one forward pass.

    Args:
        model: draft model.
        tokenizer: its tokenizer.
        is_sampled: at a temperature above 0, sample draft tokens from the draft's own distribution instead of proposing
            the most likely ones, as engines do. Both are lossless.

    Raises:
        UserError: for a model that is not a draft model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, is_sampled: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.is_sampled = is_sampled
        self.mask_token_id = required_mask_token_of(model.config)

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Drafter:
        """Load a draft folder. Raises UserError if it is not one."""
        load_config(path, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        model = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model.to(device).eval(), tokenizer)

    @cached_property
    def runner(self) -> Runner:
        """The model prepared for live decoding, on first use."""
        return Runner(self.model)

    def mask_non_tokens(self, logits: Tensor) -> Tensor:
        """Logits of the tokenizer's entries without the mask token: drops padded rows. [..., V] -> [..., W]."""
        logits = logits[..., : len(self.tokenizer)]
        if self.mask_token_id < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor([self.mask_token_id], device=logits.device), -torch.inf)
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        """The most likely token. [..., V] -> int64 [...]."""
        return self.mask_non_tokens(logits).argmax(dim=-1)

    def pick(self, logits: Tensor, rows: list[int], task: Task) -> tuple[Tensor, Tensor | None]:
        """Draft tokens [B, M] from logits [B, M, V], and the probabilities [B, M, W] they were sampled from."""
        if not self.is_sampled or task.random is None:
            return self.choose(logits), None
        probs = probabilities(self.mask_non_tokens(logits), task.sampling)
        return draw(probs, task.random.uniform(rows, logits.shape[1]).to(probs.device)), probs

    def start(self, task: Task) -> ParallelStream:
        """Start B texts."""
        return ParallelStream(self, task)


class ParallelStream:
    """Parallel drafting: the text, then K - 1 mask tokens; the case "one anchor, all depths" of the layout."""

    def __init__(self, drafter: Drafter, task: Task):
        self.drafter, self.task = drafter, task
        k = task.num_draft_tokens
        # At most K + 1 new tokens of text and K - 1 mask tokens per step.
        self.batch = drafter.runner.start(task.num_rows, task.max_length, width=2 * k, num_logits=k)

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """K draft tokens after each text, from one forward pass."""
        masks = [self.drafter.mask_token_id] * (self.task.num_draft_tokens - 1)
        logits = self.batch.extend(texts, [masks] * len(texts))  # [B, K, V]
        tokens, probs = self.drafter.pick(logits, rows, self.task)
        return Proposal(tokens.tolist(), probs)

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts."""
        self.batch.keep(which)


class SequentialDrafter:
    """The same weights as an autoregressive draft model: K forward passes of one token. The baseline of PARD."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def start(self, task: Task) -> SequentialStream:
        """Start B texts."""
        return SequentialStream(self.drafter, task)


class SequentialStream:
    """One draft token after the other; accepted ones stay in the cache."""

    def __init__(self, drafter: Drafter, task: Task):
        self.drafter, self.task = drafter, task
        # A step starts with at most the last accepted draft token and the target's own, then one token at a time.
        self.batch = drafter.runner.start(task.num_rows, task.max_length, width=2, num_logits=1)

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """K draft tokens after each text, from K forward passes."""
        tokens: list[list[int]] = [[] for _ in texts]
        all_probs = []
        for _ in range(self.task.num_draft_tokens):
            logits = self.batch.extend(texts, tokens, num_logits=1)
            chosen, probs = self.drafter.pick(logits, rows, self.task)
            tokens = [[*old, *new] for old, new in zip(tokens, chosen.tolist(), strict=True)]
            all_probs.append(probs)
        sampled = [probs for probs in all_probs if probs is not None]
        return Proposal(tokens, torch.cat(sampled, dim=1) if sampled else None)

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts."""
        self.batch.keep(which)


class PromptLookup:
    """No model: the tokens that followed the latest earlier occurrence of the last n-gram, from MAX_NGRAM down to 1."""

    def start(self, task: Task) -> LookupStream:
        """Start B texts."""
        return LookupStream(task)


class LookupStream:
    """Index of where every n-gram of every text ended last."""

    def __init__(self, task: Task):
        self.num_draft_tokens = task.num_draft_tokens
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(task.num_rows)]
        self._num_indexed = [0] * task.num_rows

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """At most K tokens after each text; none if its last token did not occur before."""
        return Proposal([self._look_up(row, text) for row, text in zip(rows, texts, strict=True)])

    def keep(self, which: list[int]) -> None:
        """Nothing to drop: texts are identified by their index in the task."""

    def _look_up(self, row: int, text: list[int]) -> list[int]:
        ends = self._ends[row]
        for end in range(self._num_indexed[row] + 1, len(text)):  # excludes the end of the text, which is searched for
            for size in range(1, min(MAX_NGRAM, end) + 1):
                ends[tuple(text[end - size : end])] = end
        self._num_indexed[row] = len(text) - 1
        for size in range(min(MAX_NGRAM, len(text)), 0, -1):
            place = ends.get(tuple(text[-size:]))
            if place is not None:
                return text[place : place + self.num_draft_tokens]
        return []
