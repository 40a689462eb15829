"""Encode chats into a folder of tokens: an Arrow data set of documents, manifest.json and rejects.jsonl."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
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
from pard_train.runs import MANIFEST_FILE, fingerprint, new_folder, num_cores, provenance, seal_folder, write_json

ENCODING_VERSION = 4  # raise it when the same rows would become other tokens
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
    """Read, render and tokenize a source into a new folder, written atomically.

    Raises UserError at the first bad row (bad_rows=error), or if there is nothing to train on.
    """
    started = time.time()
    with new_folder(folder) as partial:
        rejects = Rejects(partial / REJECTS_FILE)
        rows = _write_rows(
            source_of(config), partial / "rows.arrow", rejects if config.bad_rows == "set_aside" else stop
        )
        num_rows = len(rows) + rejects.num_rows
        num_workers = min(config.num_workers or num_cores(), max(1, len(rows) // ROWS_PER_WORKER))
        path = partial / "tokenize.arrow"
        encoded = map_rows(rows, _encode_batch, path, DOCUMENTS, num_workers, config=config, encoder=encoder)
        for index in np.flatnonzero(pc.equal(encoded.data.column("outcome"), "rejected").to_numpy()).tolist():
            reason, text = json.loads(encoded[index]["note"])
            rejects(RowError(encoded[index]["origin"], reason), text)
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
        speeds = {"tokens_per_second": round(speed), "tokens_per_second_per_worker": round(speed / num_workers)}
        write_json(partial / MANIFEST_FILE, manifest | {"speed": {"workers": num_workers, **speeds}})
        seal_folder(partial)


def _write_rows(source: SourceConfig, path: Path, on_bad_row: OnBadRow) -> datasets.Dataset:
    """Every row of the source as JSON, with its origin, in a file that processes share."""
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


def map_rows(
    rows: datasets.Dataset, function: Callable, path: Path, features: datasets.Features, num_workers: int, **given: Any
) -> datasets.Dataset:
    """Map batches of rows to new ones in a file, with several processes; `given` are arguments of the function."""
    if not len(rows):  # `map` would return no columns
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return rows.map(
        function,
        fn_kwargs=given,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        cache_file_name=str(path),
        new_fingerprint=fingerprint(str(path)),
        num_proc=num_workers if num_workers > 1 else None,
        desc=path.stem,
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
    documents = iter(encoder.tokenize([entry for entry in entries if not isinstance(entry, dict)]))
    results = []
    for entry in entries:
        result = entry if isinstance(entry, dict) else _fit(next(documents), config)
        if isinstance(entry, Pieces):
            result["altered"] = entry.num_altered
        elif isinstance(entry, Document):
            result["from_token_ids"] = len(result["runs"]) // 2
        results.append(result)
    return {name: [result[name] for result in results] for name in DOCUMENTS}


def encode_chat(chat: Chat, encoder: ChatEncoder, origin: str) -> Sequence[Document | Pieces]:
    """Documents of one chat: a target's own token ids if the row has them for this tokenizer, else rendered text.

    Raises RowError if the chat cannot be rendered without loss, or has token ids that the tokenizer lacks.
    """
    if chat.token_ids is None or chat.token_ids.tokenizer != encoder.tokenizer_fingerprint:
        return encoder.pieces(chat.messages, origin=origin, is_cut=chat.finish_reason == "length", tools=chat.tools)
    turns, num_ids = chat.token_ids.turns, len(encoder.tokenizer)
    if any(min(ids) < 0 or max(ids) >= num_ids for turn in turns for ids in turn):
        raise RowError(origin, f"token_ids must be from 0 to {num_ids - 1}, as the tokenizer's are")
    return documents_of_ids(turns, origin)


def _fit(document: Document, config: DataConfig) -> dict[str, Any]:
    """A document as a row of the store; data.overlong decides on an overlong one."""
    length, part = len(document.input_ids), document.part(slice(config.max_length))
    is_overlong = length > config.max_length
    if is_overlong and config.overlong == "error":
        raise UserError(
            f"{document.origin}: {length} tokens, but data.max_length={config.max_length}; raise data.max_length "
            "(and data.slot_budget), or set data.overlong=drop or data.overlong=truncate"
        )
    if is_overlong and (config.overlong == "drop" or not part.loss_mask.any()):  # the prompt alone fills the window
        return _result([], [], document.origin, "dropped")
    runs = supervised_runs(part.loss_mask)
    return _result(part.input_ids, runs, document.origin, "truncated" if is_overlong else "kept")


def _result(ids: Any, runs: Any, origin: str, outcome: str, note: str = "") -> dict[str, Any]:
    arrays = {"input_ids": np.asarray(ids, dtype=np.int32), "runs": np.asarray(runs, dtype=np.int32).ravel()}
    return {**arrays, "origin": origin, "outcome": outcome, "note": note, "from_token_ids": 0, "altered": 0}


def _count_outcomes(encoded: datasets.Dataset) -> dict[str, int]:
    outcomes = Counter({c["values"]: c["counts"] for c in pc.value_counts(encoded.data.column("outcome")).to_pylist()})
    truncated, dropped = outcomes["truncated"], outcomes["dropped"]
    documents = outcomes["kept"] + truncated
    # A row may be several documents (templates that drop earlier thoughts): rendered = documents + dropped.
    counts = {"rendered": documents + dropped, "documents": documents, "truncated": truncated, "dropped": dropped}
    return counts | {name: pc.sum(encoded.data.column(name)).as_py() or 0 for name in ("from_token_ids", "altered")}


def _save_documents(encoded: datasets.Dataset, folder: Path) -> datasets.Dataset:
    is_document = pc.is_in(encoded.data.column("outcome"), pa.array(["kept", "truncated"])).to_numpy()
    documents = encoded if is_document.all() else encoded.select(np.flatnonzero(is_document))
    documents.remove_columns(["outcome", "note", "from_token_ids", "altered"]).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def source_of(config: DataConfig) -> SourceConfig:
    """`data.source` as a source of chats."""
    return SourceConfig(path=config.source, split=config.split, subset=config.subset)


def corpus_identity(config: DataConfig, encoder: ChatEncoder) -> dict[str, Any]:
    """All settings and versions that decide the tokens."""
    settings = ("split", "subset", "max_length", "overlong", "bad_rows")
    return {
        "version": ENCODING_VERSION,
        "source": config.source,
        "source_version": source_version(source_of(config)),
        **{name: getattr(config, name) for name in settings},
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
    lengths = pc.list_value_length(documents.data.column("input_ids")).to_numpy()
    runs = pc.list_flatten(documents.data.column("runs")).to_numpy().reshape(-1, 2)
    quantiles = {f"p{q}": int(np.quantile(lengths, q / 100, method="nearest")) for q in (0, 10, 50, 90, 99, 100)}
    supervised = int((runs[:, 1] - runs[:, 0]).sum())
    return {
        "identity": corpus_identity(config, encoder),
        "model": encoder.tokenizer.name_or_path,
        "counts": counts | {"turns": len(runs), "tokens": int(lengths.sum()), "supervised": supervised},
        "document_length": quantiles | {"mean": round(float(lengths.mean()), 1)},
        "made_by": provenance(),
    }
