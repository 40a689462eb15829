"""What one call costs in seconds and memory, run in a process of its own whose memory is read ten times a second."""

from __future__ import annotations

import math
import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one call cost.

    Attributes:
        result: what it returned.
        seconds: it took.
        main: peak of the process's own memory in MB. Pages of files are not counted: they are cache.
        worker: peak of the memory in MB that one of its workers shares with nobody.
    """

    result: Any
    seconds: float
    main: float
    worker: float


def cost_of(task: Callable[..., Any], *arguments: Any) -> Cost:
    """Run a function of an importable module in a fresh process, and watch it. Ends the program if it fails."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, task, arguments))
    process.start()
    sender.close()
    watch = MemoryWatch(process.pid or 0)
    watch.start()
    try:
        result, seconds = receiver.recv()
    except EOFError:
        raise SystemExit(f"{task.__name__}{arguments} failed") from None
    finally:
        watch.stop.set()
        process.join()
        watch.join()
    return Cost(result, seconds, watch.main, watch.worker)


def _run(sender: Connection, task: Callable[..., Any], arguments: Sequence[Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of workers: what a training program on Linux does
    start = time.perf_counter()
    result = task(*arguments)
    sender.send((result, time.perf_counter() - start))


class MemoryWatch(threading.Thread):
    """Peaks of a process and of its children, in MB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.stop, self.main, self.worker = pid, threading.Event(), 0.0, 0.0

    def run(self) -> None:
        """Look ten times a second."""
        while not self.stop.wait(0.1):
            self.main = max(self.main, _memory(self.pid, "Anonymous"))
            self.worker = max([self.worker, *(_memory(child, "Private_Dirty") for child in _children(self.pid))])


def _children(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return []
    return [int(child) for text in lists for child in text.split()]


def _memory(pid: int, name: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{name}:")), 0.0)


def growth(sizes: Sequence[int], peaks: Sequence[float]) -> str:
    """How peaks in MB grow between the two largest sizes: bytes for each row more, and as a power of rows.

    >>> growth([100, 10_000, 1_000_000], [180.0, 200.0, 240.0])
    '40 bytes a row (rows to the power of 0.04)'
    """
    if len(sizes) < 2 or not all(peaks[-2:]):
        return "not known: one size only, or no workers at one of them"
    per_row = (peaks[-1] - peaks[-2]) * 1e6 / (sizes[-1] - sizes[-2])
    exponent = math.log(peaks[-1] / peaks[-2]) / math.log(sizes[-1] / sizes[-2])
    return f"{per_row:,.0f} bytes a row (rows to the power of {exponent:.2f})"
