"""Block attention by matrix products, with a backward pass that recomputes the attention weights.

PyTorch's fused CPU kernel takes its float32 products from MKL (see `products`). Here the scores of a block are one
product through oneDNN, small enough to stay in the CPU cache until they become output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pard_train.core.cpu.products import float32_onednn

# Legend: T slots of the pack, Q queries and N keys of a block, H heads, J key-value heads, G heads per key-value head,
# D head size, E size of a value.


@dataclass(frozen=True)
class QueryBlock:
    """Slots that attend to a run of slots before them and to themselves.

    Attributes:
        queries: the slots.
        text: the run of slots before them; it may end with the queries themselves.
        bias: 0 for visible keys and -inf for others, float32 [Q, 1, B]: of the last B keys, since every earlier key
            is visible.
    """

    queries: slice
    text: slice
    bias: Tensor

    @property
    def is_in_text(self) -> bool:
        """Whether the queries are the end of the text."""
        return self.queries.stop == self.text.stop

    def keys_of(self, slots: Tensor) -> Tensor:
        """[J, T, D] to [J, N, D]: the text, then the queries unless they are in it."""
        text = slots[:, self.text]
        return text if self.is_in_text else torch.cat([text, slots[:, self.queries]], dim=1)

    def add_to(self, slots: Tensor, keys: Tensor) -> None:
        """Add gradients of this block's keys, [J, N, D], to their slots in [J, T, D]."""
        num_text = self.text.stop - self.text.start
        slots[:, self.text] += keys[:, :num_text]
        if not self.is_in_text:
            slots[:, self.queries] += keys[:, num_text:]


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[QueryBlock], scaling: float | None
) -> Tensor:
    """Softmax attention of every block's queries over its keys.

    Args:
        query: float32 [H, T, D] that `products.takes_onednn` accepts.
        key: [J, T, D] likewise; J divides H.
        value: [J, T, E].
        blocks: cover each of the T slots once.
        scaling: of the scores; D^-0.5 if None.

    Returns:
        Output [T, H, E].
    """
    return _BlockAttention.apply(query, key, value, blocks, query.shape[-1] ** -0.5 if scaling is None else scaling)


class _BlockAttention(torch.autograd.Function):
    """Queries are laid out as [J, T * G, D]: the rows of a block are a slice, for all heads that share keys."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[QueryBlock], scaling: float
    ) -> Tensor:
        """Output [T, H, D]."""
        groups = query.shape[0] // key.shape[0]
        rows = _rows_by_slot(query * scaling, groups)
        key, value = key.contiguous(), value.contiguous()
        out = rows.new_empty(*rows.shape[:2], value.shape[-1])  # values may be shorter than keys
        with float32_onednn():
            for block in blocks:
                weights = _weights(rows, block.keys_of(key), block, groups)
                torch.bmm(weights, block.keys_of(value), out=_rows_of(out, block, groups))
        ctx.save_for_backward(rows, key, value)
        ctx.blocks, ctx.groups, ctx.scaling = blocks, groups, scaling
        return _heads_apart(out, groups).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        rows, key, value = ctx.saved_tensors
        out_grad = _rows_by_slot(upstream.transpose(0, 1), ctx.groups)
        row_grad, key_grad, value_grad = torch.empty_like(rows), torch.zeros_like(key), torch.zeros_like(value)
        with float32_onednn():
            for block in ctx.blocks:
                block_rows, block_grad, out = (_rows_of(x, block, ctx.groups) for x in (rows, out_grad, row_grad))
                keys, values = block.keys_of(key), block.keys_of(value)
                weights = _weights(rows, keys, block, ctx.groups)
                block.add_to(value_grad, weights.transpose(1, 2) @ block_grad)
                weight_grad = block_grad @ values.transpose(1, 2)
                score_grad = torch.ops.aten._softmax_backward_data(weight_grad, weights, -1, weights.dtype)
                torch.bmm(score_grad, keys, out=out)
                block.add_to(key_grad, score_grad.transpose(1, 2) @ block_rows)
        return _heads_apart(row_grad.mul_(ctx.scaling), ctx.groups), key_grad, value_grad, None, None


def _weights(rows: Tensor, keys: Tensor, block: QueryBlock, groups: int) -> Tensor:
    """Softmax weights of a block, [J, Q * G, N]."""
    scores = _rows_of(rows, block, groups) @ keys.transpose(1, 2)
    by_slot = scores.unflatten(1, (-1, groups))  # [J, Q, G, N]
    by_slot[..., keys.shape[1] - block.bias.shape[-1] :] += block.bias
    return scores.softmax(dim=-1)


def _rows_of(rows: Tensor, block: QueryBlock, groups: int) -> Tensor:
    return rows[:, block.queries.start * groups : block.queries.stop * groups]


def _rows_by_slot(heads: Tensor, groups: int) -> Tensor:
    """[H, T, D] to [J, T * G, D]."""
    return heads.unflatten(0, (-1, groups)).transpose(1, 2).flatten(1, 2).contiguous()


def _heads_apart(rows: Tensor, groups: int) -> Tensor:
    """[J, T * G, D] to [H, T, D]."""
    return rows.unflatten(1, (-1, groups)).transpose(1, 2).flatten(0, 1)
