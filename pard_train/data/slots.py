"""Slots of one document for people: a table, and a picture of their attention pattern."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core.objectives import slot_weights
from pard_train.data.chat import Document
from pard_train.layout import (
    IGNORE_INDEX,
    DrawKey,
    SlotLayout,
    is_visible,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
    slot_tokens,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Legend: T slots.

PATTERN_SLOTS = 64  # cells along a picture's edge that can still be told apart
PATTERN_PROMPT = 6  # tokens of the prompt in a picture
HIDDEN, TEXT, OWN_CHAIN, SELF = range(4)
PATTERN_COLORS = {HIDDEN: "#f1f1ee", TEXT: "#8fb8de", OWN_CHAIN: "#f2a65a", SELF: "#2f3e4e"}
TABLE_SLOTS = 12  # text slots and mask slots shown in a table
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of tokens; an id without a tokenizer entry is that of the mask token."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) or "<mask>"


def quoted(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of one token in quotes; part of a character as its bytes, such as '\\xf0\\x9f'."""
    text = decode([token], tokenizer)
    if "\ufffd" not in text:
        return repr(text)
    letters = tokenizer.convert_ids_to_tokens(token)  # one for each byte
    return repr(bytes(_BYTES[letter] for letter in letters)).removeprefix("b")


@dataclass(frozen=True)
class Slots:
    """Training positions of one document for one COD draw."""

    layout: SlotLayout
    tokens: np.ndarray  # int [T], input ids
    labels: np.ndarray  # int [T], IGNORE_INDEX where nothing is supervised
    weights: np.ndarray  # float32 [T]

    def __len__(self) -> int:
        return len(self.layout)

    def summary(self, draft: DraftConfig) -> str:
        """One line: number of slots, in all and per supervised token."""
        num_labels = int(((self.labels != IGNORE_INDEX) & (self.layout.depth == 0)).sum())
        cod = f"K={draft.num_draft_tokens}, retention {draft.retention_ratio:g} to {draft.min_retention:g}"
        return f"slots {len(self):,} at {cod}   {len(self) / max(num_labels, 1):.1f} per supervised token"


def lay_out_slots(
    document: Document, draft: DraftConfig, objective: ObjectiveConfig, *, mask_token_id: int, key: DrawKey
) -> Slots:
    """Draw the chains of one document and lay out its slots."""
    layout = lay_out_document(sample_chain_lengths(document.loss_mask, draft, key))
    labels = slot_labels(layout, document.input_ids, document.loss_mask)
    weights = slot_weights(torch.from_numpy(layout.depth), torch.from_numpy(labels), objective)
    return Slots(layout, slot_tokens(layout, document.input_ids, mask_token_id), labels, weights.numpy())


