"""Proposers of draft tokens: a PARD draft in one forward pass, the same weights autoregressively, and prompt lookup.

`start` begins a batch of texts; the stream it returns drafts for them as they grow.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.generation.runner import DecodingBatch, Runner
from pard_train.mask_token import produced_ids, required_mask_token_of
from pard_train.model import load_causal_lm, load_config, load_tokenizer

# Legend: B texts, K draft tokens, V vocabulary rows of the draft model, W entries of its tokenizer.

MAX_NGRAM = 3  # longest end of a text that prompt lookup searches for


class DraftStream(Protocol):
    """Drafts for B growing texts."""

    def propose(self, texts: list[list[int]]) -> list[list[int]]:
        """At most K draft tokens after each text, which is that of the previous call or longer."""
        ...

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts."""
        ...


class Proposer(Protocol):
    """A source of draft tokens."""

    def start(self, num_rows: int, max_length: int, num_draft_tokens: int) -> DraftStream:
        """Start B texts of at most `max_length` tokens, K draft tokens included."""
        ...


class Drafter:
    """A parallel draft model: K draft tokens from one forward pass, the most likely ones at any temperature.

    Raises:
        UserError: for a model that is not a draft model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = required_mask_token_of(model.config)
        self.num_tokens = max(produced_ids(tokenizer)) + 1
        self.num_rows = model.get_input_embeddings().weight.shape[0]

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
        logits = logits[..., : self.num_tokens]
        if self.mask_token_id < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor([self.mask_token_id], device=logits.device), -torch.inf)
        return logits

    def readable(self, ids: np.ndarray) -> np.ndarray:
        """Ids with the mask token in place of those beyond the draft's rows: a padded target may emit them."""
        return np.where(ids < self.num_rows, ids, self.mask_token_id)

    def choose(self, logits: Tensor) -> Tensor:
        """The most likely token. [..., V] -> int64 [...]."""
        return self.mask_non_tokens(logits).argmax(dim=-1)

    def start(self, num_rows: int, max_length: int, num_draft_tokens: int) -> ParallelStream:
        """Start B texts. A step has at most K + 1 new tokens and K - 1 mask tokens."""
        batch = self.runner.start(num_rows, max_length, width=2 * num_draft_tokens, num_logits=num_draft_tokens)
        return ParallelStream(self, batch, num_draft_tokens)


class ParallelStream:
    """Parallel drafting: the text, then K - 1 mask tokens; the case "one anchor, all depths" of the layout."""

    def __init__(self, drafter: Drafter, batch: DecodingBatch, num_draft_tokens: int):
        self.drafter, self.batch, self.num_draft_tokens = drafter, batch, num_draft_tokens

    def propose(self, texts: list[list[int]]) -> list[list[int]]:
        """K draft tokens after each text, from one forward pass."""
        masks = [self.drafter.mask_token_id] * (self.num_draft_tokens - 1)
        return self._extend(texts, [masks] * len(texts))

    def _extend(
        self, texts: list[list[int]], extras: list[list[int]], num_logits: int | None = None
    ) -> list[list[int]]:
        """Draft tokens after each text and its extra tokens."""
        texts = [self.drafter.readable(np.array(text)).tolist() for text in texts]
        return self.drafter.choose(self.batch.extend(texts, extras, num_logits)).tolist()

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts."""
        self.batch.keep(which)


class SequentialDrafter:
    """The same weights as an autoregressive draft model: K forward passes of one token. The baseline of PARD."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def start(self, num_rows: int, max_length: int, num_draft_tokens: int) -> SequentialStream:
        """Start B texts. A step starts with at most the last accepted draft token and the target's own."""
        batch = self.drafter.runner.start(num_rows, max_length, width=2, num_logits=1)
        return SequentialStream(self.drafter, batch, num_draft_tokens)


class SequentialStream(ParallelStream):
    """One draft token after the other; accepted ones stay in the cache."""

    def propose(self, texts: list[list[int]]) -> list[list[int]]:
        """K draft tokens after each text, from K forward passes."""
        tokens: list[list[int]] = [[] for _ in texts]
        for _ in range(self.num_draft_tokens):
            chosen = self._extend(texts, tokens, num_logits=1)
            tokens = [[*old, *new] for old, new in zip(tokens, chosen, strict=True)]
        return tokens


@dataclass(frozen=True)
class PromptLookup:
    """No model: the tokens that followed the latest earlier occurrence of the last n-gram, from MAX_NGRAM down to 1."""

    num_draft_tokens: int = 0

    def start(self, num_rows: int, max_length: int, num_draft_tokens: int) -> PromptLookup:
        """Start B texts."""
        return PromptLookup(num_draft_tokens)

    def propose(self, texts: list[list[int]]) -> list[list[int]]:
        """At most K tokens after each text; none if its last token did not occur before."""
        return [self._look_up(text) for text in texts]

    def keep(self, which: list[int]) -> None:
        """Nothing to drop."""

    def _look_up(self, text: list[int]) -> list[int]:
        ids = np.array(text)
        for size in range(min(MAX_NGRAM, len(ids) - 1), 0, -1):
            grams = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)  # without the end, which is searched for
            if len(places := np.flatnonzero((grams == ids[-size:]).all(axis=1))):
                return text[places[-1] + size :][: self.num_draft_tokens]
        return []
