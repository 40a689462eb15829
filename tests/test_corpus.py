"""Rows become documents in order; a bad row is named by file and line; overlong documents are counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pard_train.chat import ChatEncoder
from pard_train.config import DataConfig
from pard_train.corpus import Corpus, load_corpus, read_jsonl, read_rows
from pard_train.errors import UserError

GOOD = b'{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat runs"}]}'


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """ChatML over the tiny tokenizer."""
    return ChatEncoder(tokenizer)


def load(path: Path, encoder: ChatEncoder, **settings: object) -> Corpus:
    """The corpus of one file."""
    return load_corpus(DataConfig(source=str(path), **settings), encoder, show_progress=False)


def row(prompt_words: int, answer_words: int) -> bytes:
    """A chat of known length: one token a word, and the template's own."""
    messages = [("user", " the" * prompt_words), ("assistant", " the" * answer_words)]
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in messages]}).encode() + b"\n"


def tokens_of(corpus: Corpus) -> list[list[int]]:
    """Token ids of every document."""
    return [document.input_ids.tolist() for document in corpus.documents]


def test_every_row_becomes_a_document_in_order_with_its_line(chats_file: Path, encoder: ChatEncoder) -> None:
    corpus = load(chats_file, encoder)
    chats = [json.loads(line)["messages"] for line in chats_file.read_text().splitlines()]
    assert [d.origin for d in corpus.documents] == [f"{chats_file}:{n}" for n in range(1, 41)]
    assert tokens_of(corpus) == [encoder.encode(c, origin="")[0].input_ids.tolist() for c in chats]
    num_tokens = sum(map(len, tokens_of(corpus)))
    assert f"40 rows -> 40 documents, {num_tokens:,} tokens" in corpus.summary()


