"""Two programs in one output folder: the second is refused, and a killed one is in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_launchers import ROOT, settings_of
from test_signals import LONG, finish, start
from tiny import experiment

from pard_train.errors import UserError
from pard_train.evaluation.evaluate import evaluate
from pard_train.evaluation.load import measure_load
from pard_train.publishing.verification import verify
from pard_train.runs import LOCK_FILE, locked, newest_checkpoint
from pard_train.targets.regeneration import write_answers
from pard_train.training.trainer import train

HOLD = "import sys, time; from pathlib import Path; from pard_train.runs import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(300)"


@contextmanager
def another_program(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that works in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse soon."""
    monkeypatch.setattr("pard_train.runs.LOCK_SECONDS", 0.2)


def test_every_program_that_writes_refuses_a_folder_in_use(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_program(folder) as process:
        config = experiment(base_folder, chats_file, folder, max_steps=1)
        for work in (train, evaluate, lambda c: write_answers(c, chats_file, folder), verify, measure_load):
            with pytest.raises(UserError, match=f"output_dir={folder}: another program works in this folder"):
                work(config)
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        process.kill()
        process.wait()
        train(config)  # the lock is gone with the process


def test_a_process_locks_a_folder_again_and_an_empty_one_does_not_stay(tmp_path: Path) -> None:
    with locked(tmp_path / "new"), locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    with locked(tmp_path / "used"):
        pass
    assert (tmp_path / "used" / "file").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_at_once_and_is_the_uninterrupted_one(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    def command(run: Path, *more: str) -> list[str]:
        overrides = [*settings_of(base_folder, chats_file, run), *LONG, "trainer.save_steps=2"]
        return [sys.executable, "recipes/train.py", *overrides, "trainer.dataloader_num_workers=2", *more]

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = start(command(cut), cut, num_steps=5)
    os.kill(process.pid, signal.SIGKILL)  # its data workers end some seconds later
    process.communicate()
    assert newest_checkpoint(cut) is not None
    for run, more in ((cut, ["resume=true"]), (whole, [])):
        process = start(command(run, *more), run, num_steps=1)
        output = finish(process)
        assert process.returncode == 0, output[-3000:]
    first, other = (load_file(run / "draft" / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(first[name], other[name]) for name in first)
