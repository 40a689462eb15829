"""Real launchers with two CPU processes give the losses of one process at equal global batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import experiment, free_port

from pard_train.training.trainer import train

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "recipes/train.py"],
    "deepspeed": ["deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", "PORT", "recipes/train.py"],
    "launch/torchrun.sh": ["launch/torchrun.sh"],
    "launch/deepspeed.sh": ["launch/deepspeed.sh"],
}
STEPS = 4


def launch(command: list[str], base: Path, chats: Path, output_dir: Path, *overrides: str) -> list[dict[str, float]]:
    """Run recipes/train.py on two processes and return its log."""
    settings = [
        f"model.path={base}",
        f"data.source={chats}",
        f"output_dir={output_dir}",
        "draft.num_draft_tokens=4",
        "data.max_length=256",
        "data.slot_budget=768",
        f"trainer.max_steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.precision=fp32",
        "trainer.logging_steps=1",
        "trainer.save_steps=2",
        "trainer.dataloader_num_workers=0",
        *overrides,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUM_PROCESSES": "2", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment["MASTER_PORT"] = port = str(free_port())
    process = subprocess.Popen(
        [*(port if part == "PORT" else part for part in command), *settings],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
    assert process.returncode == 0, output[-5000:]
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def alone(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process that accumulates two packs per step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    settings = {"num_train_epochs": 4, "max_steps": STEPS, "gradient_accumulation_steps": 2}
    train(experiment(base_folder, chats_file, folder, **settings))
    return folder


@pytest.mark.parametrize(
    ("launcher", "deepspeed"),
    [
        ("launch/torchrun.sh", "none"),
        ("torchrun", "zero2"),
        ("deepspeed", "zero0"),
        ("launch/deepspeed.sh", "zero1"),
        ("deepspeed", "zero2"),
        ("deepspeed", "zero3"),
    ],
)
def test_two_processes_train_as_one(
    launcher: str, deepspeed: str, alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    log = launch(LAUNCHERS[launcher], base_folder, chats_file, tmp_path / "run", f"deepspeed={deepspeed}")
    expected = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()][:STEPS]
    for mine, theirs in zip(log, expected, strict=True):
        for name in ("loss", "accepted_length", "supervised_slots", "accuracy/depth_1"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), (name, mine["step"])
        shares = {name: value for name, value in mine.items() if name.startswith("throughput/share_")}
        assert all(share > 0 for share in shares.values()) or deepspeed != "none"
        assert ("throughput/share_communication" in shares) == (deepspeed == "none")  # DeepSpeed reduces out of sight
        assert sum(shares.values()) <= 1
    ours, reference = (load_file(folder / "draft" / "model.safetensors") for folder in (tmp_path / "run", alone))
    assert ours.keys() == reference.keys()
    worst = max(float((ours[name].float() - reference[name]).abs().max()) for name in ours)
    assert worst < STEPS * 1e-3  # Adam moves a weight by at most the learning rate a step
    assert len(list((tmp_path / "run").glob("checkpoint-*/files.json"))) == 2
