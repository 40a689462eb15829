"""Signals during training: the step ends, a checkpoint is saved, and the resumed run is the uninterrupted one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_launchers import BIN, ROOT, settings_of, slurm_job
from test_training import log_lines
from tiny import experiment
from transformers import TrainerCallback, TrainerState

from pard_train.config import Config
from pard_train.errors import Interrupted
from pard_train.runs import newest_checkpoint
from pard_train.training.trainer import train

STEPS = 8


class Send(TrainerCallback):
    """Sends a signal to this process within a step."""

    def __init__(self, number: int, step: int):
        self.number, self.step = number, step

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """In the step after `step` finished ones."""
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The trained draft's."""
    return load_file(run / "draft" / "model.safetensors")


def check_same(run: Path, other: Path) -> None:
    """Two runs trained the same draft, bit for bit."""
    first, second = weights(run), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def whole(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config = experiment(base_folder, chats_file, folder, max_steps=STEPS, gradient_accumulation_steps=2)
    config.trainer.num_train_epochs = 4
    train(config)
    return config


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_and_the_resumed_run_is_the_uninterrupted_one(
    whole: Config, tmp_path: Path, number: int
) -> None:
    config = replace(whole, output_dir=str(tmp_path / "run"))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with pytest.raises(Interrupted, match=f"step 3 of {STEPS}"):
        train(config, [Send(number, 2)])
    run = tmp_path / "run"
    assert newest_checkpoint(run) == run / "checkpoint-3"  # sealed, though trainer.save_steps is 0
    assert not (run / "draft").exists()
    assert handlers == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    train(replace(config, resume=True))
    check_same(run, Path(whole.output_dir))
    assert [row["step"] for row in log_lines(config)] == list(range(1, STEPS + 1))
    assert (run / "metrics.jsonl").read_text().count("train_runtime") == 1


def test_a_second_ctrl_c_ends_the_run_at_once(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, output_dir=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        train(config, [Send(signal.SIGINT, 2), Send(signal.SIGINT, 2)])
    assert newest_checkpoint(tmp_path / "run") is None


def test_a_signal_in_the_last_step_leaves_a_complete_run(whole: Config, tmp_path: Path) -> None:
    train(replace(whole, output_dir=str(tmp_path / "run")), [Send(signal.SIGTERM, STEPS - 1)])
    check_same(tmp_path / "run", Path(whole.output_dir))


def test_a_checkpoint_is_due_after_minutes(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, output_dir=str(tmp_path / "run"), trainer=replace(whole.trainer, save_minutes=1e-6))
    with pytest.raises(KeyboardInterrupt):  # without a checkpoint of its own
        train(config, [Send(signal.SIGINT, 2), Send(signal.SIGINT, 2)])
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    train(replace(config, resume=True, trainer=replace(config.trainer, save_minutes=1e6)))
    check_same(tmp_path / "run", Path(whole.output_dir))
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


def start(command: list[str], run: Path, *, num_steps: int, **variables: str) -> subprocess.Popen[str]:
    """Start a program in a process group of its own, and wait until the run has logged some steps."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= variables
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    log, end = run / "metrics.jsonl", time.monotonic() + 200
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and log.read_text().count("\n") >= num_steps:
            return process
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(process.communicate()[0][-5000:])


def finish(process: subprocess.Popen[str]) -> str:
    """What a program prints until it ends."""
    try:
        return process.communicate(timeout=200)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


LONG = ["trainer.max_steps=60", "trainer.num_train_epochs=40", "trainer.save_steps=0"]


def test_the_program_ends_with_a_status_and_a_line_of_its_own_also_if_data_workers_get_the_signal(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "recipes/train.py", *settings_of(base_folder, chats_file, run), *LONG]
    process = start([*command, "trainer.dataloader_num_workers=2"], run, num_steps=5)
    os.killpg(process.pid, signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 75, output[-3000:]
    assert "with a checkpoint; to resume, run the same command with resume=true" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert newest_checkpoint(run) is not None
    assert not (run / "draft").exists()


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_signal_to_one_of_two_ranks_ends_both_and_the_resumed_run_is_the_uninterrupted_one(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    def command(run: Path, *more: str) -> list[str]:
        launcher = ["torchrun", "--standalone", "--nproc_per_node", "2", "recipes/train.py"]
        return [*launcher, *settings_of(base_folder, chats_file, run), *LONG, *more]

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start(command(cut), cut, num_steps=5)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 1, output[-3000:]  # torchrun's own
    assert output.count("to resume, run the same command with resume=true") == 1
    assert "exitcode  : 75" in output
    assert newest_checkpoint(cut) is not None
    assert not (cut / "draft").exists()
    for run, more in ((cut, ["resume=true"]), (whole, [])):
        process = start(command(run, *more), run, num_steps=1)
        output = finish(process)
        assert process.returncode == 0, output[-3000:]
    check_same(cut, whole)


@pytest.mark.slow
def test_before_its_time_limit_a_slurm_job_saves_and_goes_back_into_the_queue(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run, job = tmp_path / "run", slurm_job(tmp_path)
    command = ["bash", "launch/slurm.sh", *settings_of(base_folder, chats_file, run), *LONG]
    process = start(command, run, num_steps=2, **job)
    process.send_signal(signal.SIGUSR1)  # SLURM sends it to the job script alone
    output = finish(process)
    assert process.returncode != 0, output[-5000:]
    assert (tmp_path / "requeued").read_text().strip() == job["SLURM_JOB_ID"]
    assert newest_checkpoint(run) is not None and not (run / "draft").exists(), output[-5000:]
