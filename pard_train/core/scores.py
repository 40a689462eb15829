"""Softmax attention with what architectures add to it: soft-capped scores (Gemma 2) and sinks (gpt-oss)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pard_train.layout import Window

# Legend: B rows, H heads, J key-value heads, Q queries, N keys, D head size, E size of a value.


@dataclass(frozen=True)
class Scoring:
    """How a layer scores keys.

    Attributes:
        scaling: factor of the products; D^-0.5 if None.
        window: of the layer, in tokens.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: per head, the score of a key without value, [H].
        dropout: of the weights.
    """

    scaling: float | None = None
    window: Window = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @classmethod
    def of(cls, layer: dict[str, Any]) -> Scoring:
        """From the keyword arguments that `transformers` passes to an attention function."""
        window, dropout = layer.get("sliding_window"), layer.get("dropout", 0.0)
        return cls(layer.get("scaling"), window, layer.get("softcap"), layer.get("s_aux"), dropout)

    @property
    def is_plain(self) -> bool:
        """Whether the weights are a softmax of products, window apart."""
        return self.softcap is None and self.sinks is None

    def cap(self, products: Tensor) -> Tensor:
        """Scores of scaled products."""
        return products if self.softcap is None else torch.tanh(products / self.softcap) * self.softcap


def attend(
    query: Tensor, key: Tensor, value: Tensor, how: Scoring, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Output [B, H, Q, E]; by PyTorch's kernel unless scores are capped or there are sinks.

    Args:
        query: [B, H, Q, D].
        key, value: [B, J, N, D] and [B, J, N, E]; J divides H.
        how: of the layer; its window is in the mask.
        mask: True or 0 where visible, False or -inf elsewhere, broadcast to [B, H, Q, N]; None: all.
        is_causal: instead of a mask, where Q equals N.
    """
    groups = query.shape[1] // key.shape[1]
    is_fused = how.is_plain and mask is None and (query.device.type == "cpu" or query.dtype != torch.float32)
    if groups > 1 and not is_fused:  # no fused kernel shares keys under a mask, or in float32 on a GPU
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        groups = 1
    if how.is_plain:
        return F.scaled_dot_product_attention(
            query, key, value, mask, how.dropout, is_causal, scale=how.scaling, enable_gqa=groups > 1
        )
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scaled = query * (query.shape[-1] ** -0.5 if how.scaling is None else how.scaling)  # first: float16 overflows
    sinks = None if how.sinks is None else how.sinks.view(query.shape[1], -1)[:, :, None]
    return F.dropout(softmax(how.cap(scaled @ key.mT), mask, sinks), how.dropout) @ value


def softmax(scores: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Weights of the visible keys, in float32 at least.

    Args:
        scores: [..., Q, N].
        mask: as of `attend`.
        sinks: broadcast to [..., Q, 1]; a sink takes its share and is left out.
    """
    computed = torch.promote_types(scores.dtype, torch.float32)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is None:
        return scores.softmax(dim=-1, dtype=computed).to(scores.dtype)
    with_sink = torch.cat([scores, sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)], dim=-1)
    return with_sink.softmax(dim=-1, dtype=computed)[..., :-1].to(scores.dtype)
