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

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

MAX_FAILURES = 10  # after which a tracker receives nothing more
END_SECONDS = 90.0  # to wait for a tracker at the end of a run


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
        self.num_failures, self.last_step, self.is_training = 0, time.monotonic(), False
        self.thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Open the tracker's run."""
        self.last_step, self.is_training = time.monotonic(), True
        self._later("on_train_begin", args, state, control, **kw)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note that training is alive."""
        self.last_step = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Pass one line of the log."""
        self._later("on_log", args, state, control, **{**kw, "logs": dict(kw.get("logs") or {})})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Pass a checkpoint."""
        self._later("on_save", args, state, control, **kw)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Pass the end of training."""
        self.is_training = False
        self._later("on_train_end", args, state, control, **kw)

    def end(self, **outcome: Any) -> None:
        """Hand the outcome to the tracker's `end`, and wait for everything to be sent."""
        self.is_training = False
        if hasattr(self.tracker, "end"):
            self.calls.put(partial(self.tracker.end, **outcome))
        self.calls.put(None)
        self.thread.join(END_SECONDS)
        if self.thread.is_alive():
            logger.warning(
                "%s has not received everything after %.0f s; the run ends without it", self.name, END_SECONDS
            )

    def _later(self, event: str, args: TrainingArguments, state: TrainerState, control: Any, **kw: Any) -> None:
        self.calls.put(partial(getattr(self.tracker, event), args, copy(state), copy(control), **kw))

    def _work(self) -> None:
        while True:
            try:
                call = self.calls.get(timeout=self.stall_seconds / 10 or None)
            except Empty:
                call = self._stalled
            if call is None:
                return
            self._try(call)

    def _stalled(self) -> None:
        """Tell the tracker once if no step has ended for too long."""
        seconds = time.monotonic() - self.last_step
        if self.is_training and seconds > self.stall_seconds and hasattr(self.tracker, "stalled"):
            self.last_step = float("inf")  # until the next step
            self.tracker.stalled(seconds)

    def _try(self, call: Callable[[], Any]) -> None:
        if self.num_failures == MAX_FAILURES:
            return
        try:
            call()
        except Exception as error:  # whatever a tracker raises, training goes on
            self.num_failures += 1
            if self.num_failures in (1, MAX_FAILURES):
                what = "it receives nothing more" if self.num_failures == MAX_FAILURES else "training continues"
                logger.warning("%s failed: %s: %s; %s", self.name, type(error).__name__, error, what)
