"""Training examples for people: check rows, print one with its loss mask and slots, draw its attention pattern."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from pard_train.config import Config, DataConfig
from pard_train.data.chat import ChatEncoder, Document, Pieces
from pard_train.data.encoding import encode_chat, source_of
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
from pard_train.data.rows import OnBadRow, Row, read_rows, stop
from pard_train.data.schemas import to_chat
from pard_train.data.store import is_store, open_store
from pard_train.errors import RowError, UserError
from pard_train.layout import DrawKey
from pard_train.model import Base, inspect_base


def read_documents(
    data: DataConfig, encoder: ChatEncoder, first: int, end: int | None, on_bad_row: OnBadRow | None = None
) -> Iterator[Document]:
    """Documents of the rows first .. end - 1 of `data.source`, counting bad ones; end=None reads all.

    A bad row goes to `on_bad_row`. Without it, `data.bad_rows` decides between RowError and skipping.
    """
    if on_bad_row is None:
        on_bad_row = stop if data.bad_rows == "error" else lambda error, row: None
    if is_store(data.source):
        store = open_store(data, encoder)
        yield from (replace(store[number], is_rendered=False) for number in range(len(store))[first:end])
        return
    for row, origin in islice(_read_rows(data, on_bad_row), first, end):
        if row is None:
            continue
        try:
            found = encode_chat(to_chat(row, source_of(data), origin), encoder, origin)
        except RowError as error:
            on_bad_row(error, "")
        else:
            pieces = [document for document in found if isinstance(document, Pieces)]
            yield from (encoder.tokenize(pieces) if pieces else cast(Sequence[Document], found))


def _read_rows(data: DataConfig, on_bad_row: OnBadRow) -> Iterator[tuple[Row | None, str]]:
    """(row, origin) of every row; None for one that cannot be read."""
    bad: list[str] = []

    def note(error: RowError, raw: str) -> None:
        bad.append(error.origin)
        on_bad_row(error, raw)

    for row, origin in read_rows(source_of(data), note):
        yield from ((None, place) for place in bad)  # those before this row
        bad.clear()
        yield row, origin


class Faults:
    """Error callback that counts bad rows by reason."""

    def __init__(self) -> None:
        self.first: RowError | None = None
        self._counts: Counter[str] = Counter()
        self._origins: dict[str, str] = {}  # of the first row per reason

    def __call__(self, error: RowError, row: str) -> None:
        self.first = self.first or error
        kind = re.sub(r"token \d+ differs.*", "the text has other tokens when it is tokenized whole", error.reason)
        self._counts[kind] += 1
        self._origins.setdefault(kind, error.origin)

    def lines(self) -> list[str]:
        """One line per reason, the most frequent first, with the first row that has it."""
        return [f"bad rows: {n:,} x {kind} (first: {self._origins[kind]})" for kind, n in self._counts.most_common()]


def show_examples(config: Config, console: Console | None = None) -> None:
    """Check rows, then print one: its loss mask, its slots and, on request, a picture of its attention pattern.

    Raises UserError if the row does not exist or is unusable, or the checks fail.
    """
    data, number = config.data, config.show.row
    base = inspect_base(config.model, config.draft)
    encoder = ChatEncoder(base.tokenizer, data.template_kwargs)
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    faults = Faults()
    checked = read_documents(data, encoder, 0, config.show.num_checked or None, faults)
    counts = check_examples(checked, encoder, data, on_bad_row=faults)
    console.print(f"checked: {summary(counts, data)}", *faults.lines(), legend(), sep="\n")
    if faults.first is not None and data.bad_rows == "error":
        raise faults.first
    documents = list(read_documents(data, encoder, number, number + 1))
    if not documents:
        raise UserError(f"show.row={number}: {data.source} has no such row (the first is 0), or it is unusable")
    for document in documents:
        console.print(Text(f"\n{document.origin}", "bold"))
        console.print(summary(count_supervised(document, encoder, data), data))
        _show(cut(document, data), config, base, encoder, console)


def _show(document: Document, config: Config, base: Base, encoder: ChatEncoder, console: Console) -> None:
    """Print the text and the slots of a document, and draw the attention pattern where its first answer begins."""
    draft, key = config.draft, DrawKey(config.seed, 0, config.show.row)
    lay_out = partial(lay_out_slots, draft=draft, objective=config.objective, mask_token_id=base.mask_token_id, key=key)
    slots = lay_out(document)
    console.print(slots.summary(draft), render_text(document, encoder), sep="\n")
    console.print(slot_table(slots, base.tokenizer))
    if config.show.picture:
        path = Path(config.show.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"attention pattern where the first answer of {Path(document.origin).name} begins"
        draw_pattern(lay_out(shorten(document, draft, key)), base.tokenizer, title).savefig(path, dpi=120)
        console.print(path)
