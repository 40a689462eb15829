"""Forward passes over growing texts with a KV cache whose rows advance independently.

The token at position p of a text is cached in column p of its row, and a query attends to the columns up to its own
position, in a layer with a sliding window to the last of them. Later columns (rejected draft tokens, mask tokens) are
masked, and overwritten when the text reaches them. So
nothing is cropped or padded, and the buffers keep their address, as graph capture requires. Rows with fewer new tokens
than others recompute some of their last tokens, which writes the same values again.

Two optimizations for CPUs: PyTorch repacks float32 weights at every product with more than one row, so verifying two
tokens costs twice a plain step; a `Runner` packs them once, through oneDNN. And the queries that share a key head are
folded into one, so that keys and values are not repeated.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pard_train.architectures import windows_of
from pard_train.core.cpu.products import OneDnnLinear, PackedLinear, can_pack
from pard_train.core.scores import Scoring, attend
from pard_train.layout import Window

# Legend: B rows (texts), N new tokens of each, C columns of the cache, H heads, G heads per key-value head, D head
# size, E size of a value, V vocabulary.

ATTENTION = "pard_cached"
PREFILL_ROWS = 256  # of a pass over a prompt in a model with windows: masks grow by them, not by the prompt
MAX_SHAPES = 64  # of all compiled runners of a process together; one more is an error instead of a slow step


class KVCache:
    """Keys and values of every layer, [B * C, H / G, D] and [B * C, H / G, E].

    Args:
        num_rows: B.
        num_columns: C.
        is_fixed: the buffers become part of captured graphs, which write to them in place.
    """

    def __init__(self, num_rows: int, num_columns: int, *, is_fixed: bool):
        self.num_rows, self.num_columns, self.is_fixed = num_rows, num_columns, is_fixed
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def allocate(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Allocate the buffers of a layer. They are zero: masked columns must still be finite."""
        num = self.num_rows * self.num_columns
        key_buffer, value_buffer = (like.new_zeros(num, like.shape[1], like.shape[3]) for like in (key, value))
        self.layers[layer] = key_buffer, value_buffer
        for buffer in self.layers[layer] if self.is_fixed else ():
            torch._dynamo.mark_static_address(buffer)

    def keep(self, rows: list[int]) -> None:
        """Keep some rows, in this order, and drop the others."""
        where = torch.tensor(rows)
        for layer, buffers in self.layers.items():
            keys, values = (b.view(self.num_rows, self.num_columns, *b.shape[1:])[where].flatten(0, 1) for b in buffers)
            self.layers[layer] = keys, values
        self.num_rows = len(rows)


