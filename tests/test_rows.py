"""Every row is read once, in order, by its place; a bad one is told of and nothing else is lost with it."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pard_train.config import SourceConfig
from pard_train.data.rows import Rejects, is_file_source, read_jsonl, read_rows, source_version
from pard_train.errors import RowError, UserError

ROWS = [{"id": 7, "text": "¿Qué tal? 你好 😀\u2028x"}, {"id": 7, "text": "a" * 150_000}, {"id": 8, "text": "नमस्ते\r\n"}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
BAD_LINES = [
    (b'{"text": [', "not a JSON line"),
    (b"{} {}", "not a JSON line"),
    (b'{"text": "c\xe4t"}', "not UTF-8"),
    (b'["text"]', "a row must be a JSON object, found list"),
    (b"3", "a row must be a JSON object, found int"),
    (b"[" * 100_000, "not a JSON line"),
    (b'{"number": ' + b"1" * 5000 + b"}", "not a JSON line"),
]


def rows_of(path: Path, **settings: Any) -> list[dict[str, Any]]:
    """All rows of a source, in order."""
    return [row for row, _ in read_rows(SourceConfig(path=str(path), **settings))]


def origins_of(path: Path, **settings: Any) -> list[str]:
    """Where they came from."""
    return [origin for _, origin in read_rows(SourceConfig(path=str(path), **settings))]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A parquet file of several row groups."""
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=400)
    return path


def test_blank_lines_line_ends_and_a_byte_order_mark_change_only_line_numbers(tmp_path: Path) -> None:
    plain, windows = tmp_path / "plain.jsonl", tmp_path / "windows.jsonl"
    plain.write_bytes(b"\n".join(LINES))
    windows.write_bytes(b"\xef\xbb\xbf\r\n" + b"\r\n \t\r\n".join(LINES) + b"\r\n\r\n")
    assert rows_of(plain) == rows_of(windows) == ROWS  # rows of the same id are rows all the same
    assert origins_of(windows) == [f"{windows}:{line}" for line in (2, 4, 6)]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "json of lines", "parquet", "any other name"])
def test_a_file_of_any_form_holds_the_same_rows(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form.split()[0]}"
    data = b"\xef\xbb\xbf\n [" + b",\n".join(LINES) + b"]" if form in ("json", "json.gz") else b"\n".join(LINES)
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    if form == "parquet":
        write_parquet(path, ROWS)
    assert is_file_source(str(path))
    assert rows_of(path) == ROWS
    is_by_line = "jsonl" in form or " " in form
    assert origins_of(path) == [f"{path}:{n}" if is_by_line else f"{path}[{n - 1}]" for n in (1, 2, 3)]


def test_rows_of_all_batches_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    rows = [{"index": index} for index in range(2500)]
    path = write_parquet(tmp_path / "rows.parquet", rows)
    assert rows_of(path) == rows
    assert origins_of(path)[2345] == f"{path}[2345]"


def test_no_more_rows_are_read_than_wanted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES[0] + b"\n" + LINES[1] + b"\nnever read")
    assert rows_of(path, max_rows=2) == ROWS[:2]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_row_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINES[0] + b"\n\n" + line + b"\n" + LINES[2])
    with pytest.raises(RowError) as stopped:
        list(read_jsonl(path))
    assert stopped.value.origin == f"{path}:3"
    assert stopped.value.reason.startswith(reason)
    assert "\n" not in str(stopped.value)
    told: list[tuple[str, str]] = []
    rows = list(read_jsonl(path, lambda error, raw: told.append((str(error), raw))))
    assert [row for row, _ in rows] == [ROWS[0], ROWS[2]]
    assert told == [(str(stopped.value), line.decode("utf-8", "backslashreplace"))]


def test_a_bad_row_of_a_json_list_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, ["x"], {"a": 2}, null]')
    rejects = Rejects(tmp_path / "rejects.jsonl")
    source = SourceConfig(path=str(path))
    assert list(read_rows(source, rejects)) == [({"a": 1}, f"{path}[0]"), ({"a": 2}, f"{path}[2]")]
    assert [row["row"] for row in map(json.loads, rejects.path.read_text().splitlines())] == ['["x"]', "null"]
    with pytest.raises(RowError, match=r"rows\.json\[1\]: a row must be a JSON object, found list"):
        list(read_rows(source))


def test_rejects_are_added_to_their_file_and_a_clean_source_leaves_none(tmp_path: Path) -> None:
    path, file = tmp_path / "rows.jsonl", tmp_path / "new folder" / "rejects.jsonl"
    path.write_bytes(b"\n".join(LINES))
    clean = Rejects(file)
    assert len(list(read_jsonl(path, clean))) == 3
    assert clean.num_rows == 0
    assert not file.parent.exists()
    path.write_bytes(b'{"text": "c\xe4t"}\r\n{"text": "\\ud83d"')
    for _ in range(2):
        rejects = Rejects(file)
        assert list(read_jsonl(path, rejects)) == []
        assert rejects.num_rows == 2
    rejects(RowError("here:1", "half a character"), "\ud83d")
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["origin"] for row in written] == [f"{path}:1", f"{path}:2"] * 2 + ["here:1"]
    assert written[0]["row"] == '{"text": "c\\xe4t"}'
    assert written[0]["reason"].startswith("not UTF-8")
    assert written[4] == {"origin": "here:1", "reason": "half a character", "row": "\ud83d"}


