"""Attention over a chain layout, in three forms with the same result.

dense   one boolean mask over the whole pack, through PyTorch's SDPA. Quadratic in slots: the oracle.
split   per document: causal attention over the text; mask slots in short blocks over [their text prefix | their own
        chains]. No mask is larger than one block by one document. The CPU form, in float32 by `block_attention` where
        oneDNN is used.
flex    FlexAttention with a block mask: the kernel skips blocks without visible pairs. The GPU form.

A layer with a sliding window has a mask of its own. The masks of all windows are a keyword argument of the model's
forward; `transformers` passes it to the attention functions below, with the window, cap and sinks of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface
from transformers.integrations.flex_attention import flex_attention_forward

from pard_train.core.block_mask import chain_block_mask
from pard_train.core.cpu.block_attention import QueryBlock, attend_blocks
from pard_train.core.cpu.products import takes_onednn
from pard_train.core.scores import Scoring, attend
from pard_train.errors import UserError
from pard_train.layout import SlotLayout, Window, is_visible, lay_out_text

# Legend: T slots of the pack, Q queries of a block, P text tokens that a block attends to, H heads, G heads per
# key-value head, D head size.

IMPLEMENTATIONS = {"dense": "pard_dense", "split": "pard_split", "flex": "pard_flex"}  # ours -> transformers' name
BLOCK_DTYPES = (torch.float32, torch.bfloat16)  # that `block_attention` computes in float32, faster in both cases
MAX_BLOCK_SLOTS = 128  # slots per block of the split form; smaller blocks mask less and have more overhead


@dataclass(frozen=True)
class TextSpan:
    """The real tokens of one document: slots [start, stop)."""

    start: int
    stop: int


@dataclass(frozen=True)
class ChainBlock:
    """Whole chains of one document: slots [start, stop) attend to some of its text tokens and to themselves."""

    start: int
    stop: int
    text: slice  # P tokens, counted from the start of the document
    num_shared: int  # the first of these, which are visible to all of the slots
    mask: Tensor  # bool [Q, P + Q]


class SplitPlan:
    """The pieces of a pack, in slot order and covering every slot.

    A class, because `torch.compile` specializes on lists that pass through a model and would recompile for each.
    """

    def __init__(self, pieces: list[TextSpan | ChainBlock], window: Window = None):
        self.pieces, self.window = pieces, window

    @cached_property
    def blocks(self) -> list[QueryBlock]:
        """The pieces with the text in blocks too; computed by the first layer and used by all."""
        blocks, text_start = [], 0
        for piece in self.pieces:
            if isinstance(piece, TextSpan):
                text_start = piece.start
                blocks += _text_blocks(piece, self.window)
            else:
                text = slice(text_start + piece.text.start, text_start + piece.text.stop)
                bias = _bias(piece.mask[:, piece.num_shared :])
                blocks.append(QueryBlock(slice(piece.start, piece.stop), text, bias))
        return blocks


def _text_blocks(text: TextSpan, window: Window) -> list[QueryBlock]:
    blocks = []
    for start in range(text.start, text.stop, MAX_BLOCK_SLOTS):
        stop = min(start + MAX_BLOCK_SLOTS, text.stop)
        first, masked = text.start, start  # all keys from the first to the masked ones are visible to all queries
        if window is not None and stop - text.start > window:
            first = masked = max(text.start, start - window + 1)
        queries, keys = (lay_out_text(torch.arange(a, stop, device="cpu")) for a in (start, masked))
        bias = _bias(is_visible(queries, keys, window))
        blocks.append(QueryBlock(slice(start, stop), slice(first, stop), bias))
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


def attention_inputs(name: str, layout: SlotLayout, windows: tuple[Window, ...] = (None,)) -> dict[str, Any]:
    """Keyword arguments of a causal LM's forward for attention over a chain layout.

    Args:
        name: dense | split | flex; the model must have been loaded with IMPLEMENTATIONS[name].
        layout: T slots of one pack, tensors of shape [T] on the model's device.
        windows: from `architectures.windows_of`.
    """
    forms: dict[str, Callable[..., Any]]
    forms = {"dense": partial(is_visible, layout), "split": plan_split, "flex": chain_block_mask}
    return {"chain_masks": {window: forms[name](layout, window) for window in windows}}


def plan_split(layout: SlotLayout, window: Window = None) -> SplitPlan:
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
            queries, first = np.arange(block_start, block_stop), 0
            if window is not None and host.position[queries].max() >= window:
                first, num_shared = max(0, int(host.position[queries].min()) - window + 1), 0
            keys = np.concatenate([np.arange(start + first, start + num_text), queries])
            mask = torch.from_numpy(is_visible(host[queries], host[keys], window)).to(layout.depth.device)
            plan.append(ChainBlock(block_start, block_stop, slice(first, num_text), num_shared, mask))
    return SplitPlan(plan, window)


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


def _dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chain_masks: dict[Window, Tensor],
    **layer: Any,
) -> tuple[Tensor, None]:
    """Attention function of the dense form, registered with `transformers` as `pard_dense`: as `split_attention`."""
    how = Scoring.of(layer)
    return attend(query, key, value, how, chain_masks[how.window]).transpose(1, 2).contiguous(), None


def _flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chain_masks: dict[Window, BlockMask],
    **layer: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of the flex form, registered as `pard_flex`: that of `transformers`, which has no dropout."""
    mask, layer["dropout"] = chain_masks[layer.get("sliding_window")], 0.0
    return flex_attention_forward(module, query, key, value, mask, **layer)


