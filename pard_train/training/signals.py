"""Signals that ask a run to stop: a scheduler's SIGTERM, SIGUSR1 before a time limit, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collect the names of the stop signals that this process receives within the context, instead of ending.

    Without a launcher, a second Ctrl-C ends the process at once. A launcher may pass the first one on.
    """
    received: list[str] = []

    def _receive(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and "RANK" not in os.environ:
            if name in received:
                raise KeyboardInterrupt
            os.write(2, b"\nstopping after this step with a checkpoint (Ctrl-C again: at once, without one)\n")
        received.append(name)

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = {number: signal.signal(number, _receive) for number in STOP_SIGNALS if is_main}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_signals(init: Callable[[int], Any] | None, worker: int) -> None:
    """Start a data worker that ignores stop signals: schedulers send them to every process of a job.

    Args:
        init: what else the worker starts with.
        worker: its number.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
