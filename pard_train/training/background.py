"""Trackers in a thread of their own: a slow or failing tracker neither delays nor stops training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from queue import Empty, Queue
from threading import Thread
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)

MAX_FAILURES = 10  # after which a tracker receives nothing more
END_SECONDS = 90.0  # to wait for a tracker at the end of a run
EVENTS = ("on_train_begin", "on_log", "on_save", "on_train_end")  # that trackers receive
NEVER = float("inf")  # time of the last step while none is awaited


class Background(TrainerCallback):
    """Passes the events of a run to a tracker's callback, in order, in a daemon thread. For the first rank.

    Args:
        name: of the tracker, for messages.
        tracker: its callback. If it has a method `stalled`, that is called when no step ends for a while; if it has a
            method `end`, that is called last.
        stall_seconds: without a step until `stalled` is called; 0: never.
    """

    def __init__(self, name: str, tracker: TrainerCallback, stall_seconds: float = 0.0):
        self.name, self.tracker, self.stall_seconds = name, tracker, stall_seconds
        self.calls: Queue[Callable[[], Any] | None] = Queue()
        self.num_failures, self.last_step = 0, NEVER
        self.thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()
        for event in EVENTS:
            setattr(self, event, partial(self._later, event))

    def _later(self, event: str, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        """Queue an event with the state of now."""
        self.last_step = time.monotonic() if event == "on_train_begin" else self.last_step
        self.last_step = NEVER if event == "on_train_end" else self.last_step
        arguments = {**others, "logs": dict(logs)} if logs is not None else others
        self.calls.put(partial(getattr(self.tracker, event), args, copy(state), copy(control), **arguments))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note that training is alive."""
        self.last_step = time.monotonic()

    def end(self, **outcome: Any) -> None:
        """Hand the outcome to the tracker's `end`, and wait for everything to be sent."""
        self.last_step = NEVER
        if hasattr(self.tracker, "end"):
            self.calls.put(partial(self.tracker.end, **outcome))
        self.calls.put(None)
        self.thread.join(END_SECONDS)
        if self.thread.is_alive():
            logger.warning(
                "%s has not received everything after %.0f s; the run ends without it", self.name, END_SECONDS
            )

    def _work(self) -> None:
        while True:
            try:
                call = self.calls.get(timeout=self.stall_seconds / 10 or None)
            except Empty:
                call = self._watch
            if call is None:
                return
            if self.num_failures < MAX_FAILURES:
                self._try(call)

    def _watch(self) -> None:
        """Tell the tracker once if no step has ended for too long."""
        seconds = time.monotonic() - self.last_step
        if seconds > self.stall_seconds and hasattr(self.tracker, "stalled"):
            self.last_step = NEVER
            self.tracker.stalled(seconds)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever a tracker raises, training goes on
            self.num_failures += 1
            if self.num_failures in (1, MAX_FAILURES):
                what = "it receives nothing more" if self.num_failures == MAX_FAILURES else "training continues"
                logger.warning("%s failed: %s: %s; %s", self.name, type(error).__name__, error, what)