@torch.compiler.disable  # the pieces differ in every pack
def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    chain_masks: dict[Window, SplitPlan] | None = None,
    **layer: Any,
) -> tuple[Tensor, None]:
    """Attention function of the split form, registered with `transformers` as `pard_split`.

    Args:
        query: [1, H, T, D].
        key, value: [1, H / G, T, D].
        chain_masks: plans of the pack by window; None means an ordinary causal sequence.
        layer: what `Scoring.of` reads.

    Returns:
        Output [1, T, H, D] and None for the attention weights.
    """
    how = Scoring.of(layer)
    plan = chain_masks[how.window] if chain_masks else SplitPlan([TextSpan(0, query.shape[2])], how.window)
    if how.is_plain and not how.dropout and query.device.type == "cpu" and query.dtype in BLOCK_DTYPES:
        with torch.autocast("cpu", enabled=False):
            q, k, v = (x[0].float() for x in (query, key, value))
            if takes_onednn(q, k):
                return attend_blocks(q, k, v, plan.blocks, how.scaling)[None].to(query.dtype), None
    if how.is_plain and plan.window is None:
        return _attend_pieces(query, key, value, plan.pieces, how), None
    outputs = []
    for block in plan.blocks:
        keys, values = (block.keys_of(x[0])[None] for x in (key, value))
        bias = nn.functional.pad(block.bias[:, 0], (keys.shape[2] - block.bias.shape[-1], 0)).to(query)  # [Q, N]
        outputs.append(attend(query[:, :, block.queries], keys, values, how, bias))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: list[TextSpan | ChainBlock], how: Scoring
) -> Tensor:
    """Output [1, T, H, D] piece by piece, through PyTorch's fused kernels."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # One split instead of slices: the backward pass of a slice allocates zeros for the whole pack.
    sizes = [piece.stop - piece.start for piece in pieces]
    outputs = []
    for piece, q, k, v in zip(pieces, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True):
        if isinstance(piece, TextSpan):
            text_k, text_v = k, v  # [1, H, L, D], for the chains of this document that follow
            out = attend(q, k, v, how, is_causal=True)
        else:
            k = torch.cat([text_k[:, :, piece.text], k], dim=2)  # [1, H, P + Q, D]
            v = torch.cat([text_v[:, :, piece.text], v], dim=2)
            out = attend(q, k, v, how, piece.mask)
        outputs.append(out)
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


AttentionInterface.register(IMPLEMENTATIONS["dense"], _dense_attention)
AttentionInterface.register(IMPLEMENTATIONS["split"], split_attention)
AttentionInterface.register(IMPLEMENTATIONS["flex"], _flex_attention)
