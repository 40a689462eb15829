"""Steps whose loss or gradient is NaN or infinite: skipped on all ranks, counted, and the end of the run if many."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_launchers import BIN, ROOT, settings_of
from test_training import checkpoints, log_lines, weights
from tiny import experiment
from torch import Tensor
from transformers import TrainerState

from pard_train.config import Config, ShowConfig
from pard_train.data.inspection import show_examples
from pard_train.errors import UserError
from pard_train.training.callbacks import SpikeWarning, UsesTrainer
from pard_train.training.trainer import train


class Damage(UsesTrainer):
    """Damages the loss of some steps."""

    def __init__(self, *steps: int, value: float = math.nan):
        self.steps, self.value = steps, value

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Wrap the loss."""
        right = self.trainer.pack_loss

        def pack_loss(*arguments: Any) -> Any:
            loss, statistics = right(*arguments)
            if state.global_step + 1 in self.steps:
                loss = loss * self.value
                statistics.loss.fill_(self.value)
            return loss, statistics

        self.trainer.pack_loss = pack_loss


class ScaleGradients(UsesTrainer):
    """Makes the gradients of a step infinite while its loss stays finite."""

    def __init__(self, step: int):
        self.step = step

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: torch.nn.Module, **_: Any) -> None:
        """Hook one weight."""
        weight = next(model.parameters())
        weight.register_hook(lambda gradient: gradient * (math.inf if state.global_step + 1 == self.step else 1.0))


@pytest.fixture
def config(base_folder: Path, chats_file: Path, tmp_path: Path) -> Config:
    """Six steps."""
    return experiment(base_folder, chats_file, tmp_path / "run", max_steps=6, save_steps=1, num_train_epochs=4)


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Whether a model is sound."""
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("damage", [Damage(3), Damage(3, value=math.inf), ScaleGradients(3)])
def test_a_bad_step_changes_no_weight_and_is_counted(config: Config, damage: UsesTrainer) -> None:
    config.trainer.save_total_limit = 9
    draft = train(config, [damage])
    before, after = (load_file(draft.parent / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all_finite(weights(draft))
    rows = log_lines(config)
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, False, True, False, False, False]
    text = (draft.parent / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    summary = json.loads(text.splitlines()[-1])
    assert math.isfinite(summary["train_loss"])


def test_the_log_is_a_mean_over_the_good_steps_of_its_window(config: Config) -> None:
    config.trainer.logging_steps = 3
    train(config, [Damage(2)])
    single = replace(config, output_dir=f"{config.output_dir}-single", trainer=replace(config.trainer, logging_steps=1))
    train(single, [Damage(2)])
    losses = [row["loss"] for row in log_lines(single)]
    window = log_lines(config)[1]  # the first step has a line of its own
    assert window["loss"] == pytest.approx(losses[2])
    assert window["skipped_steps"] == 1
    assert window["supervised_slots"] == log_lines(single)[2]["supervised_slots"]


def test_a_run_with_a_skipped_step_resumes_bit_for_bit(config: Config) -> None:
    whole = weights(train(config, [Damage(3)]))
    cut = replace(config, output_dir=f"{config.output_dir}-cut")

    class Stop(UsesTrainer):
        """Ends training after the bad step."""

        def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, [Damage(3), Stop()])
    resumed = weights(train(replace(cut, resume=True)))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_many_bad_steps_in_a_row_end_the_run_with_the_step_and_the_good_checkpoint_stays(config: Config) -> None:
    config.trainer.max_bad_steps = 2
    with pytest.raises(UserError, match=r"step 5: the loss .*2 times in a row \(trainer\.max_bad_steps=2\)"):
        train(config, [Damage(2, 4, 5, 6)])
    run = Path(config.output_dir)
    assert not (run / "draft").exists()
    assert all(all_finite(load_file(run / name / "model.safetensors")) for name in checkpoints(config))
    assert checkpoints(config)[-1] == "checkpoint-4"


@pytest.mark.parametrize("most", [3, 9])
def test_a_base_with_a_nan_weight_gives_no_draft(config: Config, base_folder: Path, tmp_path: Path, most: int) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in base_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    config.model.path, config.trainer.max_bad_steps = str(damaged), most
    with pytest.raises(UserError, match="step 3: the loss" if most == 3 else "NaN or infinite weights in step 6"):
        train(config)
    assert not (tmp_path / "run" / "draft").exists()


PROGRAM = f"""
import os, sys
sys.path[:0] = [{str(ROOT / "tests")!r}]
from test_bad_steps import Damage
from pard_train.program import hydra_program
from pard_train.training.trainer import train
from pard_train.validation import validate_train

def run(config):
    train(config, [Damage(3)] if os.environ["RANK"] == "1" else [])

hydra_program("train", validate_train, run)
"""


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", ["none", "zero0", "zero1", "zero2", "zero3"])
def test_a_bad_step_of_one_rank_is_skipped_on_both_or_ends_the_run(
    base_folder: Path, chats_file: Path, tmp_path: Path, deepspeed: str
) -> None:
    run, program = tmp_path / "run", tmp_path / "train.py"
    program.write_text(PROGRAM)
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", str(program), f"deepspeed={deepspeed}"]
    command += [*settings_of(base_folder, chats_file, run), "trainer.save_steps=1", "trainer.save_total_limit=9"]
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **paths}, capture_output=True, text=True, timeout=300)
    if deepspeed == "zero0":  # DeepSpeed takes the step
        assert done.returncode == 1
        assert (
            "step 3: the loss or the gradient norm is NaN or infinite, and DeepSpeed has taken the step" in done.stderr
        )
        assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        return
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all_finite(load_file(run / "draft" / "model.safetensors"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 0, 1, 0]


def test_a_loss_far_above_those_before_it_is_logged_and_noise_is_not(caplog: pytest.LogCaptureFixture) -> None:
    spikes, draw = SpikeWarning(), np.random.default_rng(0)
    state = TrainerState(global_step=7, is_world_process_zero=True)
    for loss in draw.normal(1.0, 0.1, 500):
        spikes.on_log(None, state, None, {"loss": float(loss)})
    spikes.on_log(None, state, None, {"loss": float("nan")})
    assert not caplog.records
    spikes.on_log(None, state, None, {"loss": 3.0})
    assert "step 7: the loss is 3" in caplog.text


def test_the_pack_of_a_skipped_step_is_kept_and_shown(config: Config, base_folder: Path, chats_file: Path) -> None:
    config.trainer.gradient_accumulation_steps = 2
    run = train(config, [Damage(3)]).parent
    files = sorted((run / "bad_packs").iterdir())
    assert [file.name for file in files] == [f"step-3-rank-0-pack-{number}.safetensors" for number in (0, 1)]
    for file in files:
        shown = io.StringIO()
        show = ShowConfig(pack=str(file))
        show_examples(replace(config, show=show), Console(file=shown, width=10_000, highlight=False))
        assert "'loss': nan" in shown.getvalue() and "'step': 3" in shown.getvalue()
        origins = re.findall(rf"^{re.escape(str(chats_file))}:(\d+)$", shown.getvalue(), flags=re.MULTILINE)
        rows = [json.loads(line) for line in chats_file.read_text().splitlines()]
        assert origins
        for number in origins:  # the text below an origin is that of its row
            for message in rows[int(number) - 1]["messages"]:
                assert message["content"].partition("\n")[0] in shown.getvalue()
    with pytest.raises(UserError, match=r"show\.pack=.*config\.json holds no pack"):
        show_examples(replace(config, show=ShowConfig(pack=str(run / "config.json"))))
