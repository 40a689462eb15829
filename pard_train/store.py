"""The training corpus as tokens on disk: encoded once by many processes, memory-mapped by all that train on it.

A store is a folder with an Arrow data set of documents and a `manifest.json` that names what it was made of. Stores
made on the way to a training run lie in the cache under a fingerprint of tokenizer, chat template, data and options, so
that a changed template never meets old tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm.auto import tqdm

from pard_train.chat import ChatEncoder, Document, Pieces
from pard_train.config import DataConfig, DraftConfig, SourceConfig
from pard_train.errors import RowError, UserError
from pard_train.layout import slot_bounds, supervised_runs
from pard_train.packages import cache_folder
from pard_train.rows import OnBadRow, Rejects, read_rows, source_version, stop
from pard_train.run import MANIFEST_FILE, fingerprint, new_folder, num_cores, provenance, read_json, write_json
from pard_train.schemas import to_chat

# Legend: D documents, L tokens of one, R supervised runs.

ENCODING_VERSION = 1  # raise it when the same rows would become other tokens
REJECTS_FILE = "rejects.jsonl"
DOCUMENTS_FOLDER = "documents"
ROWS_PER_WORKER = 500  # fewer are not worth a process

_ROWS = datasets.Features({"row": datasets.Value("string"), "origin": datasets.Value("string")})
_DOCUMENTS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "runs": datasets.List(datasets.Value("int32")),  # first and past-the-last token of every supervised run
        "origin": datasets.Value("string"),
        "fate": datasets.Value("string"),  # kept | truncated | dropped | rejected
        "note": datasets.Value("string"),  # of a rejected row: the reason and the row
    }
)


class TokenStore(Sequence[Document]):
    """D documents, memory-mapped: reading one touches only its own pages.

    Attributes:
        manifest: source, options, counts and versions.
    """

    def __init__(self, dataset: datasets.Dataset, manifest: Mapping[str, Any]):
        self._dataset = dataset.with_format("numpy", dtype=np.int32)
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """The store of a folder. Raises UserError if it is none."""
        if not is_store(folder):
            raise UserError(f"{folder}: no {MANIFEST_FILE}, so not a folder that data_scripts/encode.py wrote")
        return cls(datasets.load_from_disk(str(folder / DOCUMENTS_FOLDER)), read_json(folder / MANIFEST_FILE))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        row = self._dataset[int(index)]
        return Document(row["input_ids"], _mask_of(row["runs"], len(row["input_ids"])), str(row["origin"]))

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64 [D]."""
        return _list_lengths(self._dataset, "input_ids")

    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of every document, int64 [D]."""
        runs = _list_values(self._dataset, "runs").reshape(-1, 2)
        return np.bincount(self._run_owner(), weights=runs[:, 1] - runs[:, 0], minlength=len(self)).astype(np.int64)

    def slot_bounds(self, draft: DraftConfig) -> np.ndarray:
        """Slots that each document takes at most, int64 [D]."""
        runs = _list_values(self._dataset, "runs").reshape(-1, 2)
        return slot_bounds(self.lengths(), runs, self._run_owner(), draft)

    def _run_owner(self) -> np.ndarray:
        """Document number of every supervised run, int64 [R]."""
        return np.repeat(np.arange(len(self)), _list_lengths(self._dataset, "runs") // 2)

    def summary(self) -> str:
        """One line of counts."""
        count = self.manifest["counts"]
        return (
            f"{count['rows']:,} rows -> {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['supervised']:,} supervised ({count['rejected']:,} rows rejected, {count['dropped']:,} overlong "
            f"documents dropped, {count['truncated']:,} truncated)"
        )


def is_store(folder: str | Path) -> bool:
    """Whether a folder is one that `encode_corpus` wrote."""
    return (Path(folder) / MANIFEST_FILE).is_file() and (Path(folder) / DOCUMENTS_FOLDER).is_dir()


def _mask_of(runs: np.ndarray, length: int) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    for first, end in runs.reshape(-1, 2):
        mask[first:end] = True
    return mask


def _list_lengths(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """Length of every list of a column, int64 [D], without going through Python."""
    return pc.list_value_length(dataset.data.column(column)).to_numpy().astype(np.int64)


def _list_values(dataset: datasets.Dataset, column: str) -> np.ndarray:
    """All values of a list column in a row."""
    return pc.list_flatten(dataset.data.column(column)).to_numpy()


def open_store(config: DataConfig, encoder: ChatEncoder) -> TokenStore:
    """The tokens of `data.source`: a folder of data_scripts/encode.py, or chats that are encoded into the cache once.

    Of several processes the first encodes and the others wait for it, whatever launched them.

    Args:
        config: the source and its options.
        encoder: of the tokenizer to train with.

    Raises:
        UserError: at the first bad row; if nothing is left; or if a folder was made with another tokenizer or template.
    """
    if is_store(config.source):
        store = TokenStore.open(Path(config.source))
        _check_same_settings(store, config, encoder)
        return store
    cache = Path(config.cache_dir) if config.cache_dir else cache_folder() / "tokens"
    folder = cache / fingerprint(_identity(config, encoder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            encode_corpus(config, encoder, folder)
    return TokenStore.open(folder)


def encode_corpus(config: DataConfig, encoder: ChatEncoder, folder: Path) -> TokenStore:
    """Read, render and tokenize a source into a store, written whole or not at all.

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
        encoded = _encode_rows(rows, config, encoder, partial / "encoded.arrow")
        _list_rejected(encoded, rejects)
        counts = {"rows": num_rows, "rejected": rejects.num_rows, **_count_fates(encoded)}
        if not counts["documents"]:
            raise UserError(
                f"data.source={config.source}: nothing to train on in {num_rows} rows ({rejects.num_rows} rejected, "
                f"{counts['dropped']} documents dropped as longer than data.max_length={config.max_length})"
            )
        documents = _save_documents(encoded, partial / DOCUMENTS_FOLDER)
        for scratch in partial.glob("*.arrow"):
            scratch.unlink()
        write_json(partial / MANIFEST_FILE, _manifest(config, encoder, documents, counts, time.time() - started))
    return TokenStore.open(folder)


