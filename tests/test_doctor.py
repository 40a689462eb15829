"""The doctor prints one line a check, names what is wrong and what to do, and its status tells."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import BIN, ROOT


def test_a_sound_environment_passes_in_two_processes_and_nothing_stays(tmp_path: Path) -> None:
    variables = {"NUM_PROCESSES": "2", "PROGRAM": "recipes/doctor.py", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["launch/torchrun.sh", f"output_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False
    )
    output = done.stdout
    assert done.returncode == int("FAIL" in output)  # a disk may be full
    passed = {line[6:].partition(":")[0] for line in output.splitlines() if line.startswith("ok    ")}
    assert passed >= {"packages", "devices", "messages", "shared disk", "clock", "open files"}, output
    assert "Gloo, 2 processes" in output
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_that_a_killed_build_left_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "some_op" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    command = [sys.executable, "recipes/doctor.py", f"output_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    new = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "ok    extension locks: none left" in new.stdout
    os.utime(lock, (0, 0))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"FAIL  extension locks: process 0: {lock}: delete it" in done.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failed_check_says_what_to_do_and_gives_status_1(tmp_path: Path, processes: int) -> None:
    def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (500, 500))

    command = [sys.executable, "recipes/doctor.py"] if processes == 1 else ["launch/torchrun.sh"]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    environment["PROGRAM"] = "recipes/doctor.py"
    command.append(f"output_dir={tmp_path}")
    done = subprocess.run(
        command, cwd=ROOT, env=environment, preexec_fn=few_files, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL  open files")]
    assert len(failed) == processes, done.stdout
    assert all("500 allowed: ulimit -n 4096" in line for line in failed)
    assert processes == 1 or "exitcode  : 1 " in done.stderr
