"""One, two and four processes train the same draft at equal global batch, however its parts are sharded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_launchers import STEPS, check_as_alone, log_of, run_all, settings_of
from tiny import build_model, conversations, experiment, exporting
from transformers import PreTrainedTokenizerBase

from pard_train.config import MonitorConfig
from pard_train.evaluation.monitor import build_monitor
from pard_train.publishing.export import export
from pard_train.training.trainer import train

PACKS = 4  # of a step
OFFLOAD = "deepspeed.zero_optimization.offload_optimizer={device: cpu}"  # DeepSpeed compiles its Adam: minutes


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small benchmark."""
    path = tmp_path_factory.mktemp("benchmark") / "questions.jsonl"
    prompts = [chat[0]["content"] for chat in conversations(4, seed=21)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture(scope="module")
def alone(base_folder: Path, chats_file: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process that accumulates all packs of a step, with a monitor."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    settings = {"num_train_epochs": 4, "max_steps": STEPS, "gradient_accumulation_steps": PACKS}
    config = experiment(base_folder, chats_file, folder, **settings)
    evaluate = replace(config.evaluate, benchmarks=[str(questions)])
    monitor = MonitorConfig(every_steps=2, max_prompts=4, max_new_tokens=12)
    config = replace(config, targets=[str(base_folder)], evaluate=evaluate, monitor=monitor)
    train(config, build_monitor(config))
    return folder


def taus_of(run: Path) -> list[dict[str, float]]:
    """What the monitor logged, without times."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k.startswith("eval/tau")} for row in rows if "eval/tau/mean" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (4, ["deepspeed=none"]),
        (2, ["deepspeed=zero1"]),
        (4, ["deepspeed=zero2"]),
        (2, ["deepspeed=zero2", OFFLOAD]),
        (2, ["deepspeed=zero3"]),
        (2, ["deepspeed=zero3", OFFLOAD]),
        (4, ["trainer=fsdp2"]),
    ],
    ids=lambda value: " ".join(value).split("={")[0] if isinstance(value, list) else str(value),
)
def test_processes_and_shards_do_not_change_the_draft(
    processes: int,
    overrides: list[str],
    alone: Path,
    base_folder: Path,
    chats_file: Path,
    questions: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, run), *overrides]
    command += [f"trainer.gradient_accumulation_steps={PACKS // processes}", f"targets=[{base_folder}]"]
    command += [f"evaluate.benchmarks=[{questions}]", "monitor.every_steps=2", "monitor.max_prompts=4"]
    run_all([[*command, "monitor.max_new_tokens=12"]], [{"NUM_PROCESSES": str(processes)}])
    check_as_alone(run, alone)
    is_sharded_by_fsdp = (run / f"checkpoint-{STEPS}" / "optimizer.bin").is_file()  # DDP and DeepSpeed have other names
    assert is_sharded_by_fsdp == ("trainer=fsdp2" in overrides)
    assert len(taus_of(run)) == 1 + STEPS // 2
    for mine, theirs in zip(taus_of(run), taus_of(alone), strict=True):
        assert mine == pytest.approx(theirs, abs=0.1)  # one token of the answers more or less
    (exported,) = export(exporting(str(run), str(tmp_path / "export"), targets=[str(base_folder)]))
    assert (exported / "model.safetensors").is_file()


@pytest.mark.slow
def test_fsdp2_in_bfloat16_computes_what_ddp_computes(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    for trainer in ("default", "fsdp2"):
        settings = [
            *settings_of(base_folder, chats_file, tmp_path / trainer),
            f"trainer={trainer}",
            "trainer.bf16=true",
        ]
        run_all([["launch/torchrun.sh", *settings]], [{"NUM_PROCESSES": "2"}])
    logs = list(zip(log_of(tmp_path / "fsdp2"), log_of(tmp_path / "default"), strict=True))
    for mine, theirs in logs:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert logs[0][0]["loss"] == pytest.approx(logs[0][1]["loss"], rel=1e-6)  # not in float32
    ours, reference = (load_file(tmp_path / t / "draft" / "model.safetensors") for t in ("fsdp2", "default"))
    worst = max(float((ours[name] - reference[name]).abs().max()) for name in ours)
    assert worst < 2 * STEPS * 1e-3  # Adam moves a weight by at most the learning rate a step, in each of both runs
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trainer=default", "trainer=fsdp2", "deepspeed=zero2"])
def test_a_run_writes_no_more_than_its_plan_says(
    how: str, tokenizer: PreTrainedTokenizerBase, chats_file: Path, tmp_path: Path
) -> None:
    build_model("qwen2", seed=0, num_rows=60_000).save_pretrained(tmp_path / "base")  # weights, not tokenizers, count
    tokenizer.save_pretrained(tmp_path / "base")
    settings = [*settings_of(tmp_path / "base", chats_file, tmp_path / "run"), how, "trainer.save_total_limit=1"]
    run_all([["launch/torchrun.sh", *settings]], [{"NUM_PROCESSES": "2"}])
    sizes = {folder.name: size_of(folder) for folder in (tmp_path / "run").iterdir() if folder.is_dir()}
    written = sizes["init"] + sizes["draft"] + 2 * sizes[f"checkpoint-{STEPS}"]  # the new one before the old one goes
    planned = 1e9 * json.loads((tmp_path / "run" / "plan.json").read_text())["disk_gb"]
    assert 0.9 * planned < written < 1.01 * planned  # tokenizers and states of random numbers are not counted


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_a_run_under_fsdp2_resumes_bit_for_bit(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, run), "trainer=fsdp2"]
    run_all([command], [{"NUM_PROCESSES": "2"}])
    whole, losses = load_file(run / "draft" / "model.safetensors"), [row["loss"] for row in log_of(run)]
    shutil.rmtree(run / f"checkpoint-{STEPS}")  # as if it had been stopped before
    shutil.rmtree(run / "draft")
    run_all([[*command, "resume=true"]], [{"NUM_PROCESSES": "2"}])
    again = load_file(run / "draft" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert [row["loss"] for row in log_of(run)] == losses
