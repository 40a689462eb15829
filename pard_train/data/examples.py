"""Training examples for people: check rows, print one with its loss mask and slots, draw its attention pattern."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pard_train.config import Config, DataConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import source_of
from pard_train.data.inspection import (
    check_examples,
    count_supervised,
    cut,
    lay_out_slots,
    legend,
    render_text,
    slot_table,
    summary,
)
from pard_train.data.pattern import draw_pattern, shorten
from pard_train.data.rows import Row, read_rows, stop
from pard_train.data.schemas import to_chat
from pard_train.data.store import is_store, open_store
from pard_train.errors import RowError, UserError
from pard_train.layout import DrawKey
from pard_train.model import Base, inspect_base


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


def show_examples(config: Config, console: Console | None = None) -> None:
    """Check rows, then print one: its loss mask, its slots and, on request, a picture of its attention pattern.

    Raises:
        UserError: if the row does not exist or is unusable, or the checks fail.
    """
    data, number = config.data, config.show.row
    base = inspect_base(config.model, config.draft)
    encoder = ChatEncoder(base.tokenizer, data.template_kwargs)
    counts = check_examples(read_documents(data, encoder, 0, config.show.num_checked or None), encoder, data)
    documents = list(read_documents(data, encoder, number, number + 1))
    if not documents:
        raise UserError(f"show.row={number}: {data.source} has no such row (the first is 0), or it is unusable")
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"checked: {summary(counts, data)}", legend(), sep="\n")
    for document in documents:
        console.print(Text(f"\n{document.origin}", "bold"))
        console.print(summary(count_supervised(document, encoder, data), data))
        _show(cut(document, data), config, base, encoder, console)


def _show(document: Document, config: Config, base: Base, encoder: ChatEncoder, console: Console) -> None:
    """Print the text and the slots of a document, and draw the attention pattern where its first answer begins."""
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
        title = f"attention pattern where the first answer of {Path(document.origin).name} begins"
        draw_pattern(lay_out(shorten(document, config.draft, key)), base.tokenizer, title).savefig(path, dpi=120)
        console.print(path)
