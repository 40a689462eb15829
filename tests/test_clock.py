"""Phases of a step by the host's clock, by a device's, and over two processes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState, TrainingArguments

from pard_train.training.clock import StepClock, device_mark

DELAY = 0.5  # seconds that a rank is late


def test_a_clock_adds_up_each_phase_and_begins_anew_after_a_report(tmp_path: object) -> None:
    clock, started = StepClock(), time.perf_counter()
    arguments, state, control = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(), TrainerControl()
    for _ in range(2):
        with clock.phase("data"):
            time.sleep(0.02)
        time.sleep(0.05)  # of no phase
        clock.on_pre_optimizer_step(arguments, state, control)
        time.sleep(0.03)
        clock.on_optimizer_step(arguments, state, control)
    seconds = clock.report()
    assert seconds["data"] >= 0.04
    assert seconds["optimizer"] >= 0.06
    assert seconds["forward"] == seconds["backward"] == 0
    assert sum(seconds.values()) <= time.perf_counter() - started - 0.1
    assert set(clock.report().values()) == {0.0}


def test_a_phase_inside_of_another_is_no_part_of_it() -> None:
    clock = StepClock()
    with clock.phase("backward"):
        time.sleep(0.02)
        with pytest.raises(KeyError), clock.phase("forward"):
            time.sleep(0.2)
            raise KeyError
        time.sleep(0.02)
    time.sleep(0.1)
    seconds = clock.report()
    assert seconds["forward"] >= 0.2
    assert 0.04 <= seconds["backward"] < 0.2


def test_borders_that_the_device_has_not_passed_are_read_with_the_report() -> None:
    late: list[LateMark] = []

    def mark() -> LateMark:
        late.append(LateMark(1000.0 * len(late) ** 2))
        return late[-1]

    clock = StepClock(mark)  # at 0 s
    with clock.phase("forward"):  # noqa: SIM117 (from 1 s)
        with clock.phase("communication"):  # from 4 s to 9 s
            pass
    # to 16 s
    clock.enter("optimizer")  # from 25 s
    late[-1].passed = True
    clock.enter(None)  # to 36 s
    assert not late[-1].passed  # nothing has waited
    report = clock.report()
    assert report == {"data": 0, "forward": 3 + 7, "backward": 0, "communication": 5, "optimizer": 11}
    assert clock.report() == dict.fromkeys(StepClock.PHASES, 0)


class LateMark:
    """A moment of a device that falls behind until somebody waits for it."""

    def __init__(self, milliseconds: float):
        self.milliseconds, self.passed = milliseconds, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: LateMark, /) -> float:
        assert end.passed, "read before the device was there"
        return end.milliseconds - self.milliseconds


def test_the_cpu_has_no_stream_to_mark() -> None:
    assert device_mark(torch.device("cpu")) is None


@pytest.mark.gpu
def test_the_device_s_own_time_is_told_without_waiting_for_it() -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        pytest.skip("no accelerator")
    mark = device_mark(device)
    assert mark is not None
    clock, matrix = StepClock(mark), torch.randn(4096, 4096, device=device)
    for _ in range(2):  # the first is a warm-up
        torch.accelerator.synchronize()
        clock.report()
        start = time.perf_counter()
        with clock.phase("forward"):
            for _ in range(100):
                matrix @ matrix
        issued = time.perf_counter() - start
        torch.accelerator.synchronize()
        seconds = time.perf_counter() - start
    forward = clock.report()["forward"]
    assert issued < forward <= seconds
    assert forward == pytest.approx(seconds, rel=0.2)


def test_waiting_for_a_late_rank_is_communication_and_gradients_are_means_over_ranks(tmp_path: Path) -> None:
    multiprocessing.spawn(one_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    waiting, late = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert waiting["communication"] >= 0.9 * DELAY
    assert waiting["backward"] < DELAY
    assert late["backward"] >= DELAY
    assert 0 < late["communication"] < 0.5 * DELAY


class Late(torch.autograd.Function):
    """The identity, whose gradient takes long on the second rank."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(DELAY * distributed.get_rank())
        return gradient


def one_rank(rank: int, store: str, folder: str) -> None:
    """A step of two linear layers with slow gradients between, on one of two processes."""
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    model = DistributedDataParallel(nn.Sequential(first, Between(), second), find_unused_parameters=False)
    clock = StepClock()
    clock.watch_reductions(model)
    distributed.barrier()
    with clock.phase("backward"):
        model((rank + 1) * torch.eye(8)).sum().backward()
    torch.save(clock.report(), f"{folder}/{rank}.pt")
    # d/dW1 of sum(c * W1.T W2.T) is c times the sums of W2's columns; c is 1 on one rank and 2 on the other.
    torch.testing.assert_close(first.weight.grad, 1.5 * second.weight.detach().sum(0)[:, None].expand(8, 8))
    distributed.destroy_process_group()


class Between(nn.Module):
    """`Late` as a layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Late.apply(x)
