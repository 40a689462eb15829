"""The whole job on the real SmolLM2-135M at tiny size: prompts, answers, training, export, evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_quickstart_runs_end_to_end_on_the_real_model_and_a_second_run_skips_what_is_done(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    command = [
        sys.executable,
        "recipes/quickstart.py",
        "experiment=quickstart",
        f"output_dir={folder}",
        "prepare.num_rows=6",
        "evaluate.max_prompts=2",
        "regenerate.max_new_tokens=24",
        "trainer.num_train_epochs=2",  # of one pack
        "evaluate.num_draft_tokens=[1,8]",
        "evaluate.max_new_tokens=16",
        "monitor.every_steps=1",
        "monitor.max_prompts=1",
        "monitor.max_new_tokens=8",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run() -> str:
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    report = run()
    assert "tau by number of draft tokens" in report
    records = json.loads((folder / "evaluation" / "acceptance.json").read_text())["records"]
    assert {r["benchmark"] for r in records} == {"humaneval", "gsm8k", "mt_bench"}
    assert all(r["speed"]["num_equal_texts"] == r["num_turns"] for r in records if r["mode"] == "live")
    k1 = [r for r in records if r["draft"] == "before" and r["num_draft_tokens"] == 1 and r["mode"] == "replay"]
    assert all(r["histogram"][0] <= 1 for r in k1)  # same weights as the target: its first draft token is always right
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["pard_token"] == 16
    assert config["vocab_size"] == 49152  # the target's own: no row was appended
    assert "| humaneval |" in (folder / "export" / "README.md").read_text()  # the card has the figures
    measured = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured if "eval/tau/mean" in row] == [0, 1, 2]
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "train").rglob("*") if path.is_file()}
    assert "done in" in run()
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "train").rglob("*") if path.is_file()}
