"""Rows of files and data sets with their origins. A bad row stops the program or is set aside.

Columnar files give every struct the fields of all rows: those that a row did not have are null, as in a tool's
arguments those of other tools. Such nulls are left out below the columns; text that is JSON keeps its own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from pard_train.config import SourceConfig
from pard_train.errors import RowError, UserError, first_line

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")  # each also with .gz
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it

Row = dict[str, Any]
OnBadRow = Callable[[RowError, str], None]  # error callback: the error, and the row as text; returning skips the row


def stop(error: RowError, raw: str) -> None:
    """Error callback that raises: the program stops at a bad row."""
    raise error


class Rejects:
    """Error callback that appends bad rows to a file, one {"origin", "reason", "row"} per line.

    The file appears with the first bad row. Every line is one write, so that processes can share the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.num_rows = 0  # written by this object
        self.last: RowError | None = None

    def __call__(self, error: RowError, raw: str) -> None:
        line = json.dumps({"origin": error.origin, "reason": error.reason, "row": raw}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
        self.num_rows += 1
        self.last = error

    def summary(self) -> str:
        """Number of rejected rows, and the last error."""
        return f"{self.num_rows} rejected" + (f", the last at {self.last}" if self.last else "")


def is_file_source(path: str) -> bool:
    """Whether a source is a file rather than a folder or the name of a data set."""
    return path.removesuffix(".gz").endswith(FILE_SUFFIXES) or Path(path).is_file()


def read_rows(source: SourceConfig, on_bad_row: OnBadRow = stop) -> Iterator[tuple[Row, str]]:
    """(row, origin) of the first `source.max_rows` good rows of a file, a folder or a data set of the hub; 0 reads all.

    Raises UserError if the source as a whole cannot be read.
    """
    rows = _read_file(source.path, on_bad_row) if is_file_source(source.path) else _read_dataset(source)
    return islice(rows, source.max_rows or None)


def source_version(source: SourceConfig) -> str:
    """Hash (16 hexadecimal digits) of a source's bytes, or its commit on the hub. Raises UserError if there is none."""
    path = Path(source.path)
    if path.is_dir() or is_file_source(source.path):
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [_existing(path)]:
            if file != path:  # in a folder, names tell splits apart
                digest.update(str(file.relative_to(path)).encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()[:16]
    import datasets

    with _explained(source):
        return str(datasets.load_dataset_builder(source.path, source.subset, revision=source.revision).hash)[:16]


def read_jsonl(path: str | Path, on_bad_row: OnBadRow = stop) -> Iterator[tuple[Row, str]]:
    """(row, "file:line") of every non-blank line. Raises UserError if the file is missing, or a damaged gzip file."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not text.strip():
                continue
            origin = f"{path}:{number}"
            try:
                row = _parse(text, origin)
            except RowError as error:
                on_bad_row(error, text.decode("utf-8", "backslashreplace").rstrip("\r\n"))
            else:
                yield row, origin


def _parse(line: bytes, origin: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(origin, f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise RowError(origin, f"not a JSON line ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(origin, f"not a JSON line ({error})") from error
    if not isinstance(row, dict):
        raise _not_an_object(row, origin)
    return row


def _not_an_object(row: Any, origin: str) -> RowError:
    return RowError(origin, f"a row must be a JSON object, found {type(row).__name__}")


def _read_file(path: str, on_bad_row: OnBadRow) -> Iterator[tuple[Row, str]]:
    name = path.removesuffix(".gz")
    if name.endswith(".parquet"):
        return _read_parquet(path)
    if name.endswith(".json"):
        with _opened(path) as file:
            if file.peek(1024).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
                return _read_json_list(path, on_bad_row)
    return read_jsonl(path, on_bad_row)


def _read_json_list(path: str, on_bad_row: OnBadRow) -> Iterator[tuple[Row, str]]:
    with _opened(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a JSON list ({error})") from error
    for index, row in enumerate(rows):
        origin = f"{path}[{index}]"
        if isinstance(row, dict):
            yield row, origin
        else:
            on_bad_row(_not_an_object(row, origin), json.dumps(row))


def _read_parquet(path: str) -> Iterator[tuple[Row, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as file:
        try:
            batches = pq.ParquetFile(file).iter_batches(batch_size=1000)
            for index, row in enumerate(row for batch in batches for row in batch.to_pylist()):
                yield _without_nulls(row), f"{path}[{index}]"
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: damaged parquet file ({first_line(error)})") from error


def _read_dataset(source: SourceConfig) -> Iterator[tuple[Row, str]]:
    import datasets

    with _explained(source):
        rows = datasets.load_dataset(
            source.path, source.subset, split=source.split, revision=source.revision, streaming=source.streaming
        )
        for index, row in enumerate(rows):
            yield _without_nulls(row, rows.features), f"{source.path}[{source.split}][{index}]"


def _without_nulls(row: Row, features: Mapping[str, Any] | None = None) -> Row:
    """A row of columns whose structs have no null fields. All columns stay: errors name them."""
    return {name: _as_given(value, (features or {}).get(name)) for name, value in row.items()}


def _as_given(value: Any, feature: Any) -> Any:
    """A value without the nulls of its structs. `feature` is its type in a data set, or None."""
    if type(feature).__name__ == "Json":  # of datasets 5: stored as text, so its nulls are the row's own
        return value
    if isinstance(value, list):
        return [_as_given(item, getattr(feature, "feature", None)) for item in value]
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {name: _as_given(item, features.get(name)) for name, item in value.items() if item is not None}
    return value


@contextmanager
def _explained(source: SourceConfig) -> Iterator[None]:
    """Turn errors of loading a data set into a UserError."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data source {source.path!r} (split {source.split!r}) is neither a file ({', '.join(FILE_SUFFIXES)}) nor "
            f"a data set that can be loaded: {first_line(error)}"
        ) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    """Open a file, gzipped or not. Raises UserError if it is missing or turns out to be damaged."""
    path = _existing(Path(path))
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from error


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path