def _write_rows(config: DataConfig, path: Path, on_bad_row: OnBadRow) -> datasets.Dataset:
    """Every row of the source as JSON, with its origin: what many processes can share."""
    source = source_of(config)
    with ArrowWriter(path=str(path), features=_ROWS) as writer:
        for row, origin in tqdm(read_rows(source, on_bad_row), desc=f"read {source.path}", unit=" rows"):
            writer.write({"row": json.dumps(row, default=str), "origin": origin})
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def _encode_rows(rows: datasets.Dataset, config: DataConfig, encoder: ChatEncoder, path: Path) -> datasets.Dataset:
    """One row per document or rejected row, in order."""
    if not len(rows):  # which `map` would pass on without columns
        return datasets.Dataset.from_dict({name: [] for name in _DOCUMENTS}, features=_DOCUMENTS)
    num_workers = min(config.num_workers or num_cores(), max(1, len(rows) // ROWS_PER_WORKER))
    return rows.map(
        _encode_batch,
        fn_kwargs={"config": config, "encoder": encoder},
        batched=True,
        remove_columns=rows.column_names,
        features=_DOCUMENTS,
        cache_file_name=str(path),
        new_fingerprint=fingerprint(str(path)),
        num_proc=num_workers if num_workers > 1 else None,
        desc="tokenize",
    )


def _encode_batch(batch: dict[str, list[str]], config: DataConfig, encoder: ChatEncoder) -> dict[str, list[Any]]:
    """Rows as documents, tokenized in one call; a rejected row keeps its place."""
    entries: list[Pieces | dict[str, Any]] = []
    for text, origin in zip(batch["row"], batch["origin"], strict=True):
        try:
            chat = to_chat(json.loads(text), source_of(config), origin)
            is_cut = chat.finish_reason == "length"
            entries += encoder.pieces(chat.messages, origin=origin, is_cut=is_cut, tools=chat.tools)
        except RowError as error:
            if config.bad_rows == "error":
                raise
            entries.append(_result([], [], error.origin, "rejected", json.dumps([error.reason, text])))
    documents = iter(encoder.tokenize([entry for entry in entries if isinstance(entry, Pieces)]))
    results = [_fit(next(documents), config) if isinstance(entry, Pieces) else entry for entry in entries]
    return {name: [result[name] for result in results] for name in _DOCUMENTS}


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


def _result(ids: Any, runs: Any, origin: str, fate: str, note: str = "") -> dict[str, Any]:
    return {
        "input_ids": np.asarray(ids, dtype=np.int32),
        "runs": np.asarray(runs, dtype=np.int32).ravel(),
        "origin": origin,
        "fate": fate,
        "note": note,
    }


def _count_fates(encoded: datasets.Dataset) -> dict[str, int]:
    fates = {count["values"]: count["counts"] for count in pc.value_counts(encoded.data.column("fate")).to_pylist()}
    truncated = fates.get("truncated", 0)
    return {
        "documents": fates.get("kept", 0) + truncated,
        "truncated": truncated,
        "dropped": fates.get("dropped", 0),
    }


def _list_rejected(encoded: datasets.Dataset, rejects: Rejects) -> None:
    for index in np.flatnonzero(pc.equal(encoded.data.column("fate"), "rejected").to_numpy()):
        row = encoded[int(index)]
        reason, text = json.loads(row["note"])
        rejects(RowError(row["origin"], reason), text)


def _save_documents(encoded: datasets.Dataset, folder: Path) -> datasets.Dataset:
    is_document = pc.is_in(encoded.data.column("fate"), pa.array(["kept", "truncated"])).to_numpy()
    documents = encoded if is_document.all() else encoded.select(np.flatnonzero(is_document))
    documents.remove_columns(["fate", "note"]).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def source_of(config: DataConfig) -> SourceConfig:
    """`data.source` as a source of chats."""
    return SourceConfig(path=config.source, split=config.split, subset=config.subset)


def _identity(config: DataConfig, encoder: ChatEncoder) -> dict[str, Any]:
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
        "tokenizer": fingerprint(encoder.tokenizer.backend_tokenizer.to_str()),
        "chat_template": fingerprint(encoder.tokenizer.chat_template),
        "template_kwargs": encoder.template_kwargs,
    }


def _check_same_settings(store: TokenStore, config: DataConfig, encoder: ChatEncoder) -> None:
    for name, value in {"max_length": config.max_length, **encoder_identity(encoder)}.items():
        found = store.manifest["identity"][name]
        if found != value:
            raise UserError(
                f"data.source={config.source} was encoded with another {name} ({found}) than this run has ({value}): "
                "encode the chats again with data_scripts/encode.py, or give the run the same settings"
            )


def _manifest(
    config: DataConfig, encoder: ChatEncoder, documents: datasets.Dataset, counts: dict[str, int], seconds: float
) -> dict[str, Any]:
    lengths, runs = _list_lengths(documents, "input_ids"), _list_values(documents, "runs").reshape(-1, 2)
    quantiles = {f"p{q}": int(np.quantile(lengths, q / 100, method="nearest")) for q in (0, 10, 50, 90, 99, 100)}
    supervised = int((runs[:, 1] - runs[:, 0]).sum())
    return {
        "identity": _identity(config, encoder),
        "model": encoder.tokenizer.name_or_path,
        "counts": counts | {"turns": len(runs), "tokens": int(lengths.sum()), "supervised": supervised},
        "document_length": quantiles | {"mean": round(float(lengths.mean()), 1)},
        "tokens_per_second": round(int(lengths.sum()) / seconds),
        "made_by": provenance(),
    }
