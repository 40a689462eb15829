"""Inspect training examples: check rows, print one with its loss mask, slots and attention pattern."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError, safe_open

from pard_train.config import Config, DataConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import encode_chat, source_of
from pard_train.data.rows import OnBadRow, Row, read_rows, stop
from pard_train.data.schemas import to_chat
from pard_train.data.slots import decode, lay_out_slots, pattern_text, quoted, shorten, slot_table
from pard_train.data.store import is_store, open_store
from pard_train.errors import RowError, UserError
from pard_train.layout import IGNORE_INDEX, DrawKey, supervised_runs
from pard_train.model import Base, inspect_base

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
            pieces = encode_chat(to_chat(row, source_of(data), origin), encoder, origin)
        except RowError as error:
            on_bad_row(error, "")
        else:
            yield from encoder.tokenize(pieces)


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


def count_supervised(document: Document, encoder: ChatEncoder, data: DataConfig) -> Counter[str]:
    """Counts of one document, which add up: documents, overlong, tokens, supervised, turns, ended."""
    kept = cut(document, data)
    runs = supervised_runs(kept.loss_mask)
    counts = {"documents": 1, "overlong": int(len(document.input_ids) > data.max_length), "tokens": len(kept.input_ids)}
    ended = sum(_is_ended(kept, run, encoder.end_ids) for run in runs)
    return Counter(**counts, supervised=int(kept.loss_mask.sum()), turns=len(runs), ended=ended)


def summary(counts: Counter[str], data: DataConfig) -> str:
    """One line of the counts of `count_supervised`."""
    return (
        f"documents {counts['documents']:,} ({counts['overlong']:,} longer than data.max_length={data.max_length}, "
        f"data.overlong={data.overlong})   tokens {counts['tokens']:,}   supervised {counts['supervised']:,}   "
        f"turns {counts['turns']:,} ({counts['ended']:,} with their end)"
    )


def cut(document: Document, data: DataConfig) -> Document:
    """The document as data.overlong=truncate leaves it."""
    return document.part(slice(data.max_length)) if data.overlong == "truncate" else document


def check_examples(
    documents: Iterable[Document], encoder: ChatEncoder, data: DataConfig, *, on_bad_row: OnBadRow = stop
) -> Counter[str]:
    """Check that documents have supervised tokens, ends of turns, and the tokens of their text tokenized whole.

    Returns the sum of `count_supervised`. Raises UserError if no token is supervised, or no end of a turn. A document
    whose text has other tokens goes to `on_bad_row`.
    """
    counts: Counter[str] = Counter()
    for document in documents:
        if document.is_rendered:
            try:
                check_pieces(document, encoder)
            except RowError as error:
                on_bad_row(error, "")
                continue
        counts.update(count_supervised(document, encoder, data))
    if not counts["supervised"]:
        raise UserError(f"data.source: no supervised token in {counts['documents']:,} documents: rows need answers")
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
    whole = encoder.tokenizer(decode(ids, encoder.tokenizer), add_special_tokens=False)["input_ids"]
    if ids == whole:
        return
    place = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
    around = slice(max(0, place - 2), place + 3)
    label, engine = (" ".join(quoted(token, encoder.tokenizer) for token in tokens[around]) for tokens in (ids, whole))
    problem = f"token {place} differs when the text is tokenized whole: it is {label}, an engine reads {engine}"
    raise RowError(document.origin, f"{problem}; strip line ends and spaces from both ends of the row's answers")


def _is_ended(document: Document, run: np.ndarray, end_ids: list[int]) -> bool:
    first, stop = run
    return document.input_ids[max(first, stop - len(end_ids)) : stop].tolist() == end_ids


def render_text(document: Document, encoder: ChatEncoder) -> Text:
    """A document as colored text (see STYLES), every second token underlined, with marks for missing ends of turns."""
    text = Text()
    for number, (kind, piece) in enumerate(_pieces(document, encoder)):
        text.append(visible(piece), STYLES[kind] + (" underline" if number % 2 else ""))
    return text


def visible(text: str, symbols: Mapping[str, str] = _SYMBOLS) -> str:
    """Text that is safe in a terminal: line ends and tabs as they are or as symbols, other invisible ones as codes.

    >>> visible("a\\tb\\x1b")
    'a⇥   b<U+001B>'
    """
    shown = {"\n": "\n", "\t": "\t", **symbols}
    return "".join(shown.get(c) or (c if c.isprintable() or c in _JOINERS else f"<U+{ord(c):04X}>") for c in text)


def _pieces(document: Document, encoder: ChatEncoder) -> Iterator[tuple[str, str]]:
    """(kind, text) of every token, or of the few tokens that hold one character."""
    kinds, without_end = _kinds(document, encoder)
    held: list[int] = []
    for place, token in enumerate(document.input_ids.tolist()):
        held.append(token)
        text = decode(held, encoder.tokenizer)
        is_last = place + 1 == len(kinds) or kinds[place + 1] != kinds[place]
        if text.endswith("\ufffd") and not is_last and len(held) < 4:  # UTF-8 takes up to four bytes
            continue
        yield kinds[place], text
        held = []
        if place in without_end:
            yield "end missing", "[end missing]"


def _kinds(document: Document, encoder: ChatEncoder) -> tuple[list[str], set[int]]:
    """The kind of every token [L], and the last tokens of turns that do not end."""
    special = np.isin(document.input_ids, list(encoder.tokenizer.added_tokens_decoder))
    kinds = np.where(document.loss_mask, "supervised", "prompt").astype(object)
    kinds[special] = np.where(document.loss_mask[special], "supervised special", "special")
    without_end = set()
    for run in supervised_runs(document.loss_mask):
        if _is_ended(document, run, encoder.end_ids):
            kinds[run[1] - len(encoder.end_ids) : run[1]] = "end of turn"
        else:
            without_end.add(int(run[1]) - 1)
    return kinds.tolist(), without_end


def show_examples(config: Config, console: Console | None = None) -> None:
    """Check rows, then print one: its loss mask, its slots and, on request, its attention pattern.

    Raises UserError if the row does not exist or is unusable, or the checks fail.
    """
    data, number = config.data, config.show.row
    base = inspect_base(config.model, config.draft)
    encoder = ChatEncoder(base.tokenizer, data.template_kwargs)
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if config.show.pack:
        _show_pack(Path(config.show.pack), encoder, console)
        return
    faults = Faults()
    checked = read_documents(data, encoder, 0, config.show.num_checked or None, faults)
    counts = check_examples(checked, encoder, data, on_bad_row=faults)
    legend = Text("  ").join([*(Text(kind, style) for kind, style in STYLES.items()), Text("2nd token", "underline")])
    console.print(f"checked: {summary(counts, data)}", *faults.lines(), legend, sep="\n")
    if faults.first is not None and data.bad_rows == "error":
        raise faults.first
    documents = list(read_documents(data, encoder, number, number + 1))
    if not documents:
        raise UserError(f"show.row={number}: {data.source} has no such row (the first is 0), or it is unusable")
    for document in documents:
        console.print(Text(f"\n{document.origin}", "bold"))
        console.print(summary(count_supervised(document, encoder, data), data))
        _show(cut(document, data), config, base, encoder, console)


def _show_pack(file: Path, encoder: ChatEncoder, console: Console) -> None:
    """Print the documents of a pack that made a bad step: weights, and what is NaN or infinite in each."""
    try:
        with safe_open(file, "numpy") as opened:
            pack = {name: opened.get_tensor(name) for name in opened.offset_keys()}
            facts = json.loads(opened.metadata()["pack"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"show.pack={file} holds no pack of a bad step ({error}): give RUN/bad_packs/NAME") from error
    origins, first = facts.pop("origins"), 0
    console.print(facts)
    for number, origin in enumerate(origins):
        is_mine = pack["document"][0] == number
        ids, labels, depth, weight = (pack[name][0][is_mine] for name in ("input_ids", "labels", "depth", "weight"))
        is_text, is_supervised = depth == 0, labels != IGNORE_INDEX
        logprobs = pack.get("teacher_logprobs", np.zeros((1, 0, 0)))[0, first : (first := first + is_supervised.sum())]
        bad = int((~np.isfinite(weight)).sum() + (~np.isfinite(logprobs)).sum())
        mask = np.concatenate([[False], is_supervised[is_text][:-1]])
        console.print(Text(f"\n{origin}", "bold"), f"{is_supervised.sum()} supervised slots", sep="\n")
        console.print(f"{bad} weights and teacher scores that are NaN or infinite")
        console.print(render_text(Document(ids[is_text].astype(np.int32), mask, origin), encoder))


def _show(document: Document, config: Config, base: Base, encoder: ChatEncoder, console: Console) -> None:
    """Print the text and the slots of a document, and the attention pattern where its first answer begins."""
    draft, key = config.draft, DrawKey(config.seed, 0, config.show.row)
    lay_out = partial(lay_out_slots, draft=draft, objective=config.objective, mask_token_id=base.mask_token_id, key=key)
    slots = lay_out(document)
    console.print(slots.summary(draft), render_text(document, encoder), sep="\n")
    console.print(slot_table(slots, base.tokenizer))
    if config.show.picture:
        console.print(pattern_text(lay_out(shorten(document, draft, key)), base.tokenizer))
