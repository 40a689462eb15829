"""The watchdog: ends a run in which a rank hangs, and names the rank and where it stands."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from pard_train.errors import HUNG
from pard_train.training.callbacks import UsesTrainer
from pard_train.training.processes import is_first_process, num_processes

RANKS_FOLDER = "ranks"  # in the output folder: where every rank stands; kept after a hang
LONG = 10.0  # times the patience for the first steps, and between steps: logs, the monitor, a checkpoint
SLOW = 4  # times the shortest step so far that a step may always take
NUM_FIRST_STEPS = 2  # in which models are compiled
WAITS_IN = ("/torch/distributed/", "/torch/nn/parallel/", "/torch/autograd/", "/deepspeed/")  # for the other ranks


class Watchdog(UsesTrainer):
    """A thread on every rank that writes where the rank stands, and ends it if training makes no progress.

    Ranks wait for each other at every step, so all of them notice. The culprit is a rank whose own thread is silent
    (stopped, dead, or its machine is), or else the one with the least progress. Time in which this rank itself is
    stopped does not count.

    Args:
        output_dir: of the run, on a disk that all ranks share.
        minutes: without progress in a step; 0 watches nothing.
    """

    def __init__(self, output_dir: Path, minutes: float):
        self.folder, self.seconds = output_dir / RANKS_FOLDER, 60 * minutes or math.inf
        self.rank = int(os.environ.get("RANK", 0))
        self.interval = min(10.0, max(0.2, self.seconds / 10))
        self.num_beats = self.count = self.first = 0
        self.place, self.factor, self.patience = "before the first step", LONG, LONG  # now, and in a step
        self.shortest, self.ended = math.inf, time.monotonic()  # duration of a step in seconds, and end of the last
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if is_first_process():
            shutil.rmtree(self.folder, ignore_errors=True)  # of a run that was killed
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.is_over.set()
        self.thread.join()
        with suppress(OSError):  # the last rank removes the folder
            self._file(self.rank).unlink()
            self.folder.rmdir()

    def at(self, place: str) -> None:
        """Note progress of this rank."""
        self.place, self.factor, self.count = place, self.patience, self.count + 1

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Let the trainer note its progress within a step."""
        self.trainer.is_at, self.first = self.at, state.global_step

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """The data of the step are there, or one pack more is done."""
        self.at(f"step {state.global_step + 1}")

    on_substep_end = on_pre_optimizer_step = on_step_begin

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Logs, the monitor and checkpoints follow."""
        self.at(f"log, monitor or checkpoint after step {state.global_step}")
        self.shortest, self.ended = min(self.shortest, time.monotonic() - self.ended), time.monotonic()
        is_first = state.global_step < self.first + NUM_FIRST_STEPS
        self.factor, self.patience = LONG, LONG if is_first else max(1.0, SLOW * self.shortest / self.seconds)

    def _watch(self) -> None:
        seen, waited = -1, 0.0
        while not self.is_over.wait(self.interval):
            self._write()
            waited, seen = waited + self.interval if self.count == seen else 0.0, self.count
            if waited >= self.seconds * self.factor:
                self._end(waited)

    def _write(self) -> None:
        """Replace this rank's file. A full disk must not end the thread."""
        self.num_beats += 1
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        state = {"beat": self.num_beats, "count": self.count, "place": self.place, "pid": os.getpid()}
        state |= {"host": socket.gethostname(), "stack": "".join(traceback.format_stack(frame))}
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self._file(self.rank).with_suffix(".partial")
            partial.write_text(json.dumps(state))
            partial.replace(self._file(self.rank))

    def _end(self, waited: float) -> None:
        """Name the culprits, kill those of this machine, and end this process. Does nothing if training goes on."""
        before, count = self._everyone(), self.count
        for _ in range(4):  # others notice and look, too
            self.is_over.wait(self.interval)
            self._write()
        if self.count != count or self.is_over.is_set():
            return
        ranks = self._everyone()
        least = min((state["count"] for state in ranks.values()), default=0)
        silent = [rank for rank in range(num_processes()) if rank != self.rank and ranks.get(rank) == before.get(rank)]
        behind = [rank for rank, state in ranks.items() if state["count"] == least]
        culprits = silent or [rank for rank in behind if not _waits(ranks[rank])] or behind
        if self.rank == min(ranks.keys() - set(culprits), default=0):
            limit = f"trainer.hang_minutes={self.seconds / 60:g}"
            print(f"watchdog: no progress for {waited:.0f} s ({limit}); ranks at fault: {culprits}", file=sys.stderr)
            for rank in culprits[:4]:
                print(_describe(rank, ranks.get(rank), is_silent=rank in silent), file=sys.stderr)
            print(f"stacks of all ranks: {self.folder}; resume from the last checkpoint", file=sys.stderr, flush=True)
        else:
            time.sleep(4 * self.interval)  # the rank that reports fails when this one ends
        for rank in silent:
            _kill(ranks.get(rank, {}))
        os._exit(HUNG)  # the main thread waits for the others, for ever

    def _everyone(self) -> dict[int, dict[str, Any]]:
        """Where every rank stands, as it wrote itself."""
        states = {}
        for rank in range(num_processes()):
            with suppress(OSError):
                states[rank] = json.loads(self._file(rank).read_text())
        return states

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


def _waits(state: dict[str, Any]) -> bool:
    """Whether a rank stands in a call that waits for the others."""
    innermost = [line for line in state["stack"].splitlines() if line.startswith("  File ")][-1:]
    return any(folder in line for line in innermost for folder in WAITS_IN)


def _describe(rank: int, state: dict[str, Any] | None, *, is_silent: bool) -> str:
    what = "does not answer; it was" if is_silent else "is"
    found = (
        f"({{host}}, process {{pid}}) {what} at: {{place}}\n{{stack}}".format(**state) if state else "never answered"
    )
    return f"rank {rank} {found}".rstrip()


def _kill(state: dict[str, Any]) -> None:
    """Kill a silent rank that has the parent of this one: a stopped process does not end by SIGTERM."""
    with suppress(OSError, KeyError, IndexError):
        stat = Path(f"/proc/{state['pid']}/stat").read_text()
        if state["host"] == socket.gethostname() and int(stat.rpartition(")")[2].split()[1]) == os.getppid():
            os.kill(state["pid"], signal.SIGKILL)
