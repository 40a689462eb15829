"""Attention over a chain layout, in three forms with the same result.

dense   one boolean mask over the whole pack, through PyTorch's SDPA. Quadratic in slots: the oracle.
split   per document: causal attention over the text; mask slots in short blocks over [their text prefix | their own
        chains]. No mask is larger than one block by one document. The CPU form, in float32 by `block_attention` where
        oneDNN is used.
flex    FlexAttention with a block mask: the kernel skips blocks without visible pairs. The GPU form.

Model code is not modified: `transformers` passes a 4-D mask, or extra keyword arguments of the model's forward, to the
attention function unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from pard_train.core.cpu.block_attention import QueryBlock, attend_blocks
from pard_train.core.cpu.products import takes_onednn
from pard_train.errors import UserError
from pard_train.layout import SlotLayout, is_visible

# Legend: T slots of the pack, N blocks of FlexAttention, Q queries of a block, P text prefix, H heads, G heads per
# key-value head, D head size.

IMPLEMENTATIONS = {"dense": "sdpa", "split": "pard_split", "flex": "flex_attention"}  # ours -> transformers' name
FLEX_BLOCK = 128  # slots per block, FlexAttention's default
BLOCK_DTYPES = (torch.float32, torch.bfloat16)  # that `block_attention` computes in float32, faster in both cases
MAX_BLOCK_SLOTS = 128  # slots per block of the split form; smaller blocks mask less and have more overhead


@dataclass(frozen=True)
class TextSpan:
    """The real tokens of one document: slots [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChainBlock:
    """Whole chains of one document: slots [start, stop) attend to its first `num_text` tokens and to themselves."""

    start: int
    stop: int
    num_text: int  # P
    num_shared: int  # of these, the tokens visible to all of the slots
    mask: Tensor  # bool [Q, P + Q]


class SplitPlan:
    """The pieces of a pack, in slot order and covering every slot.

    A class, because `torch.compile` specializes on lists that pass through a model and would recompile for each.
    """

    def __init__(self, pieces: list[TextSpan | ChainBlock]):
        self.pieces = pieces

    @cached_property
    def blocks(self) -> list[QueryBlock]:
        """The pieces with the text in blocks too; computed by the first layer and used by all."""
        blocks, text_start = [], 0
        for piece in self.pieces:
            if isinstance(piece, TextSpan):
                text_start = piece.start
                blocks += _text_blocks(piece)
            else:
                text = slice(text_start, text_start + piece.num_text)
                bias = _bias(piece.mask[:, piece.num_shared :])
                blocks.append(QueryBlock(slice(piece.start, piece.stop), text, bias))
        return blocks


def _text_blocks(text: TextSpan) -> list[QueryBlock]:
    causal = torch.ones(MAX_BLOCK_SLOTS, MAX_BLOCK_SLOTS, dtype=torch.bool, device="cpu").tril()
    blocks = []
    for start in range(text.start, text.stop, MAX_BLOCK_SLOTS):
        stop = min(start + MAX_BLOCK_SLOTS, text.stop)
        bias = _bias(causal[: stop - start, : stop - start])
        blocks.append(QueryBlock(slice(start, stop), slice(text.start, stop), bias))
    return blocks


def _bias(mask: Tensor) -> Tensor:
    """Boolean mask [Q, B] to additive mask, float32 [Q, 1, B], 0 or -inf."""
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]


def resolve_attention(name: str, device_type: str) -> str:
    """Resolve `model.attention=auto`: flex on an accelerator, split on the CPU.

    Raises:
        UserError: for flex on the CPU, where PyTorch has no backward pass for it.
    """
    if name == "auto":
        return "split" if device_type == "cpu" else "flex"
    if name == "flex" and device_type == "cpu":
        raise UserError("model.attention=flex cannot train on the CPU: choose model.attention=split (or auto)")
    return name


def attention_inputs(name: str, layout: SlotLayout) -> dict[str, Any]:
    """Keyword arguments of a causal LM's forward for attention over a chain layout.

    Args:
        name: dense | split | flex; the model must have been loaded with IMPLEMENTATIONS[name].
        layout: T slots of one pack, tensors of shape [T] on the model's device.
    """
    if name == "dense":
        return {"attention_mask": is_visible(layout, layout)[None, None]}  # [1, 1, T, T]
    if name == "split":
        return {"split_plan": SplitPlan(plan_split(layout))}
    return {"attention_mask": chain_block_mask(layout)}


