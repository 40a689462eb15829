"""Programs with one process survive injected faults: the result is the same, or one line says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JOBS = ["prepare", "regenerate", "encode", "score", "train", "export", "evaluate"]


@pytest.mark.slow
def test_no_fault_gives_another_result_a_traceback_or_leaves_something_behind(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/faults.py", f"only={','.join(JOBS)}", "trials=1", "seed=7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-3000:]
    table = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    head, rows = table[0], [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    assert head[2:] == ["trials", "equal", "one line", "traceback", "left behind", "failed", "wrong"]
    assert {row["program"] for row in rows} == set(JOBS) and len(rows) == 4 * len(JOBS)
    for row in rows:
        assert int(row["equal"]) + int(row["one line"]) == int(row["trials"]) == 1, result.stdout
        assert all(row[name] == "0" for name in head[5:]), result.stdout