class CacheView:
    """The part of the cache that one forward pass writes and attends to, passed to the attention of every layer.

    Args:
        cache: keys and values.
        first_row: the pass covers B rows from here.
        positions: int64 [B, N], consecutive in each row.
        num_columns: columns to attend to; those beyond a query's position are masked.
        is_prefill: every row starts at its first token, so plain causal attention is enough.
    """

    def __init__(self, cache: KVCache, first_row: int, positions: Tensor, num_columns: int, is_prefill: bool):
        self.cache, self.first_row, self.positions = cache, first_row, positions
        self.num_columns, self.is_prefill = num_columns, is_prefill
        rows = torch.arange(first_row, first_row + len(positions), device=positions.device)
        self.places = (rows[:, None] * cache.num_columns + positions).flatten()  # [B * N]
        self._masks: dict[tuple[Window, torch.device], Tensor] = {}  # shared by layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, [B, H / G, N, D]. Returns those to attend to, [B, H / G, C, D]."""
        if layer not in self.cache.layers:
            self.cache.allocate(layer, key, value)
        places, visible = self.places.to(key.device), []
        for buffer, new in zip(self.cache.layers[layer], (key, value), strict=True):
            buffer.index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))
            rows = buffer.view(self.cache.num_rows, self.cache.num_columns, *buffer.shape[1:])
            rows = rows[self.first_row : self.first_row + len(key), : self.num_columns]
            visible.append(rows.transpose(1, 2))
        return visible[0], visible[1]

    def mask_for(self, query: Tensor, groups: int, window: Window) -> Tensor:
        """Additive mask of a layer, 0 or -inf, [B, 1, G * N, C] in the dtype of the queries."""
        name = window, query.device
        if name not in self._masks:
            columns = torch.arange(self.num_columns, device=query.device)
            distance = self.positions.to(query.device)[:, :, None] - columns  # [B, N, C]
            is_hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            mask = torch.zeros(is_hidden.shape, dtype=query.dtype, device=query.device)
            self._masks[name] = mask.masked_fill_(is_hidden, -torch.inf).repeat(1, groups, 1)[:, None]
        return self._masks[name]


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache_view: CacheView,
    **layer: Any,
) -> tuple[Tensor, None]:
    """Attention function of a runner, registered with `transformers` as `pard_cached`.

    Args:
        module: the layer's attention, which has its index.
        query: [B, H, N, D].
        key, value: of the new tokens, [B, H / G, N, D].
        cache_view: where keys and values are written and read.
        layer: what `Scoring.of` reads.

    Returns:
        Output [B, N, H, D] and None for the attention weights.
    """
    batch, heads, num_new, size = query.shape
    how = Scoring.of(layer)
    groups = heads // key.shape[1]
    key, value = cache_view.update(module.layer_idx, key, value)  # type: ignore[arg-type]  # an int
    if cache_view.is_prefill and (how.window is None or num_new <= how.window):
        out = attend(query, key, value, how, is_causal=num_new > 1)
    else:
        folded = query.reshape(batch, heads // groups, groups * num_new, size)  # the heads of a key head in sequence
        if how.sinks is not None:
            how = replace(how, sinks=how.sinks.repeat_interleave(num_new))
        out = attend(folded, key, value, how, cache_view.mask_for(query, groups, how.window))
    return out.reshape(batch, heads, num_new, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, cached_attention)


class Runner:
    """A copy of a model's structure over the same weights, with cached attention. The model itself does not change.

    Args:
        model: a causal LM of a supported architecture.
        is_packed: keep a second, packed copy of the weights of linear layers; None does so where `can_pack`.
        is_compiled: run steps through `torch.compile` with graph capture (mode reduce-overhead). Every batch size, K
            and power of two of columns compiles once, which takes seconds to minutes. Only one `DecodingBatch` at a
            time may be in use, because all share the captured buffers.
    """

    def __init__(self, model: PreTrainedModel, *, is_packed: bool | None = None, is_compiled: bool = False):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval()
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        self.is_fused = windows_of(model.config) == (None,)  # PyTorch's causal kernel, without a mask, takes any length
        if is_packed is None:
            is_packed = not is_compiled and can_pack(model.get_input_embeddings().weight)
        for name, module in list(self.model.named_modules()) if is_packed else []:
            if type(module) in (nn.Linear, OneDnnLinear):  # a subclass, such as a router, computes something else
                self.model.set_submodule(name, PackedLinear(module))
        self.is_packed, self.is_compiled = is_packed, is_compiled
        self._step = self._forward_all
        if is_compiled:
            self._step = torch.compile(self._forward_all, mode="reduce-overhead", dynamic=False, fullgraph=True)
        self._caches: dict[int, KVCache] = {}  # by B, of a compiled runner: captured graphs hold their addresses

    def start(self, num_rows: int, max_length: int, *, width: int, num_logits: int) -> DecodingBatch:
        """Start B texts.

        Args:
            num_rows: B.
            max_length: tokens of the longest text, draft or mask tokens included.
            width: most new tokens of a step after the prefill; a compiled runner always computes that many.
            num_logits: most logits that such a step returns.
        """
        if not self.is_compiled:
            return DecodingBatch(self, KVCache(num_rows, max_length, is_fixed=False), width, num_logits)
        cache = self._caches.get(num_rows)
        if cache is None or cache.num_columns < max_length:
            cache = self._caches[num_rows] = KVCache(num_rows, 1 << (max_length - 1).bit_length(), is_fixed=True)
        return DecodingBatch(self, cache, width, num_logits)

    def forward(self, ids: Tensor, positions: Tensor, cache_view: CacheView, num_logits: int) -> Tensor:
        """Logits of the last positions, [B, num_logits, V], of tokens [B, N]."""
        return self.model(
            ids, position_ids=positions, use_cache=False, logits_to_keep=num_logits, cache_view=cache_view
        ).logits

    def _forward_all(self, cache: KVCache, ids: Tensor, positions: Tensor, num_logits: int) -> Tensor:
        """The same over all rows and columns: shapes that never change."""
        return self.forward(ids, positions, CacheView(cache, 0, positions, cache.num_columns, False), num_logits)

    def step(self, cache: KVCache, ids: Tensor, positions: Tensor, num_logits: int) -> Tensor:
        """One captured forward pass over all rows."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return self._step(cache, ids, positions, num_logits)


class DecodingBatch:
    """B texts on a runner: each call computes the tokens of each text that are not in the cache yet."""

    def __init__(self, runner: Runner, cache: KVCache, width: int, num_logits: int):
        self.runner, self.cache, self.width, self.num_logits = runner, cache, width, num_logits
        self._cached: list[list[int]] = [[] for _ in range(cache.num_rows)]  # tokens in the cache
        self._num_text = [0] * cache.num_rows  # how many of them are text; draft and mask tokens follow
        self._rows = list(range(cache.num_rows))  # of the texts

    @torch.inference_mode()
    def extend(self, texts: list[list[int]], extras: list[list[int]], num_logits: int | None = None) -> Tensor:
        """Logits after each text, and after each of its extra tokens.

        Args:
            texts: B texts, each that of the previous call or longer.
            extras: draft or mask tokens after each. The next call discards them, unless the text continues with them.
            num_logits: positions at the end to return logits of; None for 1 + the most extra tokens.

        Returns:
            [B, num_logits, V], aligned at the end. The first entries of rows with fewer are undefined.
        """
        wanted = 1 + max(map(len, extras)) if num_logits is None else num_logits
        whole = [text + extra for text, extra in zip(texts, extras, strict=True)]
        missing = [len(ids) - self._num_reusable(row, ids) for row, ids in zip(self._rows, whole, strict=True)]
        num_new = max(wanted, *missing)
        lengths = set(map(len, whole))
        is_step = num_new <= self.width and num_new <= min(lengths)
        if self.runner.is_compiled and is_step and min(map(len, self._cached)) >= self.width <= min(lengths):
            logits = self._forward_captured(dict(zip(self._rows, whole, strict=True)))[:, -wanted:]
        elif not self.runner.is_compiled and (is_step or (self.runner.is_fused and lengths == {num_new})):
            logits = self._forward_rows(0, whole, num_new, wanted)
        else:
            rows = zip(self._rows, whole, missing, strict=True)
            logits = torch.cat([self._prefill_row(row, ids, max(wanted, num), wanted) for row, ids, num in rows])
        for row, text, ids in zip(self._rows, texts, whole, strict=True):
            self._cached[row], self._num_text[row] = ids, len(text)
        return logits

    def keep(self, which: list[int]) -> None:
        """Continue with some of the texts. A compiled runner, whose shapes are fixed, goes on computing the others."""
        self._rows = [self._rows[i] for i in which]
        if not self.runner.is_compiled:
            self.cache.keep(self._rows)
            self._cached = [self._cached[row] for row in self._rows]
            self._num_text = [self._num_text[row] for row in self._rows]
            self._rows = list(range(len(which)))

    def _num_reusable(self, row: int, ids: list[int]) -> int:
        """Leading tokens that are already in the row's cache."""
        num, cached = self._num_text[row], self._cached[row]
        while num < min(len(cached), len(ids)) and cached[num] == ids[num]:
            num += 1
        return num

    def _prefill_row(self, row: int, ids: list[int], num_new: int, num_logits: int) -> Tensor:
        """One row alone: a prompt, or a text shorter than the step of the others. [1, num_logits, V]"""
        num_new = min(num_new, len(ids))
        while not self.runner.is_fused and num_new - num_logits > PREFILL_ROWS:
            self._forward_rows(row, [ids[: len(ids) - num_new + PREFILL_ROWS]], PREFILL_ROWS, 1)
            num_new -= PREFILL_ROWS
        logits = self._forward_rows(row, [ids], num_new, min(num_logits, num_new))
        return F.pad(logits, (0, 0, num_logits - logits.shape[1], 0))

    def _forward_rows(self, first_row: int, whole: list[list[int]], num_new: int, num_logits: int) -> Tensor:
        """The last tokens of consecutive rows: [B, num_logits, V]."""
        ids, positions = self._tail(whole, num_new)
        lengths = {len(ids) for ids in whole}
        view = CacheView(self.cache, first_row, positions, max(lengths), is_prefill=lengths == {num_new})
        return self.runner.forward(ids, positions, view, num_logits)

    def _forward_captured(self, whole: dict[int, list[int]]) -> Tensor:
        """The last `width` tokens of every row, finished ones included: [B, num_logits, V]."""
        rows = [whole.get(row, cached) for row, cached in enumerate(self._cached)]
        ids, positions = self._tail(rows, self.width)
        return self.runner.step(self.cache, ids, positions, self.num_logits)[list(whole)]

    def _tail(self, whole: list[list[int]], num_new: int) -> tuple[Tensor, Tensor]:
        """The last tokens of some texts and their positions, int64 [B, N] each."""
        ids = torch.tensor([ids[len(ids) - num_new :] for ids in whole], device=self.runner.device)
        ends = torch.tensor([len(ids) for ids in whole], device=self.runner.device)
        return ids, ends[:, None] + torch.arange(-num_new, 0, device=self.runner.device)
