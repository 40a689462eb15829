"""Attention of `PackedChains` over cached keys and values of the texts and of the continuing chains.

Model code stays as it is: the cache is a keyword argument of the model's forward, which reaches an attention function
registered with `transformers`. Rows of a forward pass come in blocks, each of one text; no mask is larger than a block
by its text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pard_train.core.scores import Scoring, attend, softmax
from pard_train.layout import SlotLayout, Window, is_visible, lay_out_text

# Legend: T text slots of a pack, A chains that continue, R rows of a forward pass, Q rows of a block, P text tokens
#         that it attends to, d slots of a chain, H heads, G heads per key-value head, D head size, E size of a value.

ATTENTION = "pard_chains"  # our name among transformers' attention functions


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a forward pass, all of one text.

    Attributes:
        keys: slots of the text's first P tokens.
        num_text: P.
        anchor: of each row, int64 [Q].
        depth: of all rows.
    """

    start: int
    stop: int
    keys: slice | Tensor
    num_text: int
    anchor: Tensor
    depth: int
    _masks: dict[Window, Tensor] = field(default_factory=dict)  # shared by layers

    def mask(self, window: Window) -> Tensor | None:
        """Text tokens visible to each row, bool [Q, P]; None: causal."""
        if len(self.anchor) == self.num_text and (window is None or self.num_text <= window) and self.depth == 0:
            return None
        if window not in self._masks:
            rows = SlotLayout(self.anchor * 0, self.anchor, self.anchor * 0 + self.depth)
            text = lay_out_text(torch.arange(self.num_text, device=self.anchor.device))
            self._masks[window] = is_visible(rows, text, window)
        return self._masks[window]


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Scoring) -> Tensor:
        """Attention of R rows: [H / G, R, G, D], and [H / G, R, D] of their own keys and values -> [H / G, R, G, E]."""
        if self.depth == 0:
            self._text[layer] = (key, value)
        else:
            self._chains[layer] = self._extended(layer, key[:, :, None], value[:, :, None])
        outputs = []
        for block in self.blocks:
            rows = slice(block.start, block.stop)
            text_key, text_value = (part[:, block.keys] for part in self._text[layer])
            mask = block.mask(how.window)
            if self.depth == 0:
                outputs.append(_attend_text(query[:, rows], text_key, text_value, mask, how))
            else:
                own_key, own_value = (part[:, rows, -(how.window or 0) :] for part in self._chains[layer])
                text, own = (text_key, text_value), (own_key, own_value)
                outputs.append(_attend_chains(query[:, rows], text, own, cast(Tensor, mask), how))
        return torch.cat(outputs, dim=1)

    def _extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the continuing chains with one more slot each: [H / G, A, d, D] twice."""
        if self.depth == 1:
            return key, value
        old_key, old_value = (part[:, self.kept] for part in self._chains[layer])
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)


def _attend_text(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: Scoring) -> Tensor:
    """Rows over text alone: [H / G, Q, G, D] over [H / G, P, D]."""
    groups = query.shape[2]
    heads = query.transpose(1, 2).flatten(0, 1)[None]  # [1, H, Q, D]
    key, value = (part.repeat_interleave(groups, dim=0)[None] for part in (key, value))  # [1, H, P, D]
    out = attend(heads, key, value, how, mask, is_causal=mask is None)
    return out[0].unflatten(0, (-1, groups)).transpose(1, 2)


def _attend_chains(
    query: Tensor, text: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], mask: Tensor, how: Scoring
) -> Tensor:
    """Rows over text and over the d slots of their own chains, in one softmax of float32 scores, as fused kernels have.

    Args:
        query: [H / G, Q, G, D].
        text: keys and values, [H / G, P, D] and [H / G, P, E].
        own: keys and values of the chains within the window, [H / G, Q, d, D] and [H / G, Q, d, E].
        mask: text tokens visible to each row, bool [Q, P].
        how: of the layer.
    """
    (text_key, text_value), (own_key, own_value) = text, own
    query = query.float() * (query.shape[-1] ** -0.5 if how.scaling is None else how.scaling)
    num_text, shape = text_key.shape[1], query.shape
    text_scores = (query.flatten(1, 2) @ text_key.float().mT).view(*shape[:3], num_text)  # [H / G, Q, G, P]
    scores = how.cap(torch.cat([text_scores, query @ own_key.float().mT], dim=-1))  # [H / G, Q, G, P + d]
    scores[..., :num_text].masked_fill_(~mask[:, None], -torch.inf)
    sinks = None if how.sinks is None else how.sinks.view(shape[0], 1, shape[2], 1)
    weight = softmax(scores, None, sinks).to(text_value.dtype)
    from_text = weight[..., :num_text].flatten(1, 2) @ text_value
    return from_text.view(*shape[:3], -1) + weight[..., num_text:] @ own_value


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chain_memory: Memory,
    **layer: Any,
) -> tuple[Tensor, None]:
    """Attention function for `transformers`: query [1, H, R, D], key and value [1, H / G, R, D] -> [1, R, H, E]."""
    grouped = query[0].unflatten(0, (key.shape[1], -1)).transpose(1, 2)  # [H / G, R, G, D]
    how = Scoring.of(layer)
    out = chain_memory.attend(cast(int, module.layer_idx), grouped, key[0], value[0], how)
    return out.transpose(0, 1).flatten(1, 2)[None].contiguous(), None


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