@pytest.mark.parametrize("seed", range(20))
def test_rows_read_and_rows_set_aside_add_up_whatever_the_damage(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    data = bytearray(b"\r\n".join(json.dumps({"id": i, "text": "año 😀 [{"}).encode() for i in range(60)))
    for _ in range(draw.randint(0, 60)):
        where = draw.randrange(len(data))
        data[where : where + draw.randint(0, 3)] = draw.choice([b"", b"\n", b"\r\n\n", b"\xff", b"}", b'"', b" ", b"1"])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    rejects = Rejects(tmp_path / "rejects.jsonl")
    rows = list(read_jsonl(path, rejects))
    lines = {f"{path}:{n}": line for n, line in enumerate(bytes(data).split(b"\n"), start=1) if line.strip()}
    text = rejects.path.read_text() if rejects.path.exists() else ""
    set_aside = [json.loads(line)["origin"] for line in text.splitlines()]
    assert {origin for _, origin in rows}.isdisjoint(set_aside)
    assert len(rows) + rejects.num_rows == len(lines)
    for row, origin in rows:
        assert json.loads(lines[origin]) == row


@pytest.mark.parametrize(
    "name, contents",
    [
        ("rows.jsonl.gz", gzip.compress(LINES[1] * 9, mtime=0)[:-12]),
        ("rows.jsonl.gz", LINES[0]),
        ("rows.json.gz", gzip.compress(b"[{}]" * 9, mtime=0)[:-9]),
        ("rows.json", b'[{"a": 1}, {"a": '),
        ("rows.json", b'["\xff"]'),
        ("rows.parquet", b"PAR1 and nothing"),
    ],
)
def test_a_damaged_file_stops_even_where_bad_rows_are_set_aside(tmp_path: Path, name: str, contents: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(UserError, match=name) as error:
        list(read_rows(SourceConfig(path=str(path)), Rejects(tmp_path / "rejects.jsonl")))
    assert not isinstance(error.value, RowError)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere.jsonl", "nowhere.json", "nowhere.parquet", "nowhere.jsonl.gz"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    for read in (rows_of, lambda path: source_version(SourceConfig(path=str(path)))):
        with pytest.raises(UserError, match=rf"{name}: no such file"):
            read(tmp_path / name)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "chats"
    path.mkdir()
    (path / "train.jsonl").write_bytes(b"\n".join(LINES))
    (path / "test.jsonl").write_bytes(LINES[2])
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_reads_like_a_file(folder: Path, streaming: bool) -> None:
    assert not is_file_source(str(folder))
    assert rows_of(folder, streaming=streaming) == ROWS
    assert rows_of(folder, streaming=streaming, split="test") == ROWS[2:]
    assert rows_of(folder, streaming=streaming, max_rows=2) == ROWS[:2]
    assert origins_of(folder, streaming=streaming)[1] == f"{folder}[train][1]"
    assert any((folder.parent / "cache").rglob("*.arrow")) != streaming  # nothing is stored


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_fields_that_a_data_set_adds_to_a_row_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, streaming: bool
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"a": {"x": 1, "in": [{"p": 1}]}, "b": [None]}, {"a": {"y": {"z": "2"}, "in": [{"q": 1}]}, "b": [3]}]
    (tmp_path / "rows").mkdir()
    if form == "parquet":
        write_parquet(tmp_path / "rows" / "train.parquet", rows)
    else:
        (tmp_path / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(tmp_path / "rows", streaming=streaming) == rows


def test_nulls_that_a_data_set_stores_as_json_are_the_rows_own(folder: Path) -> None:
    rows = [{"a": [{"x": None}, "text"]}, {"a": [{"y": 1}]}]  # no one type fits these
    (folder / "test.jsonl").unlink()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_of(folder) == rows


def test_a_data_set_that_cannot_be_loaded_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"chats' \(split 'nope'\) is neither a file \(.*\) nor a data set"):
        rows_of(folder, split="nope")
    with pytest.raises(UserError, match=r"nobody/nothing' \(split 'train'\) is neither"):
        rows_of(Path("nobody/nothing"))
    with pytest.raises(UserError, match=r"nobody/nothing' \(split 'train'\) is neither"):
        source_version(SourceConfig(path="nobody/nothing"))


def test_the_version_of_a_source_changes_with_its_contents_alone(folder: Path, tmp_path: Path) -> None:
    file, copy = folder / "train.jsonl", tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    version, whole = source_version(SourceConfig(path=str(file))), source_version(SourceConfig(path=str(folder)))
    assert len(version) == len(whole) == 16
    assert source_version(SourceConfig(path=str(copy))) == version
    copy.write_bytes(file.read_bytes() + b"\n")
    assert source_version(SourceConfig(path=str(copy))) != version
    (folder / "test.jsonl").rename(folder / "dev.jsonl")
    renamed = source_version(SourceConfig(path=str(folder)))
    (folder / "dev.jsonl").write_bytes(LINES[1])
    assert len({whole, renamed, source_version(SourceConfig(path=str(folder)))}) == 3
