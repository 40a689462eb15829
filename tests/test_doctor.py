"""The doctor prints one line a check, names what is wrong and what to do, and its status tells."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import BIN, ROOT, run_all


def test_a_sound_environment_passes_in_two_processes_and_nothing_stays(tmp_path: Path) -> None:
    variables = {"NUM_PROCESSES": "2", "PROGRAM": "recipes/doctor.py"}
    (output,) = run_all([["launch/torchrun.sh", f"output_dir={tmp_path / 'run'}"]], [variables])
    lines = [line for line in output.splitlines() if line.startswith("ok    ")]
    names = [line.split()[1].rstrip(":") for line in lines]
    assert {"packages", "devices", "messages", "clock"} <= set(names) and "FAIL" not in output, output
    assert "Gloo, 2 processes" in output
    assert list((tmp_path / "run").iterdir()) == []


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
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == processes, done.stdout
    assert all("open files: " in line and "500 allowed: ulimit -n 4096" in line for line in failed)
    assert processes == 1 or "exitcode  : 1 " in done.stderr
