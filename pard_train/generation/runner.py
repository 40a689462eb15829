"""A model made ready to decode: it reads growing texts row by row, and keeps their keys and values in slots.

The token at position p of a text stands in slot p of its row, and a query sees the slots up to its own position. What a
later slot still holds (a refused draft token, a mask token) is never seen, and is overwritten when the text gets there.
So nothing is cropped or padded, rows advance at their own pace, and the buffers never move, as graph capture wants it.

Rows that have fewer new tokens than others read some of their last tokens again, which writes what is there already.

Two things make it fast on a CPU. PyTorch's matrix product copies float32 weights into blocks at every call if there is
more than one row, so verifying two tokens costs twice a plain step; a `Runner` arranges them once, through oneDNN. And
queries that share a key head are folded into one, so that keys and values are never repeated.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pard_train.core.cpu.products import PackedLinear, can_pack

# Legend: B rows (texts), N tokens read of each, S slots of a row, H heads, G heads per key-value head, D head size,
#         V vocabulary.

ATTENTION = "pard_slots"
MAX_SHAPES = 64  # that all compiled runners of a process may have together; one more is an error, not a slow step


class Slots:
    """Keys and values of every layer, [B * S, H / G, D] each, and where one forward pass writes and looks.

    Args:
        num_rows: B.
        num_slots: S.
        is_fixed: the buffers will be part of captured graphs, which write to them in place.
    """

    def __init__(self, num_rows: int, num_slots: int, *, is_fixed: bool):
        self.num_rows, self.num_slots, self.is_fixed = num_rows, num_slots, is_fixed
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def allocate(self, layer: int, like: Tensor) -> None:
        """Make the buffers of a layer. They are zero: what no text has reached is masked, but must be finite."""
        shape = (self.num_rows * self.num_slots, like.shape[1], like.shape[3])
        self.layers[layer] = like.new_zeros(shape), like.new_zeros(shape)
        for buffer in self.layers[layer] if self.is_fixed else ():
            torch._dynamo.mark_static_address(buffer)

    def keep(self, rows: list[int]) -> None:
        """Move some rows together, and drop the others."""
        where = torch.tensor(rows)
        for layer, buffers in self.layers.items():
            keys, values = (b.view(self.num_rows, self.num_slots, *b.shape[1:])[where].flatten(0, 1) for b in buffers)
            self.layers[layer] = keys, values
        self.num_rows = len(rows)


class Reading:
    """One forward pass over some rows of the slots, handed to the attention function of every layer.

    Args:
        slots: what is written to and looked at.
        first_row: B rows from this one on are read.
        positions: int64 [B, N], consecutive in each row.
        num_seen: slots of each row that are looked at; all beyond the largest position are masked.
        is_from_start: whether every row is read from its first token on, so that plain causal attention will do.
    """

    def __init__(self, slots: Slots, first_row: int, positions: Tensor, num_seen: int, is_from_start: bool):
        self.slots, self.first_row, self.positions = slots, first_row, positions
        self.num_seen, self.is_from_start = num_seen, is_from_start
        rows = torch.arange(first_row, first_row + len(positions), device=positions.device)
        self.places = (rows[:, None] * slots.num_slots + positions).flatten()  # [B * N]
        self._mask: Tensor | None = None  # the same in every layer

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put in the new keys and values, [B, H / G, N, D]; all that the rows may look at, [B, H / G, S, D]."""
        if layer not in self.slots.layers:
            self.slots.allocate(layer, key)
        places, seen = self.places.to(key.device), []
        for buffer, new in zip(self.slots.layers[layer], (key, value), strict=True):
            buffer.index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))
            rows = buffer.view(self.slots.num_rows, self.slots.num_slots, *buffer.shape[1:])
            rows = rows[self.first_row : self.first_row + len(key), : self.num_seen]
            seen.append(rows.transpose(1, 2))
        return seen[0], seen[1]

    def mask_for(self, query: Tensor, groups: int) -> Tensor:
        """Zero where a query sees a key and minus infinity elsewhere, [B, 1, G * N, S], in the type of the queries."""
        if self._mask is None or self._mask.device != query.device:
            seen = torch.arange(self.num_seen, device=query.device)
            is_hidden = seen > self.positions.to(query.device)[:, :, None]  # [B, N, S]
            mask = torch.zeros(is_hidden.shape, dtype=query.dtype, device=query.device)
            self._mask = mask.masked_fill_(is_hidden, -torch.inf).repeat(1, groups, 1)[:, None]
        return self._mask


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    reading: Reading,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of a runner, registered with `transformers` as `pard_slots`.

    Args:
        module: the layer's attention, which knows its number.
        query: [B, H, N, D].
        key: of the new tokens, [B, H / G, N, D].
        value: [B, H / G, N, D].
        reading: where the keys and values go, and what is looked at.

    Returns:
        Output [B, N, H, D] and None for the attention weights.
    """
    batch, heads, num_new, size = query.shape
    groups = heads // key.shape[1]
    key, value = reading.write(module.layer_idx, key, value)  # type: ignore[arg-type]  # an int
    if reading.is_from_start:
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=num_new > 1, scale=scaling, enable_gqa=groups > 1
        )
    else:
        folded = query.reshape(batch, heads // groups, groups * num_new, size)  # heads of one key head, one by one
        mask = reading.mask_for(query, groups)
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, num_new, size).transpose(1, 2), None


AttentionInterface.register(ATTENTION, slot_attention)


class Runner:
    """A copy of a model's structure over its own weights, with attention over slots. The model itself is not touched.

    Args:
        model: Llama, Qwen2 or Qwen3 style causal LM.
        is_packed: keep a second, arranged copy of the weights of its linear layers; None does so where `can_pack`.
        is_compiled: run steps through `torch.compile` with graph capture (mode reduce-overhead). Every batch size, K
            and power of two of slots compiles once, which takes from seconds to minutes. One reader at a time may be
            at work, because all of them share the captured buffers.
    """

    def __init__(self, model: PreTrainedModel, *, is_packed: bool | None = None, is_compiled: bool = False):
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval()
        self.model.set_attn_implementation(ATTENTION)
        self.device = model.device
        if is_packed is None:
            is_packed = not is_compiled and can_pack(model.get_input_embeddings().weight)
        for name, module in list(self.model.named_modules()) if is_packed else []:
            if isinstance(module, nn.Linear):
                self.model.set_submodule(name, PackedLinear(module))
        self.is_packed, self.is_compiled = is_packed, is_compiled
        self._step = self._forward
        if is_compiled:
            self._step = torch.compile(self._forward, mode="reduce-overhead", dynamic=False, fullgraph=True)
        self._slots: Slots | None = None  # of a compiled runner: captured graphs know their address

    def start(self, num_rows: int, num_slots: int, *, width: int, num_logits: int) -> Reader:
        """Begin B texts.

        Args:
            num_rows: B.
            num_slots: tokens of the longest text, its extra tokens included.
            width: most tokens that a step after the first has to read; a compiled runner always reads that many.
            num_logits: most logits asked of such a step.
        """
        if not self.is_compiled:
            return Reader(self, Slots(num_rows, num_slots, is_fixed=False), width=width, num_logits=num_logits)
        slots = self._slots
        if slots is None or slots.num_rows != num_rows or slots.num_slots < num_slots:
            self._slots = slots = Slots(num_rows, 1 << (num_slots - 1).bit_length(), is_fixed=True)
        return Reader(self, slots, width=width, num_logits=num_logits)

    def forward(self, ids: Tensor, positions: Tensor, reading: Reading, num_logits: int) -> Tensor:
        """Logits of the last places, [B, num_logits, V], of tokens [B, N]."""
        return self.model(
            ids, position_ids=positions, use_cache=False, logits_to_keep=num_logits, reading=reading
        ).logits

    def _forward(self, slots: Slots, ids: Tensor, positions: Tensor, num_logits: int) -> Tensor:
        """The same over all rows and all slots: shapes that never change."""
        return self.forward(ids, positions, Reading(slots, 0, positions, slots.num_slots, False), num_logits)

    def step(self, slots: Slots, ids: Tensor, positions: Tensor, num_logits: int) -> Tensor:
        """One captured forward pass over all rows."""
        torch.compiler.cudagraph_mark_step_begin()
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return self._step(slots, ids, positions, num_logits)


class Reader:
    """A runner at work on B texts: reads what is new in each, whatever it has read before."""

    def __init__(self, runner: Runner, slots: Slots, *, width: int, num_logits: int):
        self.runner, self.slots, self.width, self.num_logits = runner, slots, width, num_logits
        self._held: list[list[int]] = [[] for _ in range(slots.num_rows)]  # what stands in the slots
        self._num_text = [0] * slots.num_rows  # how much of that is text, and so stays
        self._rows = list(range(slots.num_rows))  # where the texts stand

    @torch.inference_mode()
    def read(self, texts: list[list[int]], extras: list[list[int]], num_logits: int | None = None) -> Tensor:
        """Logits after each text, and after each of its extra tokens.

        Args:
            texts: B texts, each the one of the call before or longer.
            extras: what may follow each: draft tokens, or mask tokens. They are forgotten afterwards, unless the text
                turns out to go on with them.
            num_logits: places at the end that logits are wanted of; None for 1 + the most extra tokens.

        Returns:
            [B, num_logits, V], aligned at the end. The first places of rows that have fewer are meaningless.
        """
        wanted = 1 + max(map(len, extras)) if num_logits is None else num_logits
        whole = [text + extra for text, extra in zip(texts, extras, strict=True)]
        unread = [len(ids) - self._num_read(row, ids) for row, ids in zip(self._rows, whole, strict=True)]
        num_new = max(wanted, *unread)
        lengths = set(map(len, whole))
        is_step = num_new <= self.width and num_new <= min(lengths)
        if self.runner.is_compiled and is_step and min(map(len, self._held)) >= self.width <= min(lengths):
            logits = self._read_captured(dict(zip(self._rows, whole, strict=True)))[:, -wanted:]
        elif not self.runner.is_compiled and (is_step or lengths == {num_new}):
            logits = self._read_rows(0, whole, num_new, wanted)
        else:
            rows = zip(self._rows, whole, unread, strict=True)
            logits = torch.cat([self._read_row(row, ids, max(wanted, num), wanted) for row, ids, num in rows])
        for row, text, ids in zip(self._rows, texts, whole, strict=True):
            self._held[row], self._num_text[row] = ids, len(text)
        return logits

    def keep(self, which: list[int]) -> None:
        """Go on with some of the texts only. A compiled runner's shapes stay, so it goes on reading the others too."""
        self._rows = [self._rows[i] for i in which]
        if not self.runner.is_compiled:
            self.slots.keep(self._rows)
            self._held = [self._held[row] for row in self._rows]
            self._num_text = [self._num_text[row] for row in self._rows]
            self._rows = list(range(len(which)))

    def _num_read(self, row: int, ids: list[int]) -> int:
        """Tokens at the beginning that stand in the row's slots already."""
        num, held = self._num_text[row], self._held[row]
        while num < min(len(held), len(ids)) and held[num] == ids[num]:
            num += 1
        return num

    def _read_row(self, row: int, ids: list[int], num_new: int, num_logits: int) -> Tensor:
        """One row by itself: a prompt, or a text too short for the others' pace. [1, num_logits, V]"""
        num_new = min(num_new, len(ids))
        logits = self._read_rows(row, [ids], num_new, min(num_logits, num_new))
        return F.pad(logits, (0, 0, num_logits - logits.shape[1], 0))

    def _read_rows(self, first_row: int, whole: list[list[int]], num_new: int, num_logits: int) -> Tensor:
        """The last tokens of neighbouring rows: [B, num_logits, V]."""
        ids, positions = self._tail(whole, num_new)
        lengths = {len(ids) for ids in whole}
        is_from_start = lengths == {num_new}
        reading = Reading(self.slots, first_row, positions, max(lengths), is_from_start)
        return self.runner.forward(ids, positions, reading, num_logits)

    def _read_captured(self, whole: dict[int, list[int]]) -> Tensor:
        """The last `width` tokens of every row, finished ones included: [B, num_logits, V]."""
        rows = [whole.get(row, held) for row, held in enumerate(self._held)]
        ids, positions = self._tail(rows, self.width)
        return self.runner.step(self.slots, ids, positions, self.num_logits)[list(whole)]

    def _tail(self, whole: list[list[int]], num_new: int) -> tuple[Tensor, Tensor]:
        """The last tokens of some texts and their positions, int64 [B, N] each."""
        ids = torch.tensor([ids[len(ids) - num_new :] for ids in whole], device=self.runner.device)
        ends = torch.tensor([len(ids) for ids in whole], device=self.runner.device)
        return ids, ends[:, None] + torch.arange(-num_new, 0, device=self.runner.device)
