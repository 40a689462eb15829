"""Training examples for people: check rows, print one with its loss mask and slots, draw its attention pattern."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console

from pard_train.config import Config, DataConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import source_of
from pard_train.data.inspection import (
    lay_out_slots,
    render_text,
    slot_table,
)
from pard_train.data.pattern import draw_pattern, shorten
from pard_train.data.rows import Row, read_rows, stop
from pard_train.data.schemas import to_chat
from pard_train.data.store import is_store, open_store
from pard_train.errors import RowError
from pard_train.layout import DrawKey
from pard_train.model import Base


def read_documents(data: DataConfig, encoder: ChatEncoder, first: int, end: int | None) -> Iterator[Document]:
    """Documents of the rows first .. end - 1 of `data.source`, counted as they stand there. Raises UserError."""
    if is_store(data.source):
        store = open_store(data, encoder)
        yield from (store[number] for number in range(len(store))[first:end])
        return
    for row, origin in islice(_read_rows(data), first, end):
        if row is None:
            continue
        try:
            chat = to_chat(row, source_of(data), origin)
            is_cut = chat.finish_reason == "length"
            documents = encoder.encode(chat.messages, origin=origin, is_cut=is_cut, tools=chat.tools)
        except RowError:
            if data.bad_rows == "error":
                raise
        else:
            yield from documents


def _read_rows(data: DataConfig) -> Iterator[tuple[Row | None, str]]:
    """(row, origin) of every row; None for one that cannot be read, where training goes on after it (set_aside)."""
    bad: list[str] = []
    on_bad_row = stop if data.bad_rows == "error" else lambda error, raw: bad.append(error.origin)
    for row, origin in read_rows(source_of(data), on_bad_row):
        yield from ((None, place) for place in bad)  # those that stand before this row
        bad.clear()
        yield row, origin


def show(document: Document, config: Config, base: Base, encoder: ChatEncoder, console: Console) -> None:
    """Print the text and the slots of a document, and draw who sees whom where its first answer begins."""
    key = DrawKey(config.seed, 0, config.show.row)
    lay_out = partial(
        lay_out_slots, draft=config.draft, objective=config.objective, mask_token_id=base.mask_token_id, key=key
    )
    slots = lay_out(document)
    console.print(slots.summary(config.draft), render_text(document, encoder), sep="\n")
    console.print(slot_table(slots, base.tokenizer))
    if config.show.picture:
        path = Path(config.show.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"who sees whom where the first answer of {Path(document.origin).name} begins"
        draw_pattern(lay_out(shorten(document, config.draft, key)), base.tokenizer, title).savefig(path, dpi=120)
        console.print(path)
