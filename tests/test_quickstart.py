"""The quickstart: every step is reused only if it was made from the same things; end to end on the real model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import build_model, conversations, experiment
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config, EvaluateConfig, PrepareConfig, RegenerateConfig, SourceConfig, StandInConfig
from pard_train.errors import ThresholdError, UserError
from pard_train.validation import validate_quickstart
from recipes.quickstart import run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def job(base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished job whose target has more vocabulary rows than the draft."""
    root = tmp_path_factory.mktemp("job")
    target, chats = root / "target", root / "chats.jsonl"
    model = build_model("qwen2", seed=1, num_rows=352)
    rows = model.get_input_embeddings().weight.data
    rows[len(tokenizer) :] = rows[: len(tokenizer)].mean(dim=0)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in conversations(30, seed=0)))
    config = replace(
        experiment(base_folder, chats, root / "out", max_steps=2),
        prepare=PrepareConfig(
            sources={"mine": SourceConfig(path=str(chats))},
            held_out_fraction=0.2,
            near_duplicates=1.0,
            decontaminate=[],
            num_workers=1,
        ),
        targets=[str(target)],
        regenerate=RegenerateConfig(max_new_tokens=16, dtype="float32"),
        evaluate=EvaluateConfig(max_prompts=2, max_new_tokens=12, num_draft_tokens=[4]),
    )
    run(config)
    return config


def test_other_settings_are_refused_and_never_shown_as_the_new_result(job: Config) -> None:
    root = Path(job.output_dir)
    with pytest.raises(UserError, match=r"trainer.learning_rate: 0.001 -> 0.002"):
        run(replace(job, trainer=replace(job.trainer, learning_rate=2e-3)))
    with pytest.raises(UserError, match=r"max_new_tokens: 16 -> 8"):  # other answers than the draft has learnt from
        run(replace(job, regenerate=replace(job.regenerate, max_new_tokens=8)))
    (root / "evaluation").rename(root / "evaluation-of-before")
    with pytest.raises(UserError, match=r"export was made from other inputs .*max_prompts: 2 -> 1"):
        run(replace(job, evaluate=replace(job.evaluate, max_prompts=1)))
    shutil.rmtree(root / "evaluation")
    (root / "evaluation-of-before").rename(root / "evaluation")
    run(job)


def test_the_export_is_padded_for_the_targets_and_named_as_the_documents_name_it(job: Config) -> None:
    folder = Path(job.output_dir) / "export"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 352  # the draft's own are 320
    assert f"vllm serve {job.targets[0]} " in (folder / "README.md").read_text()


def test_settings_of_the_evaluation_are_checked_before_anything_starts(job: Config) -> None:
    validate_quickstart(job)
    for wrong, reason in {"live_methods": ["medusa"], "live_rounds": 0, "fail_below": {"all": 0.5}}.items():
        with pytest.raises(UserError, match=f"evaluate.{wrong}"):
            validate_quickstart(replace(job, evaluate=replace(job.evaluate, **{wrong: reason})))


def test_a_stand_in_as_large_as_the_target_is_refused(job: Config) -> None:
    for times, reason in {1: "is the target itself", 65: "at most 64"}.items():
        with pytest.raises(UserError, match=rf"stand_in\.times={times}.*{reason}"):
            validate_quickstart(replace(job, stand_in=StandInConfig(times=times)))


def test_a_threshold_missed_by_the_trained_draft_and_a_part_that_failed_end_the_job_as_they_end_an_evaluation(
    job: Config, tmp_path: Path
) -> None:
    with pytest.raises(ThresholdError) as missed:
        run(replace(job, evaluate=replace(job.evaluate, fail_below={"all": 5.0})))
    assert len(missed.value.misses) == 1  # the untrained draft need not reach it
    assert "draft after" in missed.value.misses[0]
    run(replace(job, output_dir=str(tmp_path / "out")))
    shutil.rmtree(tmp_path / "out" / "evaluation")
    shutil.rmtree(tmp_path / "out" / "export")
    (tmp_path / "out" / "train" / "init" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(SystemExit, match="not exported: a part of the evaluation failed"):  # a text is status 1
        run(replace(job, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "export").exists()


@pytest.mark.slow
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
        "trainer.warmup_steps=0",
        "evaluate.num_draft_tokens=[1,8]",
        "evaluate.max_new_tokens=16",
        "stand_in.times=2",
        "stand_in.num_rounds=1",
        "stand_in.max_new_tokens=8",
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
    assert all(r["speed"]["num_identical_answers"] == r["num_turns"] for r in records if r["mode"] == "live")
    k1 = [r for r in records if r["draft"] == "before" and r["num_draft_tokens"] == 1 and r["mode"] == "replay"]
    assert all(r["histogram"][0] <= 1 for r in k1)  # same weights as the target: its first draft token is always right
    assert (
        "speed on target SmolLM2-135M-Instruct-stand-in-x2"
        in report.split("[6/6] speed on a stand-in for a target 2 times")[1]
    )
    faster = json.loads((folder / "stand_in" / "acceptance.json").read_text())["records"]
    assert {(r["dtype"], r["num_draft_tokens"]) for r in faster} == {("float32", 4)}
    assert all(r["speed"]["num_identical_answers"] == r["num_turns"] == 1 for r in faster if r["mode"] == "live")
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["pard_token"] == 16
    assert config["vocab_size"] == 49152  # the target's own: no row was appended
    assert "| humaneval |" in (folder / "export" / "README.md").read_text()  # the card has the figures
    measured = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in measured if "eval/tau/mean" in row] == [0, 1, 2]
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "train").rglob("*") if path.is_file()}
    assert "done in" in run()
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "train").rglob("*") if path.is_file()}
