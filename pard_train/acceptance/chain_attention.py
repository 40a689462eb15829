"""Attention of `PackedChains` over cached keys and values of the texts and of the continuing chains.

Model code stays as it is: the cache is a keyword argument of the model's forward, which reaches an attention function
registered with `transformers`. Rows of a forward pass come in blocks, each of one text; no mask is larger than a block
by its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

# Legend: T text slots of a pack, A chains that continue, R rows of a forward pass, Q rows of a block, P text tokens
#         that it attends to, d slots of a chain, H heads, G heads per key-value head, D head size.

ATTENTION = "pard_chains"  # our name among transformers' attention functions


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a forward pass, all of one text.

    Attributes:
        keys: slots of the text's first P tokens.
        mask: text tokens visible to each row, bool [Q, P]; None: causal.
    """

    start: int
    stop: int
    keys: slice | Tensor
    mask: Tensor | None


class Memory:
    """Keys and values of a pack, per layer: of its texts, and of the chains that continue.

    Attributes:
        depth: of the rows of this forward pass; depth 0 fills the text cache.
        blocks: of these rows.
        kept: the chains of the previous depth that continue, int64 [A]; set before a greater depth.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.blocks: list[Block] = []
        self.kept: Tensor | None = None
        self._text: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [H / G, T, D] twice
        self._chains: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [H / G, A, d, D] twice

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of R rows: [H / G, R, G, D], and [H / G, R, D] of their own keys and values, -> like the query."""
        if self.depth == 0:
            self._text[layer] = (key, value)
        else:
            self._chains[layer] = self._extended(layer, key[:, :, None], value[:, :, None])
        outputs = []
        for block in self.blocks:
            rows = slice(block.start, block.stop)
            text_key, text_value = (part[:, block.keys] for part in self._text[layer])
            if self.depth == 0:
                outputs.append(_attend_text(query[:, rows], text_key, text_value, block.mask, scaling))
            else:
                own_key, own_value = (part[:, rows] for part in self._chains[layer])
                text, own, mask = (text_key, text_value), (own_key, own_value), cast(Tensor, block.mask)
                outputs.append(_attend_chains(query[:, rows], text, own, mask, scaling))
        return torch.cat(outputs, dim=1)

    def _extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the continuing chains with one more slot each: [H / G, A, d, D] twice."""
        if self.depth == 1:
            return key, value
        old_key, old_value = (part[:, self.kept] for part in self._chains[layer])
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)


def _attend_text(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Rows over text alone: [H / G, Q, G, D] over [H / G, P, D]."""
    groups = query.shape[2]
    heads = query.transpose(1, 2).flatten(0, 1)[None]  # [1, H, Q, D]
    key, value = (part.repeat_interleave(groups, dim=0)[None] for part in (key, value))  # [1, H, P, D]
    out = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out[0].unflatten(0, (-1, groups)).transpose(1, 2)


def _attend_chains(
    query: Tensor, text: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor, scaling: float
) -> Tensor:
    """Rows over text and over the d slots of their own chains, in one softmax (in float32).

    Args:
        query: [H / G, Q, G, D].
        text: keys and values, [H / G, P, D] each.
        own: keys and values of the chains, [H / G, Q, d, D] each.
        mask: text tokens visible to each row, bool [Q, P].
        scaling: of the scores.
    """
    (text_key, text_value), (own_key, own_value) = text, own
    num_text, shape = text_key.shape[1], query.shape
    text_scores = (query.flatten(1, 2) @ text_key.mT).view(*shape[:3], num_text)  # [H / G, Q, G, P]
    text_scores = text_scores.masked_fill(~mask[:, None], -torch.inf)
    scores = torch.cat([text_scores, query @ own_key.mT], dim=-1) * scaling  # [H / G, Q, G, P + d]
    weight = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    from_text = weight[..., :num_text].flatten(1, 2) @ text_value
    return from_text.view(shape) + weight[..., num_text:] @ own_value


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    chain_memory: Memory,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for `transformers`: query [1, H, R, D], key and value [1, H / G, R, D] -> [1, R, H, D]."""
    grouped = query[0].unflatten(0, (key.shape[1], -1)).transpose(1, 2)  # [H / G, R, G, D]
    out = chain_memory.attend(cast(int, module.layer_idx), grouped, key[0], value[0], scaling)
    return out.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def chain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use this attention function within the context, whichever the model was loaded with."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
