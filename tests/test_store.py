"""The corpus on disk: what was read comes back, is used again only for the same data, and is whole or absent."""

from __future__ import annotations

import gzip
import json
import pickle
import resource
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import CHATML, build_tokenizer
from transformers import PreTrainedTokenizerBase

from data_scripts.encode import run as encode_program
from pard_train.config import Config, DataConfig, DraftConfig, ModelConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import encode_corpus
from pard_train.data.store import TokenStore, new_array, open_store
from pard_train.errors import UserError
from pard_train.layout import slot_bounds, supervised_runs
from pard_train.runs import SEAL_FILE

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat runs"}]}


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """ChatML over the tiny tokenizer."""
    return ChatEncoder(tokenizer)


def chat(prompt_words: int, answer_words: int, **fields: str) -> dict:
    """A chat of known length: one token a word, and the template's own."""
    messages = [("user", " the" * prompt_words), ("assistant", " the" * answer_words)]
    return {"messages": [{"role": r, "content": c} for r, c in messages], **fields}


def write(path: Path, rows: list[dict | str]) -> Path:
    """A JSONL file; texts are lines as they stand."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def store_of(config: DataConfig, encoder: ChatEncoder, folder: Path) -> TokenStore:
    """The store of a source."""
    encode_corpus(config, encoder, folder)
    return TokenStore.open(folder)


def encode(path: Path, encoder: ChatEncoder, **settings: object) -> TokenStore:
    """The store of a file, in a folder beside it."""
    config = DataConfig(source=str(path), num_workers=1, **settings)
    return store_of(config, encoder, path.with_name(f"{path.stem}-tokens"))


def same(one: Document, other: Document) -> bool:
    """Equal tokens, masks and origins."""
    ids = np.array_equal(one.input_ids, other.input_ids) and one.input_ids.dtype == other.input_ids.dtype == np.int32
    return ids and np.array_equal(one.loss_mask, other.loss_mask) and one.origin == other.origin


def test_every_row_comes_back_as_the_document_it_was_encoded_to(
    chats_file: Path, encoder: ChatEncoder, tmp_path: Path
) -> None:
    store = store_of(DataConfig(source=str(chats_file)), encoder, tmp_path / "tokens")
    chats = [json.loads(line)["messages"] for line in chats_file.read_text().splitlines()]
    expected = [encoder.encode(c, origin=f"{chats_file}:{n}")[0] for n, c in enumerate(chats, start=1)]
    assert len(store) == len(expected) == 40
    assert all(same(store[i], document) for i, document in enumerate(expected))
    assert all(
        same(document, again) for document, again in zip(store, TokenStore.open(tmp_path / "tokens"), strict=True)
    )


def test_counts_and_bounds_are_those_of_the_documents(chats_file: Path, encoder: ChatEncoder, tmp_path: Path) -> None:
    store = store_of(DataConfig(source=str(chats_file)), encoder, tmp_path / "tokens")
    documents = list(store)
    assert store.lengths().tolist() == [len(d.input_ids) for d in documents]
    assert store.num_supervised().tolist() == [int(d.loss_mask.sum()) for d in documents]
    for bound, document in zip(store.slot_bounds(DraftConfig()), documents, strict=True):
        runs = supervised_runs(document.loss_mask)
        alone = slot_bounds(np.array([len(document.input_ids)]), runs, np.zeros(len(runs), dtype=int), DraftConfig())
        assert bound == alone[0]
    counts = store.manifest["counts"]
    assert counts["tokens"] == store.lengths().sum()
    assert counts["supervised"] == store.num_supervised().sum()
    assert counts["turns"] == sum(len(supervised_runs(d.loss_mask)) for d in documents)
    assert f"40 rows -> 40 documents, {counts['tokens']:,} tokens" in store.summary()
    lengths = sorted(store.lengths())
    assert store.manifest["document_length"]["p0"] == lengths[0]
    assert store.manifest["document_length"]["p100"] == lengths[-1]
    assert store.manifest["document_length"]["mean"] == pytest.approx(np.mean(lengths), abs=0.05)


def test_many_workers_write_what_one_writes(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [chat(n % 7 + 1, n % 11 + 1) for n in range(1200)])
    alone = store_of(DataConfig(source=str(path), num_workers=1), encoder, tmp_path / "one")
    together = store_of(DataConfig(source=str(path), num_workers=2), encoder, tmp_path / "two")
    assert len(alone) == 1200
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))


def test_a_store_goes_to_another_process_without_its_tokens(encoder: ChatEncoder, tmp_path: Path) -> None:
    store = encode(write(tmp_path / "chats.jsonl", [chat(n % 7 + 1, n % 11 + 1) for n in range(2500)]), encoder)
    message = pickle.dumps(store)
    assert len(message) < 500
    again = pickle.loads(message)
    assert len(again) == 2500
    assert all(same(store[i], again[i]) for i in (0, 999, 1000, 2499))  # both sides of a block of Arrow's
    assert same(store[-1], store[2499])
    assert store[0].input_ids.flags.writeable  # torch.from_numpy wants it so


def test_overlong_documents_stop_the_run_or_are_dropped_or_truncated(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [chat(3, 5), chat(3, 50), chat(60, 5)])
    full = [encoder.encode(row["messages"], origin="")[0] for row in (chat(3, 5), chat(3, 50))]
    with pytest.raises(UserError, match=r"chats\.jsonl:2: \d+ tokens, but data\.max_length=40; raise"):
        encode(path, encoder, max_length=40, overlong="error")
    dropped = encode(path, encoder, max_length=40, overlong="drop")
    assert dropped.manifest["counts"]["rendered"] == 3
    assert [len(d.input_ids) for d in dropped] == [len(full[0].input_ids)]
    assert (dropped.manifest["counts"]["dropped"], dropped.manifest["counts"]["truncated"]) == (2, 0)
    cut = encode(path.rename(tmp_path / "again.jsonl"), encoder, max_length=40)
    assert (cut.manifest["counts"]["dropped"], cut.manifest["counts"]["truncated"]) == (
        1,
        1,
    )  # a prompt of 60 fills all
    assert cut[1].input_ids.tolist() == full[1].input_ids[:40].tolist()
    assert cut[1].loss_mask.tolist() == full[1].loss_mask[:40].tolist()


def test_an_answer_cut_by_the_length_limit_is_not_taught_as_ended(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "chats.jsonl", [chat(2, 4, finish_reason="stop"), chat(2, 4, finish_reason="length")])
    ended, cut = encode(path, encoder)
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ended.input_ids[ended.loss_mask].tolist() == [*cut.input_ids[cut.loss_mask].tolist(), end]


BAD = [
    "{",
    chat(2, 0),
    {"text": "x"},
    '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "a"}]}',
]


@pytest.mark.parametrize("bad", BAD, ids=["json", "empty answer", "no messages", "half a character"])
def test_a_bad_row_stops_the_run_by_file_and_line_and_leaves_nothing_behind(
    tmp_path: Path, encoder: ChatEncoder, bad: dict | str
) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD, "", bad, GOOD])
    with pytest.raises(UserError) as error:
        encode(path, encoder)
    assert str(error.value).startswith(f"{path}:3: ")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["chats.jsonl"]


def test_rows_that_are_set_aside_are_listed_with_their_reason_and_the_counts_add_up(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD, *BAD, GOOD])
    store = encode(path, encoder, bad_rows="set_aside")
    rejects = [json.loads(line) for line in (tmp_path / "chats-tokens" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(row["origin"] for row in rejects) == [f"{path}:{n}" for n in (2, 3, 4, 5)]
    assert all(row["reason"] and row["row"] for row in rejects)
    counts = store.manifest["counts"]
    assert (counts["rows"], counts["rejected"], counts["rendered"], counts["documents"]) == (6, 4, 2, 2)


def test_a_time_among_arguments_is_set_aside_and_one_in_another_column_is_nothing(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    call = {"function": {"name": "f", "arguments": {"when": datetime(2024, 1, 1)}}}
    with_call = [GOOD["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    path = tmp_path / "chats.parquet"
    times = [None, datetime(2024, 1, 1)]
    pq.write_table(pa.table({"messages": [with_call, GOOD["messages"]], "crawled": times}), path)
    assert encode(path, encoder, bad_rows="set_aside").manifest["counts"]["documents"] == 1
    (reject,) = (tmp_path / "chats-tokens" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["origin"] == f"{path}[0]"
    assert "a value that is not JSON (Object of type datetime" in json.loads(reject)["reason"]


def test_a_source_that_teaches_nothing_is_an_error(tmp_path: Path, encoder: ChatEncoder) -> None:
    with pytest.raises(UserError, match="nothing to train on in 0 rows"):
        encode(write(tmp_path / "empty.jsonl", []), encoder)
    with pytest.raises(UserError, match=r"nothing to train on in 1 rows .*1 documents dropped"):
        encode(write(tmp_path / "long.jsonl", [chat(60, 5)]), encoder, max_length=40, overlong="drop")
    path = write(tmp_path / "bad.jsonl", ["{", chat(2, 0)])
    with pytest.raises(UserError, match=r"2 rejected, the last at \S+bad\.jsonl:2: message 1 is an empty answer"):
        encode(path, encoder, bad_rows="set_aside")


def test_a_store_in_the_cache_is_used_again_until_anything_that_decides_its_tokens_changes(
    tmp_path: Path, encoder: ChatEncoder
) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD, chat(3, 4)])
    cache = tmp_path / "cache"
    config = DataConfig(source=str(path), cache_dir=str(cache))

    def stores() -> set[str]:
        return {p.name for p in cache.iterdir() if p.is_dir()}

    open_store(config, encoder)
    (first,) = stores()
    open_store(replace(config, num_workers=1, slot_budget=99), encoder)
    assert stores() == {first}
    other_template = build_tokenizer(CHATML.replace("user", "human") + "{# new #}")
    for settings, other in [
        (replace(config, max_length=300), encoder),
        (replace(config, overlong="drop"), encoder),
        (config, ChatEncoder(other_template)),
        (config, ChatEncoder(encoder.tokenizer, {"enable_thinking": False})),
    ]:
        before = stores()
        open_store(settings, other)
        assert len(stores()) == len(before) + 1
    before = stores()
    write(path, [GOOD, chat(3, 5)])
    assert len(open_store(config, encoder)[1].input_ids) == len(
        encoder.encode(chat(3, 5)["messages"], origin="")[0].input_ids
    )
    assert len(stores()) == len(before) + 1


def test_a_folder_of_tokens_trains_only_the_model_it_was_made_for(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD])
    encode(path, encoder)
    config = DataConfig(source=str(tmp_path / "chats-tokens"))
    assert len(open_store(config, encoder)) == 1
    with pytest.raises(UserError, match=r"was encoded with other settings .chat_template"):
        open_store(config, ChatEncoder(build_tokenizer(CHATML + "{# other #}")))
    with pytest.raises(UserError, match=r"was encoded with other settings .max_length: 512"):
        open_store(replace(config, max_length=64), encoder)
    with pytest.raises(UserError, match=r"was encoded with other settings .overlong: truncate -> drop"):
        open_store(replace(config, overlong="drop"), encoder)


def test_a_folder_that_exists_is_never_overwritten(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = write(tmp_path / "chats.jsonl", [GOOD])
    (tmp_path / "chats-tokens").mkdir()
    with pytest.raises(UserError, match="already exists"):
        encode(path, encoder)
    assert list((tmp_path / "chats-tokens").iterdir()) == []


def test_the_command_lets_the_same_tokens_stand_and_refuses_to_replace_others(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(source=str(chats_file), num_workers=1)
    config = Config(model=ModelConfig(path=str(base_folder)), data=data, output_dir=str(tmp_path))
    encode_program(config)
    made = capsys.readouterr().out
    assert "40 rows -> 40 documents" in made
    assert "tokens/s" in made
    before = (tmp_path / "tokens" / "manifest.json").stat().st_mtime_ns
    encode_program(config)
    assert capsys.readouterr().out == made
    assert (tmp_path / "tokens" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"tokens holds other tokens \(max_length: 512 -> 300\)"):
        encode_program(replace(config, data=replace(data, max_length=300)))


def test_a_disk_that_fills_up_costs_one_line_and_leaves_nothing_half_done(base_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(chat(9, 200)) + "\n" for _ in range(3000)).encode()))
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "data_scripts" / "encode.py"),
        f"model.path={base_folder}",
        f"data.source={path}",
        f"output_dir={tmp_path / 'out'}",
    ]

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    result = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit_file_size)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("encode.py: error: ")
    assert "cannot be written" in last
    assert list((tmp_path / "out").iterdir()) == []


def test_an_array_takes_its_room_on_the_disk_at_once_or_leaves_nothing(tmp_path: Path) -> None:
    path, too_large = tmp_path / "a.npy", tmp_path / "b.npy"
    assert new_array(path, np.uint8, (1000, 1000)).shape == (1000, 1000)
    assert path.stat().st_blocks * 512 >= 1_000_000  # no hole that a full disk could not fill
    program = (
        "import resource, sys; from pathlib import Path; from pard_train.data.store import new_array\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try: new_array(Path(sys.argv[1]), 'uint8', (2000, 1000))\n"
        "except OSError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(too_large)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert f"File too large: '{too_large}'" in result.stdout
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("kind", ["empty", "half", "gone", "flip"])
@pytest.mark.parametrize("is_sealed", [True, False])  # False: as versions before 0.3 wrote them
def test_damaged_tokens_end_with_one_line_that_names_the_folder(
    encoder: ChatEncoder, tmp_path: Path, name: str, kind: str, is_sealed: bool
) -> None:
    store = encode(write(tmp_path / "chats.jsonl", [GOOD] * 5), encoder)
    file = store.folder / "documents" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes({"empty": b"", "half": data[: len(data) // 2], "flip": data, "gone": b""}[kind])
    if kind == "gone":
        file.unlink()
    if is_sealed:
        with pytest.raises(UserError, match=rf"{name} (is truncated|has changed).* delete {store.folder} and run"):
            TokenStore.open(store.folder)
        return
    (store.folder / SEAL_FILE).unlink()
    try:
        opened = TokenStore.open(store.folder)
    except UserError as error:
        assert f"{store.folder} cannot be read" in str(error)
    else:  # a file with facts that nobody needs, or tokens whose change only a seal shows
        assert (name == "dataset_info.json" or kind == "flip") and len(opened) == 5
