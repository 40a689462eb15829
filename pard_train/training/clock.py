"""Where the time of a training step goes: on the device, between ranks, and in the compiler."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch._dynamo.utils import counters  # the only count that PyTorch keeps
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StepClock(TrainerCallback):
    """Seconds by phase since the last report, by the device's own time where the device keeps one.

    A device runs behind the host. So on an accelerator the borders of phases are events in its stream: they are read
    later, when they have passed anyway, and nothing waits for the device only to be timed. A phase then lasts from the
    moment the device has done all that was asked before it to the moment it has done all that was asked within.

    Args:
        mark: marks a moment, as `device_mark` gives it; None takes the host's clock.

    Phases (one inside of another is no part of it):
        data: waiting for packs; on an accelerator what is left of the wait when the device has nothing else to do.
        forward: of the model, with the gradients of the head.
        backward: with the reduction of gradients as far as it goes on meanwhile; under DeepSpeed all of it, and the
            optimizer's step.
        communication: waiting for other ranks with no gradient left to compute.
        optimizer: the step, without gradient clipping.
    """

    PHASES = ("data", "forward", "backward", "communication", "optimizer")

    def __init__(self, mark: Callable[[], Mark] | None = None) -> None:
        self._mark = mark or HostMark
        self._seconds = dict.fromkeys(self.PHASES, 0.0)
        self._unread: deque[tuple[str, Mark, Mark]] = deque()  # phases whose borders the device may not have passed
        self._phase: str | None = None
        self._since = self._mark()

    def enter(self, name: str | None) -> str | None:
        """Begin a phase, None for no phase. Returns the one that ends with it."""
        ended, now = self._phase, self._mark()
        if ended is not None:
            self._unread.append((ended, self._since, now))
        self._phase, self._since = name, now
        while self._unread and self._unread[0][2].query():
            self._read()
        return ended

    def _read(self) -> None:
        name, start, stop = self._unread.popleft()
        self._seconds[name] += start.elapsed_time(stop) / 1000

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase that lasts as long as the context, whatever phase is around it."""
        around = self.enter(name)
        try:
            yield
        finally:
            self.enter(around)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the optimizer's time."""
        self.enter("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """End the optimizer's time."""
        self.enter(None)

    def watch_reductions(self, model: DistributedDataParallel) -> None:
        """Tell communication from the backward pass, before the first one.

        DDP asks for a reduction as soon as a bucket of gradients is complete; with the last bucket nothing is left to
        compute. The reduction itself is the mean over ranks that DDP takes anyway.
        """

        def reduce_bucket(group, bucket):  # DDP refuses annotations that are strings
            if bucket.is_last():
                self.enter("communication")
            return allreduce_hook(group, bucket)

        model.register_comm_hook(model.process_group, reduce_bucket)

    def report(self) -> dict[str, float]:
        """Seconds by phase; begins anew. Waits for the device to pass the last border."""
        while self._unread:
            self._unread[0][2].synchronize()
            self._read()
        seconds, self._seconds = self._seconds, dict.fromkeys(self.PHASES, 0.0)
        return seconds


class Mark(Protocol):
    """A moment, as `torch.Event` gives it."""

    def query(self) -> bool:
        """Whether it has passed."""

    def synchronize(self) -> None:
        """Wait until it has."""

    def elapsed_time(self, end: Any, /) -> float:
        """Milliseconds from here to a later moment; both have passed."""


class HostMark:
    """Now, by the host's clock."""

    def __init__(self) -> None:
        self._time = time.perf_counter()

    def query(self) -> bool:
        """It has passed."""
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end: HostMark, /) -> float:
        """Milliseconds from here to `end`."""
        return 1000 * (end._time - self._time)


def device_mark(device: torch.device) -> Callable[[], Mark] | None:
    """What marks a moment in a device's stream, None where nothing does: on a CPU, and where events tell no time."""

    def mark() -> Mark:
        event = torch.Event(device=device, enable_timing=True)
        event.record()
        return event

    if device.type == "cpu":
        return None
    try:
        start = mark()
        start.synchronize()
        start.elapsed_time(start)
    except (RuntimeError, NotImplementedError):  # PyTorch's answers where a device's events lack it
        return None
    return mark


def num_compilations() -> int:
    """Graphs that `torch.compile` has made in this process so far, for the model or for FlexAttention."""
    return counters["stats"]["unique_graphs"]
