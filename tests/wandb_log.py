"""Reads the .wandb file of an offline run: what W&B would show after `wandb sync`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as protocol

BLOCK_BYTES = 1 << 15  # the file is a LevelDB log
FULL, LAST = 1, 4


@dataclass
class Run:
    """One offline run.

    Attributes:
        opened: what wandb.init received: id, project, group, job type, name, tags, config.
        history: logged rows, media included.
        summary: last summary value by name.
        metrics: definitions by name or pattern.
        artifacts, alerts: in order.
    """

    opened: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: dict[str, Any]
    artifacts: list[Any]
    alerts: list[Any]

    def series(self, name: str) -> list[Any]:
        """The values of one name, in order."""
        return [row[name] for row in self.history if name in row]


def offline_runs(folder: Path) -> list[Run]:
    """Runs in a folder's wandb/, oldest first."""
    return [read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def read_run(path: Path) -> Run:
    """One .wandb file."""
    run = Run(None, {}, [], {}, {}, [], [])
    for record in records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.opened = record.run
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            run.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            items = record.history.item
            run.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "summary":
            run.summary |= {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
        elif kind == "metric":
            run.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "alert":
            run.alerts.append(record.alert)
    return run


def records(content: bytes) -> Iterator[Any]:
    """Every record: fragments of [checksum 4, length 2, type 1, data] in blocks, after a header of 7 bytes."""
    place, data = 7, b""
    while place + 7 <= len(content):
        if BLOCK_BYTES - place % BLOCK_BYTES < 7:  # the rest of a block is padding
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            record = protocol.Record()
            record.ParseFromString(data)
            data = b""
            yield record
