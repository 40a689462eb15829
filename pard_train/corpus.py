"""Reading chats: from a JSONL file or a `datasets` source to tokenized documents, with file:line in every error."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm

from pard_train.chat import ChatEncoder, Document
from pard_train.config import DataConfig
from pard_train.errors import UserError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json")


@dataclass
class Corpus:
    """Tokenized documents and what became of the rows.

    Attributes:
        documents: in source order.
        num_rows: rows read.
        num_dropped: documents left out for being longer than data.max_length.
        num_truncated: documents cut to data.max_length.
    """

    documents: list[Document]
    num_rows: int = 0
    num_dropped: int = 0
    num_truncated: int = 0

    def summary(self) -> str:
        """One line of counts."""
        tokens = sum(len(d.input_ids) for d in self.documents)
        supervised = sum(int(d.loss_mask.sum()) for d in self.documents)
        return (
            f"{self.num_rows:,} rows -> {len(self.documents):,} documents, {tokens:,} tokens, {supervised:,} supervised"
            f" ({self.num_dropped:,} overlong dropped, {self.num_truncated:,} truncated)"
        )


def is_file_source(source: str) -> bool:
    """Whether a source is a file rather than the name of a data set."""
    return source.endswith(FILE_SUFFIXES) or Path(source).is_file()


def read_jsonl(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, "file:line") of every non-blank line.

    Raises:
        UserError: if the file is missing, is not UTF-8, or a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as lines:
        for number, line in enumerate(_whole_lines(lines, path), start=1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{origin}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{origin}: not a JSON line ({error.msg} at column {error.colno})") from error
            except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
                raise UserError(f"{origin}: not a JSON line ({error})") from error
            if not isinstance(row, dict):
                raise UserError(f"{origin}: a row must be a JSON object, found {type(row).__name__}")
            yield row, origin


def _whole_lines(lines: BinaryIO | gzip.GzipFile, path: Path) -> Iterator[bytes]:
    """Lines of a file; a damaged gzip file becomes a UserError."""
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error


def read_rows(source: str, split: str = "train", subset: str | None = None) -> Iterator[tuple[dict[str, Any], str]]:
    """(row, origin) of every row of a JSONL file or a `datasets` source. Raises UserError."""
    if is_file_source(source):
        yield from read_jsonl(source)
        return
    import datasets

    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except (FileNotFoundError, ValueError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise UserError(
            f"data source {source!r} (split {split!r}) is neither a .jsonl file nor a data set that can be loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for index, row in enumerate(dataset):
        yield row, f"{source}[{split}][{index}]"


def load_corpus(config: DataConfig, encoder: ChatEncoder, *, show_progress: bool = True) -> Corpus:
    """Read and tokenize the training data.

    Raises:
        UserError: at the first bad row, naming file and line; if the source has no rows; or if nothing is left.
    """
    corpus = Corpus([])
    rows = tqdm(
        read_rows(config.source, config.split, config.subset), desc="tokenize", unit="row", disable=not show_progress
    )
    for row, origin in rows:
        corpus.num_rows += 1
        if "messages" not in row:
            raise UserError(f"{origin}: no field `messages`; found {', '.join(map(str, row)) or 'nothing'}")
        is_cut = row.get("finish_reason") == "length"
        for document in encoder.encode(row["messages"], origin=origin, is_cut=is_cut):
            _keep(document, config, corpus)
    if not corpus.documents:
        raise UserError(
            f"data.source={config.source}: nothing to train on in {corpus.num_rows} rows "
            f"({corpus.num_dropped} dropped as longer than data.max_length={config.max_length})"
        )
    return corpus


def _keep(document: Document, config: DataConfig, corpus: Corpus) -> None:
    """Add a document to the corpus, or do with an overlong one what data.overlong says."""
    length = len(document.input_ids)
    if length <= config.max_length:
        corpus.documents.append(document)
    elif config.overlong == "drop":
        corpus.num_dropped += 1
    elif config.overlong == "truncate":
        mask = document.loss_mask[: config.max_length]
        if not mask.any():  # the prompt alone fills the window
            corpus.num_dropped += 1
            return
        corpus.num_truncated += 1
        corpus.documents.append(Document(document.input_ids[: config.max_length], np.array(mask), document.origin))
    else:
        raise UserError(
            f"{document.origin}: {length} tokens, but data.max_length={config.max_length}; raise data.max_length "
            "(and data.slot_budget), or set data.overlong=drop or data.overlong=truncate"
        )
