"""Chats become tokens on disk: read, rendered and tokenized by many processes, each row with one outcome.

A folder of tokens holds an Arrow data set of documents, a `manifest.json` of its inputs, and `rejects.jsonl` with the
unusable rows. `store.py` reads it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from pard_train.config import DataConfig, SourceConfig
from pard_train.data.chat import ChatEncoder, Document, Pieces, documents_of_ids
from pard_train.data.rows import OnBadRow, Rejects, Row, read_rows, source_version, stop
from pard_train.data.schemas import Chat, to_chat
from pard_train.errors import RowError, UserError
from pard_train.layout import supervised_runs
from pard_train.runs import MANIFEST_FILE, fingerprint, new_folder, num_cores, provenance, write_json

ENCODING_VERSION = 3  # raise it when the same rows would become other tokens
REJECTS_FILE = "rejects.jsonl"
DOCUMENTS_FOLDER = "documents"
ROWS_PER_WORKER = 500  # fewer are not worth a process

_ROWS = datasets.Features({"row": datasets.Value("string"), "origin": datasets.Value("string")})
DOCUMENTS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "runs": datasets.List(datasets.Value("int32")),  # first and past-the-last token of every supervised run
        "origin": datasets.Value("string"),
        "from_token_ids": datasets.Value("int32"),  # answers whose labels are a target's own ids
        "altered": datasets.Value("int32"),  # rendered answers whose ends the template trims or pads
        "outcome": datasets.Value("string"),  # kept | truncated | dropped | rejected
        "note": datasets.Value("string"),  # of a rejected row: the reason and the row
    }
)


def encode_corpus(config: DataConfig, encoder: ChatEncoder, folder: Path) -> None:
    """Read, render and tokenize a source into a store, written atomically.

    Args:
        config: the source and its options.
        encoder: of the tokenizer.
        folder: of the store; must not exist.

    Raises:
        UserError: at the first bad row (bad_rows=error), or if there is nothing to train on.
    """
    started = time.time()
    with new_folder(folder) as partial:
        rejects = Rejects(partial / REJECTS_FILE)
        rows = _write_rows(config, partial / "rows.arrow", rejects if config.bad_rows == "set_aside" else stop)
        num_rows = len(rows) + rejects.num_rows
        num_workers = min(config.num_workers or num_cores(), max(1, len(rows) // ROWS_PER_WORKER))
        encoded = _encode_rows(rows, config, encoder, partial / "encoded.arrow", num_workers)
        _list_rejected(encoded, rejects)
        counts = {"rows": num_rows, "rejected": rejects.num_rows, **_count_outcomes(encoded)}
        if not counts["documents"]:
            raise UserError(
                f"data.source={config.source}: nothing to train on in {num_rows} rows ({counts['dropped']} documents "
                f"dropped as longer than data.max_length={config.max_length}; {rejects.summary()})"
            )
        documents = _save_documents(encoded, partial / DOCUMENTS_FOLDER)
        for scratch in partial.glob("*.arrow"):
            scratch.unlink()
        manifest = _manifest(config, encoder, documents, counts)
        speed = manifest["counts"]["tokens"] / (time.time() - started)
        manifest["speed"] = {
            "workers": num_workers,
            "tokens_per_second": round(speed),
            "tokens_per_second_per_worker": round(speed / num_workers),
        }
        write_json(partial / MANIFEST_FILE, manifest)


def _write_rows(config: DataConfig, path: Path, on_bad_row: OnBadRow) -> datasets.Dataset:
    """Every row of the source as JSON, with its origin: what many processes can share."""
    source = source_of(config)
    with ArrowWriter(path=str(path), features=_ROWS) as writer:
        for row, origin in tqdm(read_rows(source, on_bad_row), desc=f"read {source.path}", unit=" rows"):
            try:
                writer.write({"row": _as_text(row, source, origin), "origin": origin})
            except RowError as error:
                on_bad_row(error, json.dumps(row, default=str))
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _as_text(row: Row, source: SourceConfig, origin: str) -> str:
    """A row as JSON. Raises RowError if its chat holds a value that is not JSON: it would become text."""
    try:
        return json.dumps(row)
    except TypeError:  # a time or bytes of a columnar file
        to_chat(row, source, origin)
        return json.dumps(row, default=str)


def _encode_rows(
    rows: datasets.Dataset, config: DataConfig, encoder: ChatEncoder, path: Path, num_workers: int
) -> datasets.Dataset:
    """One row per document or rejected row, in order."""
    if not len(rows):  # which `map` would pass on without columns
        return datasets.Dataset.from_dict({name: [] for name in DOCUMENTS}, features=DOCUMENTS)
    return rows.map(
        _encode_batch,
        fn_kwargs={"config": config, "encoder": encoder},
        batched=True,
        remove_columns=rows.column_names,
        features=DOCUMENTS,
        cache_file_name=str(path),
        new_fingerprint=fingerprint(str(path)),
        num_proc=num_workers if num_workers > 1 else None,
        desc="tokenize",
    )


def _encode_batch(batch: dict[str, list[str]], config: DataConfig, encoder: ChatEncoder) -> dict[str, list[Any]]:
    """Rows as documents, tokenized in one call; a rejected row keeps its place."""
    entries: list[Pieces | Document | dict[str, Any]] = []
    for text, origin in zip(batch["row"], batch["origin"], strict=True):
        try:
            entries += encode_chat(to_chat(json.loads(text), source_of(config), origin), encoder, origin)
        except RowError as error:
            if config.bad_rows == "error":
                raise
            entries.append(_result([], [], error.origin, "rejected", json.dumps([error.reason, text])))
    tokenized = iter(encoder.tokenize([entry for entry in entries if isinstance(entry, Pieces)]))
    results = []
    for entry in entries:
        if isinstance(entry, Pieces):
            entry_result = {**_fit(next(tokenized), config), "altered": entry.num_altered}
        elif isinstance(entry, Document):
            entry_result = _fit(entry, config)
            entry_result["from_token_ids"] = len(entry_result["runs"]) // 2
        else:
            entry_result = entry
        results.append({"from_token_ids": 0, "altered": 0, **entry_result})
    return {name: [result[name] for result in results] for name in DOCUMENTS}


def encode_chat(chat: Chat, encoder: ChatEncoder, origin: str) -> Sequence[Document | Pieces]:
    """Documents of one chat: a target's own token ids if the row has them for this tokenizer, else rendered text.

    Raises:
        RowError: if the chat cannot be rendered without loss.
    """
    if chat.token_ids is not None and chat.token_ids.tokenizer == encoder.tokenizer_fingerprint:
        documents = documents_of_ids(chat.token_ids.turns, origin)
        for ids in (document.input_ids for document in documents):
            if ids.min() < 0 or ids.max() >= len(encoder.tokenizer):
                raise RowError(
                    origin, f"token_ids must be from 0 to {len(encoder.tokenizer) - 1}, as the tokenizer's are"
                )
        return documents
    is_cut = chat.finish_reason == "length"
    return encoder.pieces(chat.messages, origin=origin, is_cut=is_cut, tools=chat.tools)


def _fit(document: Document, config: DataConfig) -> dict[str, Any]:
    """A document as a row of the store, after doing with an overlong one what data.overlong says."""
    length, ids, mask = len(document.input_ids), document.input_ids, document.loss_mask
    if length <= config.max_length:
        return _result(ids, supervised_runs(mask), document.origin, "kept")
    if config.overlong == "error":
        raise UserError(
            f"{document.origin}: {length} tokens, but data.max_length={config.max_length}; raise data.max_length "
            "(and data.slot_budget), or set data.overlong=drop or data.overlong=truncate"
        )
    ids, mask = ids[: config.max_length], mask[: config.max_length]
    if config.overlong == "drop" or not mask.any():  # or the prompt alone fills the window
        return _result([], [], document.origin, "dropped")
    return _result(ids, supervised_runs(mask), document.origin, "truncated")


def _result(ids: Any, runs: Any, origin: str, outcome: str, note: str = "") -> dict[str, Any]:
    return {
        "input_ids": np.asarray(ids, dtype=np.int32),
        "runs": np.asarray(runs, dtype=np.int32).ravel(),
        "origin": origin,
        "outcome": outcome,
        "note": note,
    }


def _count_outcomes(encoded: datasets.Dataset) -> dict[str, int]:
    outcomes = {
        count["values"]: count["counts"] for count in pc.value_counts(encoded.data.column("outcome")).to_pylist()
    }
    truncated = outcomes.get("truncated", 0)
    documents, dropped = outcomes.get("kept", 0) + truncated, outcomes.get("dropped", 0)
    # A row may be several documents (templates that drop earlier thoughts): rendered = documents + dropped.
    counts = {"rendered": documents + dropped, "documents": documents, "truncated": truncated, "dropped": dropped}
    return counts | {name: pc.sum(encoded.data.column(name)).as_py() or 0 for name in ("from_token_ids", "altered")}


def _list_rejected(encoded: datasets.Dataset, rejects: Rejects) -> None:
    for index in np.flatnonzero(pc.equal(encoded.data.column("outcome"), "rejected").to_numpy()):
        row = encoded[int(index)]
        reason, text = json.loads(row["note"])
        rejects(RowError(row["origin"], reason), text)


def _save_documents(encoded: datasets.Dataset, folder: Path) -> datasets.Dataset:
    is_document = pc.is_in(encoded.data.column("outcome"), pa.array(["kept", "truncated"])).to_numpy()
    documents = encoded if is_document.all() else encoded.select(np.flatnonzero(is_document))
    documents.remove_columns(["outcome", "note", "from_token_ids", "altered"]).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def source_of(config: DataConfig) -> SourceConfig:
    """`data.source` as a source of chats."""
    return SourceConfig(path=config.source, split=config.split, subset=config.subset)


def corpus_identity(config: DataConfig, encoder: ChatEncoder) -> dict[str, Any]:
    """Everything that decides the tokens."""
    return {
        "version": ENCODING_VERSION,
        "source": config.source,
        "source_version": source_version(source_of(config)),
        "split": config.split,
        "subset": config.subset,
        "max_length": config.max_length,
        "overlong": config.overlong,
        "bad_rows": config.bad_rows,
        **encoder_identity(encoder),
    }


def encoder_identity(encoder: ChatEncoder) -> dict[str, Any]:
    """Fingerprint of the tokenizer, the chat template and its arguments."""
    return {
        "tokenizer": encoder.tokenizer_fingerprint,
        "chat_template": fingerprint(encoder.tokenizer.chat_template),
        "template_kwargs": encoder.template_kwargs,
    }


def _manifest(
    config: DataConfig, encoder: ChatEncoder, documents: datasets.Dataset, counts: dict[str, int]
) -> dict[str, Any]:
    lengths = list_lengths(documents.data.column("input_ids"))
    runs = list_values(documents.data.column("runs")).reshape(-1, 2)
    quantiles = {f"p{q}": int(np.quantile(lengths, q / 100, method="nearest")) for q in (0, 10, 50, 90, 99, 100)}
    supervised = int((runs[:, 1] - runs[:, 0]).sum())
    return {
        "identity": corpus_identity(config, encoder),
        "model": encoder.tokenizer.name_or_path,
        "counts": counts | {"turns": len(runs), "tokens": int(lengths.sum()), "supervised": supervised},
        "document_length": quantiles | {"mean": round(float(lengths.mean()), 1)},
        "made_by": provenance(),
    }


def list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    """Length of every list of a column, int64 [D], without going through Python."""
    return pc.list_value_length(column).to_numpy().astype(np.int64)


def list_values(column: pa.ChunkedArray) -> np.ndarray:
    """All values of a list column in a row."""
    return pc.list_flatten(column).to_numpy()
