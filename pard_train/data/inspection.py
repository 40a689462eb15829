"""Inspect training examples: counts, colored text with the loss mask, a table of slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pard_train.config import DataConfig, DraftConfig, ObjectiveConfig
from pard_train.core.objectives import slot_weights
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.rows import OnBadRow, stop
from pard_train.errors import RowError, UserError
from pard_train.layout import (
    IGNORE_INDEX,
    DrawKey,
    SlotLayout,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
    slot_tokens,
    supervised_runs,
)

# Legend: L tokens of one document, T slots.

STYLES = {
    "prompt": "dim",
    "special": "dim cyan",
    "supervised": "green",
    "supervised special": "bold cyan",
    "end of turn": "bold white on magenta",
    "end missing": "bold white on red",
}
_SYMBOLS = {"\n": "↵\n", "\t": "⇥   "}
_JOINERS = "\u200c\u200d"  # invisible, but what they join is not: Persian words, families of emoji

TABLE_SLOTS = 12  # text slots and mask slots shown in a table
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level BPE


# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


def count_supervised(document: Document, encoder: ChatEncoder, data: DataConfig) -> Counter[str]:
    """Counts of one document, which add up: documents, overlong, tokens, supervised, turns, ended."""
    kept, end_ids = cut(document, data), _end_ids(encoder)
    runs = supervised_runs(kept.loss_mask)
    return Counter(
        documents=1,
        overlong=int(len(document.input_ids) > data.max_length),
        tokens=len(kept.input_ids),
        supervised=int(kept.loss_mask.sum()),
        turns=len(runs),
        ended=sum(_is_ended(kept, run, end_ids) for run in runs),
    )


def summary(counts: Counter[str], data: DataConfig) -> str:
    """One line of the counts of `count_supervised`."""
    return (
        f"documents {counts['documents']:,} ({counts['overlong']:,} longer than data.max_length={data.max_length}, "
        f"data.overlong={data.overlong})   tokens {counts['tokens']:,}   supervised {counts['supervised']:,}   "
        f"turns {counts['turns']:,} ({counts['ended']:,} with their end)"
    )


def cut(document: Document, data: DataConfig) -> Document:
    """The document as data.overlong=truncate leaves it."""
    return part_of(document, slice(data.max_length)) if data.overlong == "truncate" else document


def part_of(document: Document, tokens: slice) -> Document:
    """Some of a document's tokens."""
    return replace(document, input_ids=document.input_ids[tokens], loss_mask=document.loss_mask[tokens])


