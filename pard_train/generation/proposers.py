"""What proposes draft tokens: a PARD draft in one forward pass, the same weights one token at a time, or the prompt.

A proposer serves many texts; `start` begins some, and the stream it returns follows them as they grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.generation.runner import Runner
from pard_train.generation.sampling import Dice, Sampling, draw, probabilities
from pard_train.model import load_causal_lm, load_config, load_tokenizer, required_mask_token_of

# Legend: B texts, K draft tokens, V vocabulary of the draft model, W tokens that its tokenizer can say.

MAX_NGRAM = 3  # tokens at the end of a text that prompt look-up searches for, at most


@dataclass(frozen=True)
class Proposal:
    """Draft tokens for B texts.

    Attributes:
        tokens: at most K of each.
        probs: what they were drawn from, float32 [B, K, W]; None for the most likely ones, or those of a look-up.
    """

    tokens: list[list[int]]
    probs: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """What a stream of drafts is for.

    Attributes:
        num_rows: B.
        num_slots: tokens of the longest text that may come, draft tokens included.
        num_draft_tokens: K.
        sampling: of the answers.
        dice: their uniform numbers; None if they are greedy.
    """

    num_rows: int
    num_slots: int
    num_draft_tokens: int
    sampling: Sampling
    dice: Dice | None


class DraftStream(Protocol):
    """A proposer at work on B texts."""

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """Draft tokens after each text.

        Args:
            rows: number of each text among those the task began with.
            texts: each the one of the call before or longer.
        """
        ...

    def keep(self, which: list[int]) -> None:
        """Go on with some of the texts only."""
        ...


class Proposer(Protocol):
    """Something that can draft."""

    def start(self, task: Task) -> DraftStream:
        """Begin B texts."""
        ...


class Drafter:
    """A parallel draft model and what it may propose: K tokens from one forward pass.

    Args:
        model: draft model.
        tokenizer: its tokenizer.
        is_sampled: with a temperature above 0, draw the tokens from the draft's own distribution. Otherwise they are
            the most likely ones, as in engines. Both are lossless.

    Raises:
        UserError: for a model that is no draft model.
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
        """The model made ready for live decoding, when that is first asked for."""
        return Runner(self.model)

    def sayable(self, logits: Tensor) -> Tensor:
        """Logits of what a tokenizer can say, never the mask token or a padded row. [..., V] -> [..., W]."""
        logits = logits[..., : len(self.tokenizer)]
        if self.mask_token_id < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor([self.mask_token_id], device=logits.device), -torch.inf)
        return logits

    def choose(self, logits: Tensor) -> Tensor:
        """Most likely token that may be said. [..., V] -> int64 [...]."""
        return self.sayable(logits).argmax(dim=-1)

    def pick(self, logits: Tensor, rows: list[int], task: Task) -> tuple[Tensor, Tensor | None]:
        """Draft tokens [B, M] from logits [B, M, V], and the probabilities [B, M, W] that they were drawn from."""
        if not self.is_sampled or task.dice is None:
            return self.choose(logits), None
        probs = probabilities(self.sayable(logits), task.sampling)
        return draw(probs, task.dice.roll(rows, logits.shape[1]).to(probs.device)), probs

    def start(self, task: Task) -> ParallelStream:
        """Begin B texts."""
        return ParallelStream(self, task)


class ParallelStream:
    """Inference is the special case "one anchor, all depths" of the layout: the text, then K - 1 mask tokens."""

    def __init__(self, drafter: Drafter, task: Task):
        self.drafter, self.task = drafter, task
        k = task.num_draft_tokens
        # A step reads at most K + 1 tokens of new text and K - 1 mask tokens.
        self.reader = drafter.runner.start(task.num_rows, task.num_slots, width=2 * k, num_logits=k)

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """K draft tokens after each text, from one forward pass."""
        masks = [self.drafter.mask_token_id] * (self.task.num_draft_tokens - 1)
        logits = self.reader.read(texts, [masks] * len(texts))  # [B, K, V]
        tokens, probs = self.drafter.pick(logits, rows, self.task)
        return Proposal(tokens.tolist(), probs)

    def keep(self, which: list[int]) -> None:
        """Go on with some of the texts only."""
        self.reader.keep(which)


class SequentialDrafter:
    """The same weights as an autoregressive draft model: K forward passes of one token. The baseline of PARD."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def start(self, task: Task) -> SequentialStream:
        """Begin B texts."""
        return SequentialStream(self.drafter, task)


class SequentialStream:
    """One draft token after the other; those that the target accepts need not be read again."""

    def __init__(self, drafter: Drafter, task: Task):
        self.drafter, self.task = drafter, task
        # A step reads at most the last accepted draft token and the target's own, then one token at a time.
        self.reader = drafter.runner.start(task.num_rows, task.num_slots, width=2, num_logits=1)

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """K draft tokens after each text, from K forward passes."""
        tokens: list[list[int]] = [[] for _ in texts]
        all_probs = []
        for _ in range(self.task.num_draft_tokens):
            logits = self.reader.read(texts, tokens, num_logits=1)
            chosen, probs = self.drafter.pick(logits, rows, self.task)
            tokens = [[*old, *new] for old, new in zip(tokens, chosen.tolist(), strict=True)]
            all_probs.append(probs)
        drawn = [probs for probs in all_probs if probs is not None]
        return Proposal(tokens, torch.cat(drawn, dim=1) if drawn else None)

    def keep(self, which: list[int]) -> None:
        """Go on with some of the texts only."""
        self.reader.keep(which)


class PromptLookup:
    """No model: what followed the last tokens where they stood before, in the prompt or the answer so far.

    Args:
        max_ngram: tokens at the end of the text that are searched for; fewer, down to one, if they are not found.
    """

    def __init__(self, max_ngram: int = MAX_NGRAM):
        self.max_ngram = max_ngram

    def start(self, task: Task) -> LookupStream:
        """Begin B texts."""
        return LookupStream(self.max_ngram, task)


class LookupStream:
    """Remembers where every n-gram of every text ended last."""

    def __init__(self, max_ngram: int, task: Task):
        self.max_ngram, self.num_draft_tokens = max_ngram, task.num_draft_tokens
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(task.num_rows)]
        self._num_seen = [0] * task.num_rows

    def propose(self, rows: list[int], texts: list[list[int]]) -> Proposal:
        """At most K tokens after each text; none where its last token never stood before."""
        return Proposal([self._follow(row, text) for row, text in zip(rows, texts, strict=True)])

    def keep(self, which: list[int]) -> None:
        """Nothing to drop: rows are told apart by their number."""

    def _follow(self, row: int, text: list[int]) -> list[int]:
        ends = self._ends[row]
        for end in range(self._num_seen[row] + 1, len(text)):  # the end of the text itself is what is searched for
            for size in range(1, min(self.max_ngram, end) + 1):
                ends[tuple(text[end - size : end])] = end
        self._num_seen[row] = len(text) - 1
        for size in range(min(self.max_ngram, len(text)), 0, -1):
            place = ends.get(tuple(text[-size:]))
            if place is not None:
                return text[place : place + self.num_draft_tokens]
        return []
