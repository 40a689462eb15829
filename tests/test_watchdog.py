"""A rank that hangs ends the run within a bound, and the rank and where it stood are named."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from test_launchers import LAUNCHERS, ROOT, settings_of
from test_signals import LONG, children, finish, start
from tiny import free_port

from pard_train.runs import newest_checkpoint
from pard_train.training.watchdog import RANKS_FOLDER

BOUND = 6  # seconds
WAITING = [*LONG, "trainer.save_steps=2", f"trainer.hang_minutes={BOUND / 60}"]
SLEEP = """
import os, sys, time
import train
from pard_train.program import hydra_program
from pard_train.training.trainer import PardTrainer
from pard_train.validation import validate_train

right = PardTrainer.compute_loss

def sleeps_for_ever(self, *args, **kwargs):
    if os.environ.get("RANK", "0") == os.environ["SLEEPER"] and self.state.global_step == 5:
        time.sleep(1e6)
    return right(self, *args, **kwargs)

PardTrainer.compute_loss = sleeps_for_ever
sys.argv[0] = train.__file__
hydra_program("train", validate_train, train.run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run_and_is_named_with_its_place(
    base_folder: Path, chats_file: Path, tmp_path: Path, stopped: int
) -> None:
    run = tmp_path / "run"
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, run), *WAITING]
    process = start(command, run, num_steps=5, NUM_PROCESSES="2")
    pid = children(process.pid)[stopped]
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    output = finish(process)
    assert time.monotonic() - started < 5 * BOUND, output[-3000:]
    assert process.returncode == 1, output[-3000:]  # torchrun's own
    assert "exitcode  : 124" in output
    named = [line for line in output.splitlines() if line.startswith("rank ")]
    assert len(named) == 1, output[-3000:]
    assert f"rank {stopped} (" in named[0] and f"process {pid}) does not answer; it was at: " in named[0]
    assert "trainer.py" in output.partition(named[0])[2]  # its stack
    assert newest_checkpoint(run) is not None and not (run / "draft").exists()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_rank_that_makes_no_progress_is_told_from_those_that_wait_for_it(
    base_folder: Path, chats_file: Path, tmp_path: Path, launcher: str
) -> None:
    run, program = tmp_path / "run", tmp_path / "sleep.py"
    program.write_text(SLEEP)
    command = [str(free_port()) if part == "PORT" else part for part in LAUNCHERS[launcher][:-1]]
    command += [str(program), *settings_of(base_folder, chats_file, run), *WAITING]
    process = start(command, run, num_steps=5, SLEEPER="1", PYTHONPATH=f"{ROOT}:{ROOT / 'recipes'}")
    output = finish(process)
    assert process.returncode == (1 if launcher == "torchrun" else 124), output[-3000:]
    assert output.count("ranks at fault: [1]") == 1, output[-3000:]
    assert ") is at: step 6" in output and "sleeps_for_ever" in output
    assert sorted(path.name for path in (run / RANKS_FOLDER).glob("*.json")) == ["0.json", "1.json"]
