"""FlexAttention's block mask of a pack."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pard_train.layout import SlotLayout, Window

# Legend: T slots of the pack, N blocks of FlexAttention.

FLEX_BLOCK = 128  # slots per block, FlexAttention's default


def chain_block_mask(layout: SlotLayout, window: Window = None) -> BlockMask:
    """FlexAttention's block mask of a pack, in O(T) memory plus a table of (T / 128)^2 blocks.

    PyTorch's `create_block_mask` evaluates all T * T pairs: gigabytes at 32k slots, at every step. But the visible
    slots are two runs: the text from the document's start to the anchor, and the chain up to the slot itself. The ends
    of a run give the blocks it touches and the blocks it covers. The kernel also masks pairs by these ends, which loads
    and compares less than the rule of `is_visible`.

    Args:
        layout: T slots, tensors [T]; the slots of a document are contiguous, and so are those of a chain.
        window: of the layer, at least K tokens, so that a chain is visible as a whole.
    """
    slot = torch.arange(len(layout), device=layout.depth.device)
    is_first = torch.diff(layout.document, prepend=layout.document[:1] - 1) != 0
    start = torch.where(is_first, slot, 0).cummax(dim=0).values
    text_start = start if window is None else torch.maximum(start, start + layout.position - window + 1)
    text_stop, chain_start, chain_stop = start + layout.anchor + 1, slot - layout.depth + 1, slot + 1
    text_from, text_to, chain_from = text_start.int(), text_stop.int(), chain_start.int()

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether the key is visible to the query."""
        is_text = (key >= text_from[query]) & (key < text_to[query])
        return is_text | ((key >= chain_from[query]) & (key <= query))

    is_touched = _count_runs(text_start // FLEX_BLOCK, _ceil(text_stop)) > 0
    is_touched |= _count_runs(chain_start // FLEX_BLOCK, _ceil(chain_stop)) > 0
    first_whole = _ceil(text_start)
    is_full = _count_runs(first_whole, torch.maximum(first_whole, text_stop // FLEX_BLOCK)) == FLEX_BLOCK
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