def slot_table(slots: Slots, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Table of the slots where supervision begins: some of the text, then the first chains, one section each."""
    num_text = int((slots.layout.depth == 0).sum())
    first_anchor = int(np.argmax(slots.labels != IGNORE_INDEX))
    start = max(0, min(first_anchor - 3, num_text - TABLE_SLOTS))
    text = range(start, min(start + TABLE_SLOTS, num_text))
    masks = range(num_text, min(num_text + TABLE_SLOTS, len(slots)))
    caption = f"{len(text)} of {num_text:,} text slots, {len(masks)} of {len(slots) - num_text:,} mask slots"
    table = Table(caption=caption)
    for name in ("slot", "token", "anchor", "depth", "position", "label", "weight"):
        table.add_column(name, justify="left" if name in ("token", "label") else "right", no_wrap=True)
    chains = groupby(masks, key=lambda slot: slots.layout.anchor[slot])
    for section in (text, *(list(chain) for _, chain in chains)):
        for slot in section:
            table.add_row(*_cells(slots, slot, tokenizer))
        table.add_section()
    return table


def _cells(slots: Slots, slot: int, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    layout, token, label = slots.layout, int(slots.tokens[slot]), int(slots.labels[slot])
    return [
        Text(str(slot), "dim"),
        Text(decode([token], tokenizer), "yellow") if layout.depth[slot] else Text(quoted(token, tokenizer)),
        *(Text(str(int(part[slot]))) for part in (layout.anchor, layout.depth, layout.position)),
        Text("-", "dim") if label == IGNORE_INDEX else Text(quoted(label, tokenizer), "green"),
        Text(f"{slots.weights[slot]:.3g}"),
    ]


def shorten(document: Document, draft: DraftConfig, key: DrawKey) -> Document:
    """The part of a document where supervision begins, short enough for a picture of PATTERN_SLOTS slots."""
    first = int(np.argmax(document.loss_mask))
    start = max(0, first - PATTERN_PROMPT)
    stops = range(min(len(document.input_ids), start + PATTERN_SLOTS), first, -1)
    for part in (document.part(slice(start, stop)) for stop in stops):
        if len(part.input_ids) + sample_chain_lengths(part.loss_mask, draft, key).sum() <= PATTERN_SLOTS:
            return part
    raise AssertionError("the prompt and one supervised token fit")


def attention_pattern(layout: SlotLayout) -> np.ndarray:
    """Relation of each query slot to each key slot, int [T, T]: HIDDEN, TEXT, OWN_CHAIN or SELF."""
    seen = np.where(layout.depth[None, :] == 0, TEXT, OWN_CHAIN)
    pattern = np.where(is_visible(layout, layout), seen, HIDDEN)
    np.fill_diagonal(pattern, SELF)
    return pattern


def draw_pattern(slots: Slots, tokenizer: PreTrainedTokenizerBase, title: str) -> Figure:
    """Picture of the attention pattern of a short document: one cell per pair, rows see columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    side = 3 + 0.15 * len(slots)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.imshow(attention_pattern(slots.layout), cmap=ListedColormap(list(PATTERN_COLORS.values())), vmin=0, vmax=3)
    _name_cells(axis, slots, tokenizer)
    _frame_blocks(axis, slots.layout)
    _explain_colors(axis)
    figure.suptitle(title)
    return figure


def _name_cells(axis: Axes, slots: Slots, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tokens along both sides, `token +depth` for the mask slots of its chain; labels on the right."""
    layout, places = slots.layout, range(len(slots))
    tokens = [_label(slots.tokens[a], tokenizer) for a in layout.anchor]  # text slots stand first, in order
    names = [f"{token} +{depth}" if depth else token for token, depth in zip(tokens, layout.depth, strict=True)]
    labels = ["" if label == IGNORE_INDEX else _label(label, tokenizer) for label in slots.labels]
    style: dict[str, Any] = {"fontsize": 7, "family": "monospace", "parse_math": False}
    axis.set_xticks(places, names, rotation=90, **style)
    axis.set_yticks(places, names, **style)
    right = axis.secondary_yaxis("right")
    right.set_yticks(places, labels, color="#2e7d32", **style)
    right.set_ylabel("label", color="#2e7d32")
    for side in (axis, right):
        side.tick_params(length=0)
    axis.set(xlabel="key slot", ylabel="query slot")


def _label(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Short name of a token in characters that the font has."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("monospace"))
    text = quoted(int(token), tokenizer)[1:-1].replace(" ", "\u00b7")
    text = text if len(text) <= 14 else text[:13] + "\u2026"
    return "".join(c if font.get_char_index(ord(c)) else "\u25a1" for c in text)


def _frame_blocks(axis: Axes, layout: SlotLayout) -> None:
    """White lines between cells, a dark one between text and chains, thin ones between chains."""
    edges = np.arange(len(layout) + 1) - 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="minor", length=0)
    num_text = int((layout.depth == 0).sum())
    for place in np.flatnonzero(layout.depth == 1):  # where a chain begins
        for line in (axis.axhline, axis.axvline):
            line(place - 0.5, color=PATTERN_COLORS[SELF], linewidth=1.6 if place == num_text else 0.5)
    for name, start, stop in (("text", 0, num_text), ("chains of masks", num_text, len(layout))):
        if stop > start:
            axis.text((start + stop - 1) / 2, -1.2, name, ha="center", va="bottom", fontsize=9)


def _explain_colors(axis: Axes) -> None:
    from matplotlib.patches import Patch

    names = {TEXT: "real text", OWN_CHAIN: "own chain", SELF: "itself", HIDDEN: "not visible"}
    patches = [Patch(facecolor=PATTERN_COLORS[code], label=name) for code, name in names.items()]
    axis.legend(handles=patches, loc="lower left", bbox_to_anchor=(0, 1.04), ncols=4, frameon=False, fontsize=8)
