"""Live speculative decoding: one draft forward, one target forward per step, greedy, with KV caches on both models.

Inference is the special case "one anchor, all depths" of the layout: accepted tokens, then K-1 mask tokens at
consecutive positions under a plain causal mask. Output equals the target's own greedy text for any draft.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.model import load_causal_lm, load_config, load_tokenizer, required_mask_token_of

# Legend: N new tokens, K draft tokens, V vocabulary.


@dataclass(frozen=True)
class Step:
    """One target forward pass.

    Attributes:
        tokens: what it emitted, up to the end of the turn or the length limit.
        num_accepted: how many of them are accepted draft tokens; the rest, at most one, is the target's own.
    """

    tokens: list[int]
    num_accepted: int


@dataclass(frozen=True)
class Limits:
    """When an answer ends."""

    max_new_tokens: int
    end_ids: frozenset[int]

    def cut(self, tokens: list[int], num_so_far: int) -> list[int]:
        """What counts of `tokens` after `num_so_far` tokens: up to the first end-of-turn id and the limit."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.end_ids), len(tokens))
        return tokens[: min(end, self.max_new_tokens - num_so_far)]

    def is_over(self, tokens: list[int]) -> bool:
        """Whether an answer ends here."""
        return len(tokens) >= self.max_new_tokens or (bool(tokens) and tokens[-1] in self.end_ids)


def end_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every id that ends a turn of this model: all of its generation config's, and the tokenizer's."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # older folders keep it in config.json
        configured = load_config(path).eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


class Drafter:
    """A draft model and what it may propose. Raises UserError for a model that is no draft model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.mask_token_id = required_mask_token_of(model.config)

    @classmethod
    def load(cls, path: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False) -> Drafter:
        """Load a draft folder. Raises UserError if it is not one."""
        load_config(path, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        model = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model.to(device).eval(), tokenizer)

    def choose(self, logits: Tensor) -> Tensor:
        """Arg max over what a tokenizer can say: never the mask token or a padded row. [..., V] -> int64 [...]."""
        logits = logits[..., : len(self.tokenizer)]
        if self.mask_token_id < logits.shape[-1]:
            logits = logits.index_fill(-1, torch.tensor([self.mask_token_id], device=logits.device), -torch.inf)
        return logits.argmax(dim=-1)


class DraftStream:
    """A drafter at work on one answer: keeps the keys and values of accepted text, forgets those of mask tokens."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.cache = DynamicCache(config=drafter.model.config)

    def propose(self, new_tokens: list[int], num_draft_tokens: int) -> list[int]:
        """K draft tokens after the text so far, from one forward pass.

        Args:
            new_tokens: text since the last call, at least one token.
            num_draft_tokens: K.
        """
        model = self.drafter.model
        masks = [self.drafter.mask_token_id] * (num_draft_tokens - 1)
        ids = torch.tensor([new_tokens + masks], device=model.device)  # [1, N + K - 1]
        logits = model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=num_draft_tokens).logits[0]
        forget_last(self.cache, num_draft_tokens - 1)
        return self.drafter.choose(logits).tolist()


@torch.inference_mode()
def decode(
    target: PreTrainedModel,
    prompt_ids: list[int],
    limits: Limits,
    *,
    drafter: Drafter | None = None,
    num_draft_tokens: int = 0,
) -> Iterator[Step]:
    """Greedy decoding, step by step; speculative with a drafter, plain without.

    The first step prefills the prompt and verifies the first draft in the same pass.

    Args:
        target: model whose greedy text comes out.
        prompt_ids: the rendered prompt.
        limits: when the answer ends.
        drafter: proposes K tokens per step; None decodes one token at a time.
        num_draft_tokens: K.

    Yields:
        One Step per target forward pass.
    """
    cache = DynamicCache(config=target.config)
    stream = DraftStream(drafter) if drafter is not None else None
    output: list[int] = []
    unread = draft_unread = prompt_ids  # text that the target, and the draft model, have not read yet
    while not limits.is_over(output):
        draft = stream.propose(draft_unread, num_draft_tokens) if stream is not None else []
        ids = torch.tensor([unread + draft], device=target.device)
        logits = target(ids, past_key_values=cache, use_cache=True, logits_to_keep=len(draft) + 1).logits[0]
        own = logits.argmax(dim=-1).tolist()  # the target's choice after the text, and after each draft token
        num_matched = num_leading_matches(draft, own)
        forget_last(cache, len(draft) - num_matched)
        tokens = limits.cut([*draft[:num_matched], own[num_matched]], len(output))
        output += tokens
        unread, draft_unread = tokens[-1:], tokens
        yield Step(tokens, min(num_matched, len(tokens)))


def forget_last(cache: DynamicCache, num_tokens: int) -> None:
    """Drop the keys and values of the last tokens read."""
    if num_tokens:
        cache.crop(-num_tokens)  # a negative number is what transformers 5.17 and 5.23 both take


def num_leading_matches(draft: list[int], own: list[int]) -> int:
    """Draft tokens that the target would have chosen itself, counted until the first that it would not.

    >>> num_leading_matches([5, 6, 7], [5, 6, 9, 1])
    2
    """
    return next((i for i, (d, t) in enumerate(zip(draft, own, strict=False)) if d != t), len(draft))
