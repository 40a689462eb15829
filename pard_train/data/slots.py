"""Slots of one document for people: a table, and a picture of their attention pattern."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from rich.cells import set_cell_size
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

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
from pard_train.transplant import BYTE_OF_CHAR

# Legend: T slots.

PATTERN_SLOTS = 64  # of a picture, which a terminal has room for
PATTERN_PROMPT = 6  # tokens of the prompt in a picture
PATTERN = {"text": ("■", "blue"), "own chain": ("▲", "yellow"), "itself": ("●", "bold"), "hidden": ("·", "dim")}
NAME_CELLS = 16  # width of a slot's name in a picture
TABLE_SLOTS = 12  # text slots and mask slots shown in a table


def decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of tokens; an id without a tokenizer entry is that of the mask token."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) or "<mask>"


def quoted(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of one token in quotes; part of a character as its bytes, such as '\\xf0\\x9f'."""
    text = decode([token], tokenizer)
    letters = tokenizer.convert_ids_to_tokens(token)  # of byte-level BPE one for each byte
    if "\ufffd" not in text or not BYTE_OF_CHAR.keys() >= {*letters}:
        return repr(text)
    return repr(bytes(BYTE_OF_CHAR[letter] for letter in letters)).removeprefix("b")


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
    """What each key slot is to each query slot, a key of PATTERN: str [T, T]."""
    seen = np.where(layout.depth[None, :] == 0, "text", "own chain")
    pattern = np.where(is_visible(layout, layout), seen, "hidden")
    np.fill_diagonal(pattern, "itself")
    return pattern


def pattern_text(slots: Slots, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Who sees whom: a line per query slot, with a mark per key slot and the slot's label behind.

    A mask slot has the name of its anchor's token and its depth.
    """
    text = Text("attention pattern:")
    for kind, (mark, style) in PATTERN.items():
        text.append(f"  {mark} {kind}", style)
    for slot, kinds in enumerate(attention_pattern(slots.layout).tolist()):
        anchor, depth, label = slots.layout.anchor[slot], slots.layout.depth[slot], int(slots.labels[slot])
        name = quoted(int(slots.tokens[anchor]), tokenizer) + (f" +{depth}" if depth else "")
        text.append(f"\n{set_cell_size(name, NAME_CELLS)} ")
        for kind in kinds:
            text.append(*PATTERN[kind])
        text.append("" if label == IGNORE_INDEX else f" {quoted(label, tokenizer)}", "green")
    return text