def test_blank_lines_and_windows_line_ends_change_nothing_but_the_line_numbers(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    plain, windows = tmp_path / "plain.jsonl", tmp_path / "windows.jsonl"
    plain.write_bytes(GOOD + b"\n" + row(2, 3).rstrip())  # no line end at the end of the file
    windows.write_bytes(b"\r\n" + GOOD + b"\r\n  \r\n\r\n" + row(2, 3).rstrip() + b"\r\n\r\n")
    first, second = load(plain, encoder), load(windows, encoder)
    assert tokens_of(first) == tokens_of(second)
    assert [d.origin for d in second.documents] == [f"{windows}:2", f"{windows}:5"]
    assert (first.num_rows, second.num_rows) == (2, 2)


def test_a_gzipped_file_reads_like_a_plain_one(tmp_path: Path, chats_file: Path) -> None:
    packed = tmp_path / "chats.jsonl.gz"
    packed.write_bytes(gzip.compress(chats_file.read_bytes()))
    assert [r for r, _ in read_rows(str(packed))] == [r for r, _ in read_jsonl(chats_file)]
    assert next(read_jsonl(packed))[1] == f"{packed}:1"


def test_a_datasets_source_reads_like_a_file(tmp_path: Path, chats_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(chats_file.read_bytes())
    rows = list(read_rows(str(folder)))
    assert [r for r, _ in rows] == [r for r, _ in read_jsonl(chats_file)]
    assert rows[3][1] == f"{folder}[train][3]"
    with pytest.raises(UserError, match=r"split 'nope'.*neither a \.jsonl file nor a data set"):
        list(read_rows(str(folder), "nope"))


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"messages": [', "not a JSON line"),
        (GOOD + GOOD, "not a JSON line"),
        (GOOD.replace(b"cat", b"c\xe4t"), "not UTF-8"),
        (b'["messages"]', "a row must be a JSON object, found list"),
        (b"3", "a row must be a JSON object, found int"),
        (b'{"text": "x", "id": 3}', "no field `messages`; found text, id"),
        (b"{}", "no field `messages`; found nothing"),
        (b'{"messages": []}', "must be a non-empty list"),
        (GOOD.replace(b"user", b"human"), "message 0 has role 'human'"),
        (GOOD.replace(b"assistant", b"user"), "no assistant turn"),
        (GOOD.replace(b"the cat runs", b" "), "message 1 is an empty answer"),
        (GOOD.replace(b"the cat runs", b"the cat \\ud83d"), ""),  # half an emoji is valid JSON, but no text
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, encoder: ChatEncoder, line: bytes, reason: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n")
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        load(path, encoder)
    assert str(error.value).startswith(f"{path}:3: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


def test_a_missing_file_is_named(tmp_path: Path, encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        load(tmp_path / "nowhere.jsonl", encoder)


@pytest.mark.parametrize("contents", [gzip.compress(GOOD * 9)[:-12], GOOD], ids=["cut off", "not gzip"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, encoder: ChatEncoder, contents: bytes) -> None:
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=r"chats\.jsonl\.gz"):
        load(path, encoder)


LENGTHS = [(1, 5), (2, 60), (3, 4), (90, 3), (4, 5), (5, 70)]  # words of question and answer


def write_lengths(path: Path) -> Path:
    """Chats of LENGTHS."""
    path.write_bytes(b"".join(row(*pair) for pair in LENGTHS))
    return path


def test_an_overlong_document_is_an_error_that_says_what_to_do(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write_lengths(tmp_path / "chats.jsonl")
    with pytest.raises(
        UserError, match=r"chats.jsonl:2: \d+ tokens, but data.max_length=50; raise .* data.overlong=drop"
    ):
        load(path, encoder, max_length=50)


def test_dropped_documents_are_counted_and_the_others_kept_whole(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write_lengths(tmp_path / "chats.jsonl")
    whole, short = load(path, encoder), load(path, encoder, max_length=50, overlong="drop")
    assert tokens_of(short) == [ids for ids in tokens_of(whole) if len(ids) <= 50]
    assert (short.num_rows, len(short.documents), short.num_dropped, short.num_truncated) == (6, 3, 3, 0)
    assert "3 overlong dropped, 0 truncated" in short.summary()


def test_truncated_documents_keep_their_beginning_and_what_they_teach(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write_lengths(tmp_path / "chats.jsonl")
    whole, cut = load(path, encoder), load(path, encoder, max_length=50, overlong="truncate")
    rest = [d for d in whole.documents if d.loss_mask[:50].any()]  # a question that fills the window teaches nothing
    assert tokens_of(cut) == [d.input_ids[:50].tolist() for d in rest]
    assert all(np.array_equal(c.loss_mask, d.loss_mask[:50]) for c, d in zip(cut.documents, rest, strict=True))
    assert (cut.num_rows, len(cut.documents), cut.num_dropped, cut.num_truncated) == (6, 5, 1, 2)


def test_a_document_of_just_the_longest_length_is_kept(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(row(2, 3))
    (ids,) = tokens_of(load(path, encoder))
    assert tokens_of(load(path, encoder, max_length=len(ids))) == [ids]
    with pytest.raises(UserError, match="max_length"):
        load(path, encoder, max_length=len(ids) - 1)


@pytest.mark.parametrize("contents", [b"", b"\n\n", row(2, 60)], ids=["empty", "blank", "all dropped"])
def test_a_source_that_leaves_nothing_to_train_on_is_refused(
    tmp_path: Path, encoder: ChatEncoder, contents: bytes
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(contents)
    with pytest.raises(UserError, match=f"data.source={path}: nothing to train on in {int(len(contents) > 2)} rows"):
        load(path, encoder, max_length=50, overlong="drop")


@pytest.mark.parametrize("reason, is_ended", [(b"stop", True), (b"length", False)])
def test_an_answer_that_hit_its_length_limit_is_not_taught_as_ended(
    tmp_path: Path, encoder: ChatEncoder, reason: bytes, is_ended: bool
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(GOOD[:-1] + b', "finish_reason": "' + reason + b'"}')
    (document,) = load(path, encoder).documents
    answer = encoder.tokenizer.decode(document.input_ids[document.loss_mask])
    assert answer == "the cat runs" + "<|im_end|>" * is_ended
