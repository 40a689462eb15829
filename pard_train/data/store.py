"""Tokens on disk, memory-mapped by all processes, cached by a fingerprint of tokenizer, template, data and options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from pard_train.commands import command
from pard_train.config import DataConfig, DraftConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import DOCUMENTS_FOLDER, corpus_identity, encode_corpus, encoder_identity
from pard_train.downloads import cache_folder
from pard_train.errors import UserError
from pard_train.layout import slot_bounds
from pard_train.runs import MANIFEST_FILE, check_sealed, fingerprint, read_json, require_same

TOKENS_FOLDER = "tokens"  # of an output folder, where data_scripts/encode.py writes

# Legend: D documents, L tokens of one, R supervised runs.


class TokenStore(Sequence[Document]):
    """D documents in a folder that `encode_corpus` wrote, memory-mapped. Pickling stores the folder's name only."""

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_json(folder / MANIFEST_FILE)
        try:
            self._table = datasets.load_from_disk(str(folder / DOCUMENTS_FOLDER)).data
            self._columns = [self._table.column(name) for name in ("input_ids", "runs", "origin")]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder} cannot be read ({error}): delete it and run the same command again") from error

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Open the store of a folder. Raises UserError if it is none, or if a file has changed since it was written."""
        if not is_store(folder):
            raise UserError(f"{folder}: no {MANIFEST_FILE}, so not a folder of {command('encode')}")
        check_sealed(folder)
        return cls(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: Any) -> Any:
        row = range(len(self))[index]
        ids, runs, origin = (column[row] for column in self._columns)
        loss_mask = np.zeros(len(ids), dtype=bool)
        for first, end in runs.values.to_numpy().reshape(-1, 2):
            loss_mask[first:end] = True
        return Document(ids.values.to_numpy().copy(), loss_mask, origin.as_py())  # the map is read-only

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64 [D]."""
        return pc.list_value_length(self._table.column("input_ids")).to_numpy().astype(np.int64)

    def num_supervised(self) -> np.ndarray:
        """Supervised tokens of every document, int64 [D]."""
        runs, document = self._all_runs()
        return np.bincount(document, weights=runs[:, 1] - runs[:, 0], minlength=len(self)).astype(np.int64)

    def slot_bounds(self, draft: DraftConfig) -> np.ndarray:
        """Upper bound of every document's slots, int64 [D]."""
        return slot_bounds(self.lengths(), *self._all_runs(), draft)

    def _all_runs(self) -> tuple[np.ndarray, np.ndarray]:
        """First and past-the-last token of every supervised run, int32 [R, 2]; its document's number, int64 [R]."""
        column = self._table.column("runs")
        document = np.repeat(np.arange(len(self)), pc.list_value_length(column).to_numpy() // 2)
        return pc.list_flatten(column).to_numpy().reshape(-1, 2), document

    def description(self) -> dict[str, Any]:
        """The manifest, with the store's folder and the fingerprint of what it was made from."""
        return {"folder": str(self.folder), "fingerprint": fingerprint(self.manifest["identity"]), **self.manifest}

    def summary(self) -> str:
        """One line of counts."""
        count = self.manifest["counts"]
        return (
            f"{count['rows']:,} rows -> {count['documents']:,} documents, {count['tokens']:,} tokens, "
            f"{count['supervised']:,} supervised ({count['rejected']:,} rows rejected, {count['dropped']:,} overlong "
            f"documents dropped, {count['truncated']:,} truncated; {count.get('from_token_ids', 0):,} answers as "
            f"token ids, {count.get('altered', 0):,} trimmed or padded by the template)"
        )


def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Create a memory-mapped array in a new file. Raises OSError if there is no space; the file is removed.

    Disk space is allocated at once: writing to a map on a full disk kills the process (SIGBUS).
    """
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # not on macOS
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    return array


def is_store(folder: str | Path) -> bool:
    """Whether a folder is one that `encode_corpus` wrote."""
    return (Path(folder) / MANIFEST_FILE).is_file() and (Path(folder) / DOCUMENTS_FOLDER).is_dir()


def open_store(config: DataConfig, encoder: ChatEncoder) -> TokenStore:
    """Open the tokens of `data.source`: a folder of data_scripts/encode.py, or chats, encoded once into the cache.

    One process encodes, the others wait. Raises UserError at the first bad row, if nothing is left, or if a folder was
    made with another tokenizer or template.
    """
    if is_store(config.source):
        store = TokenStore.open(Path(config.source))
        wanted = {"max_length": config.max_length, "overlong": config.overlong, **encoder_identity(encoder)}
        require_same(
            {name: store.manifest["identity"][name] for name in wanted},
            wanted,
            what=f"data.source={config.source} was encoded with other settings",
            fix=f"use the same ones, or encode the chats again with {command('encode')}",
        )
        return store
    cache = Path(config.cache_dir) if config.cache_dir else cache_folder() / "tokens"
    folder = cache / fingerprint(corpus_identity(config, encoder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            encode_corpus(config, encoder, folder)
    return TokenStore.open(folder)


def encode_once(data: DataConfig, encoder: ChatEncoder, folder: Path) -> TokenStore:
    """Open the store of a folder, encoded first if missing. Raises UserError if the folder holds other tokens."""
    if not is_store(folder):
        encode_corpus(data, encoder, folder)
    store = TokenStore.open(folder)
    require_same(store.manifest["identity"], corpus_identity(data, encoder), what=f"{folder} holds other tokens")
    return store