def chain_block_mask(layout: SlotLayout) -> BlockMask:
    """FlexAttention's block mask of a pack, in O(T) memory plus a table of (T / 128)^2 blocks.

    PyTorch's `create_block_mask` evaluates all T * T pairs: gigabytes at 32k slots, at every step. But the visible
    slots are two runs: the text from the document's start to the anchor, and the chain up to the slot itself. The ends
    of a run give the blocks it touches and the blocks it covers. The kernel also masks pairs by these ends, which loads
    and compares less than the rule of `is_visible`.

    Args:
        layout: T slots, tensors [T]; the slots of a document are contiguous, and so are those of a chain.
    """
    slot = torch.arange(len(layout), device=layout.depth.device)
    is_first = torch.diff(layout.document, prepend=layout.document[:1] - 1) != 0
    start = torch.where(is_first, slot, 0).cummax(dim=0).values
    text_stop, chain_start, chain_stop = start + layout.anchor + 1, slot - layout.depth + 1, slot + 1
    text_from, text_to, chain_from = start.int(), text_stop.int(), chain_start.int()

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is visible to the query."""
        is_text = (key >= text_from[query]) & (key < text_to[query])
        return is_text | ((key >= chain_from[query]) & (key <= query))

    is_touched = _count_runs(start // FLEX_BLOCK, _ceil(text_stop)) > 0
    is_touched |= _count_runs(chain_start // FLEX_BLOCK, _ceil(chain_stop)) > 0
    is_full = _count_runs(_ceil(start), torch.maximum(_ceil(start), text_stop // FLEX_BLOCK)) == FLEX_BLOCK
    return BlockMask.from_kv_blocks(
        *_list_blocks(is_touched & ~is_full),
        *_list_blocks(is_full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(layout), len(layout)),
    )


def _ceil(slots: Tensor) -> Tensor:
    """Number of blocks that start before each slot."""
    return -(-slots // FLEX_BLOCK)


def _count_runs(first: Tensor, stop: Tensor) -> Tensor:
    """For each (query block, key block), how many of the block's slots have it in their run [first, stop): [N, N]."""
    row = torch.arange(len(first), device=first.device) // FLEX_BLOCK
    num_blocks = -(-len(first) // FLEX_BLOCK)
    edges = torch.zeros(num_blocks, num_blocks + 1, dtype=torch.int32, device=first.device)
    one = torch.ones_like(first, dtype=torch.int32)
    edges.index_put_((row, first), one, accumulate=True)
    edges.index_put_((row, stop), -one, accumulate=True)
    return edges.cumsum(dim=1)[:, :num_blocks]


def _list_blocks(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and column indices of the entries set in each row of a bool table; int32 [1, 1, N] and [1, 1, N, N]."""
    order = table.int().argsort(dim=1, descending=True, stable=True)
    return table.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]


def plan_split(layout: SlotLayout) -> list[TextSpan | ChainBlock]:
    """Cut a pack into the pieces of the split form, in slot order and covering every slot."""
    host = SlotLayout(layout.document.cpu().numpy(), layout.anchor.cpu().numpy(), layout.depth.cpu().numpy())
    starts = np.flatnonzero(np.diff(host.document, prepend=host.document[0] - 1))
    stops = np.append(starts[1:], len(host))
    plan: list[TextSpan | ChainBlock] = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        text_stop = start + int((host.depth[start:stop] == 0).sum())
        plan.append(TextSpan(start, text_stop))
        for block_start, block_stop in _chain_blocks(host.depth, text_stop, stop):
            num_shared, num_text = (int(host.anchor[slot]) + 1 for slot in (block_start, block_stop - 1))
            queries = np.arange(block_start, block_stop)
            keys = np.concatenate([np.arange(start, start + num_text), queries])
            mask = torch.from_numpy(is_visible(host[queries], host[keys])).to(layout.depth.device)
            plan.append(ChainBlock(block_start, block_stop, num_text, num_shared, mask))
    return plan


def _chain_blocks(depth: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Cut mask slots [start, stop) into blocks of whole chains, each close to MAX_BLOCK_SLOTS."""
    blocks = []
    while start < stop:
        end = min(start + MAX_BLOCK_SLOTS, stop)
        while end < stop and depth[end] != 1:  # a chain begins at depth 1
            end += 1
        blocks.append((start, end))
        start = end
    return blocks


@torch.compiler.disable  # the pieces differ in every pack
def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    split_plan: SplitPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of the split form, registered with `transformers` as `pard_split`.

    Args:
        query: [1, H, T, D].
        key, value: [1, H / G, T, D].
        split_plan: of the pack; None means an ordinary causal sequence.

    Returns:
        Output [1, T, H, D] and None for the attention weights.
    """
    if split_plan is not None and not dropout and query.dtype in BLOCK_DTYPES:
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (x[0].float() for x in (query, key, value))
            if takes_onednn(q, k):
                return attend_blocks(q, k, v, split_plan.blocks, scaling)[None].to(query.dtype), None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pieces = [TextSpan(0, query.shape[2])] if split_plan is None else split_plan.pieces
    # One split instead of slices: the backward pass of a slice allocates zeros for the whole pack.
    sizes = [piece.stop - piece.start for piece in pieces]
    outputs = []
    for piece, q, k, v in zip(pieces, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        if isinstance(piece, TextSpan):
            text_k, text_v = k, v  # [1, H, L, D], for the chains of this document that follow
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling)
        else:
            k = torch.cat([text_k[:, :, : piece.num_text], k], dim=2)  # [1, H, P + Q, D]
            v = torch.cat([text_v[:, :, : piece.num_text], v], dim=2)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=piece.mask, dropout_p=dropout, scale=scaling)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2), None  # [1, T, H, D]


AttentionInterface.register(IMPLEMENTATIONS["split"], split_attention)
