"""The cells of an evaluation's matrix: each finished one is a file, each failed one a line, and the rest goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pard_train.device import device_name
from pard_train.runs import fingerprint, provenance, read_json, write_json

CELLS_FOLDER = "cells"
FAILURES_LOG = "failures.log"  # whole tracebacks; acceptance.json has their last lines


class Matrix:
    """Results of one output folder.

    Attributes:
        folder: of the evaluation.
        failures: what could not be measured, as in acceptance.json.
        made_by: command, versions and machine of this run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.failures: list[dict[str, Any]] = []
        self.made_by = {**provenance(), "device": device_name()}

    def cell(self, kind: str, identity: dict[str, Any], compute: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """(result, made_by) of one cell: from its file if it was finished before, else computed and kept.

        Args:
            kind: first part of the file's name.
            identity: everything that decides the result.
            compute: gives it as JSON.
        """
        path = self._path(kind, identity)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"identity": identity, "result": compute(), "made_by": self.made_by})
        kept = read_json(path)
        return kept["result"], kept["made_by"]

    def is_finished(self, kind: str, identity: dict[str, Any]) -> bool:
        """Whether the result of a cell is there, in this run or from one before."""
        return self._path(kind, identity).exists()

    def _path(self, kind: str, identity: dict[str, Any]) -> Path:
        return self.folder / CELLS_FOLDER / f"{kind}-{fingerprint([kind, identity])}.json"

    @contextmanager
    def surviving(self, *, target: str, draft: str | None = None, benchmark: str | None = None) -> Iterator[None]:
        """Note what fails inside, once for each reason, and let the rest of the matrix run."""
        try:
            yield
        except Exception as error:  # out of memory, a server that died, a missing kernel: everything but Ctrl-C
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            where = {"draft": draft, "target": target, "benchmark": benchmark}
            failure = {**where, "reason": reason}
            if failure in self.failures:
                return
            self.failures.append(failure)
            with (self.folder / FAILURES_LOG).open("a") as log:
                log.write(f"{where}\n{traceback.format_exc()}\n")
            named = ", ".join(f"{kind} {name}" for kind, name in where.items() if name)
            print(f"FAILED: {named}: {reason} (see {FAILURES_LOG}); the rest goes on", flush=True)