def check_examples(
    documents: Iterable[Document], encoder: ChatEncoder, data: DataConfig, *, on_bad_row: OnBadRow = stop
) -> Counter[str]:
    """Check that documents have supervised tokens, ends of turns, and the tokens of their text tokenized whole.

    Returns the sum of `count_supervised`. Raises UserError if no token is supervised, or no end of a turn. A document
    whose text has other tokens goes to `on_bad_row`.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        if document.is_rendered and len(document.input_ids) != data.max_length:  # else it may be cut within a word
            try:
                check_pieces(document, encoder)
            except RowError as error:
                on_bad_row(error, "")
                continue
        counts.update(count_supervised(document, encoder, data))
    if not counts["supervised"]:
        raise UserError(
            f"data.source: no supervised token in {counts['documents']:,} documents, so there is no loss: "
            "rows need answers (assistant turns)"
        )
    if not counts["ended"]:
        raise UserError(
            f"data.source: all {counts['turns']:,} answers are cut, so a draft cannot learn where a turn ends: "
            "regenerate with a larger regenerate.max_new_tokens, or raise data.max_length"
        )
    return counts


def check_pieces(document: Document, encoder: ChatEncoder) -> None:
    """Check that a document's text has the same tokens when it is tokenized whole, as an engine does with a history.

    Raises RowError, naming the first token that differs and the text around it, both ways.
    """
    ids = document.input_ids.tolist()
    whole = encoder.tokenizer(_decode(ids, encoder.tokenizer), add_special_tokens=False)["input_ids"]
    if ids == whole:
        return
    place = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    around = slice(max(0, place - 2), place + 3)
    label, engine = (" ".join(quoted(token, encoder.tokenizer) for token in tokens[around]) for tokens in (ids, whole))
    raise RowError(
        document.origin,
        f"token {place} differs when the text is tokenized whole: it is {label}, an engine reads {engine}; strip "
        "line ends and spaces from both ends of the row's answers",
    )


def _is_ended(document: Document, run: np.ndarray, end_ids: list[int]) -> bool:
    first, stop = run
    return document.input_ids[max(first, stop - len(end_ids)) : stop].tolist() == end_ids


def _end_ids(encoder: ChatEncoder) -> list[int]:
    return encoder.tokenizer(encoder.end_of_turn, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def render_text(document: Document, encoder: ChatEncoder) -> Text:
    """A document as colored text (see STYLES): every second token is underlined, and invisible characters are shown.

    Tokens that hold parts of one character are shown together. A supervised turn without its end is marked.
    """
    text = Text()
    for number, (kind, piece) in enumerate(_pieces(document, encoder)):
        text.append(visible(piece), STYLES[kind] + (" underline" if number % 2 else ""))
    return text


def legend() -> Text:
    """One line that explains the styles of `render_text`."""
    kinds = [Text(kind, style) for kind, style in STYLES.items()]
    return Text("  ").join([*kinds, Text("2nd token", "underline")])


def visible(text: str) -> str:
    """Text that is safe in a terminal: line ends and tabs as symbols, other invisible characters as codes.

    >>> visible("a\\tb\\x1b")
    'a⇥   b<U+001B>'
    """
    return "".join(_SYMBOLS.get(c) or (c if c.isprintable() or c in _JOINERS else f"<U+{ord(c):04X}>") for c in text)


def _pieces(document: Document, encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(kind, text) of every token, or of the few tokens that hold one character."""
    kinds, without_end = _kinds(document, encoder)
    held: list[int] = []
    for place, token in enumerate(document.input_ids.tolist()):
        held.append(token)
        text = _decode(held, encoder.tokenizer)
        is_last = place + 1 == len(kinds) or kinds[place + 1] != kinds[place]
        if text.endswith("\ufffd") and not is_last and len(held) < 4:  # UTF-8 takes up to four bytes
            continue
        yield kinds[place], text
        held = []
        if place in without_end:
            yield "end missing", "[end missing]"


def _kinds(document: Document, encoder: ChatEncoder) -> tuple[list[str], set[int]]:
    """The kind of every token [L], and the last tokens of turns that do not end."""
    end_ids = _end_ids(encoder)
    special = np.isin(document.input_ids, list(encoder.tokenizer.added_tokens_decoder))
    kinds = np.where(document.loss_mask, "supervised", "prompt").astype(object)
    kinds[special] = np.where(document.loss_mask[special], "supervised special", "special")
    without_end = set()
    for run in supervised_runs(document.loss_mask):
        if _is_ended(document, run, end_ids):
            kinds[run[1] - len(end_ids) : run[1]] = "end of turn"
        else:
            without_end.add(int(run[1]) - 1)
    return kinds.tolist(), without_end


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of tokens; an id without a tokenizer entry is that of the mask token."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) or "<mask>"


def quoted(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of one token in quotes; part of a character as its bytes, such as '\\xf0\\x9f'."""
    text = _decode([token], tokenizer)
    if "\ufffd" not in text:
        return repr(text)
    letters = tokenizer.convert_ids_to_tokens(token)  # one for each byte
    return repr(bytes(_BYTES[letter] for letter in letters)).removeprefix("b")


# ---------------------------------------------------------------------------------------------------------------------
# Slots
# ---------------------------------------------------------------------------------------------------------------------


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
        return (
            f"slots {len(self):,} at K={draft.num_draft_tokens}, retention {draft.retention_ratio:g} to "
            f"{draft.min_retention:g}   {len(self) / max(num_labels, 1):.1f} per supervised token"
        )


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
        Text(_decode([token], tokenizer), "yellow") if layout.depth[slot] else Text(quoted(token, tokenizer)),
        *(Text(str(int(part[slot]))) for part in (layout.anchor, layout.depth, layout.position)),
        Text("-", "dim") if label == IGNORE_INDEX else Text(quoted(label, tokenizer), "green"),
        Text(f"{slots.weights[slot]:.3g}"),
    ]
