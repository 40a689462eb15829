"""Every setting of the trainer reaches Trainer with its value, and a run uses it."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import log_lines
from tiny import experiment
from transformers import Trainer, TrainerCallback, TrainingArguments

from pard_train.config import Config, TrainerConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.store import open_store
from pard_train.errors import UserError
from pard_train.model import inspect_base, write_initial_draft
from pard_train.training.arguments import training_settings
from pard_train.training.callbacks import ProfileSteps, SealCheckpoint, StepGuard, UsesTrainer
from pard_train.training.trainer import PardTrainer, build_trainer, train

CONVERTED = {  # checked one by one
    "decay_steps",
    "num_train_epochs",
    "gradient_checkpointing",
    "save_steps",
    "save_total_limit",
    "save_minutes",
    "max_bad_steps",
    "hang_minutes",
    "profile_steps",
    "extra",
}
OTHER = TrainerConfig(
    learning_rate=1e-4,
    num_train_epochs=2,
    max_steps=3,
    gradient_accumulation_steps=2,
    lr_scheduler_type="warmup_stable_decay",
    decay_steps=1,
    warmup_steps=2,
    weight_decay=0.1,
    max_grad_norm=0.5,
    bf16=False,
    gradient_checkpointing=True,
    optim="adamw_torch",
    torch_compile=True,
    logging_steps=2,
    save_steps=4,
    save_minutes=7,
    max_bad_steps=2,
    hang_minutes=50,
    save_total_limit=3,
    dataloader_num_workers=1,
    profile_steps=5,
    extra={"adam_beta2": 0.9, "adam_epsilon": 1e-6},
)


def callback_of(trainer: Trainer, kind: type) -> Any:
    """The trainer's callback of a kind."""
    (found,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kind)]
    return found


def build(config: Config) -> PardTrainer:
    """The trainer of an experiment."""
    base = inspect_base(config.model, config.draft)
    write_initial_draft(base, 4, Path(config.output_dir) / "init")
    store = open_store(config.data, ChatEncoder(base.tokenizer))
    return build_trainer(config, TrainingArguments(**training_settings(config)), store)


def test_every_setting_reaches_trainer_with_its_value(
    base_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # which torch_compile changes
    config, default = experiment(base_folder, chats_file, tmp_path / "run"), TrainerConfig()
    config.trainer = OTHER
    trainer = build(config)
    for field in fields(TrainerConfig):
        value = getattr(OTHER, field.name)
        assert value != getattr(default, field.name), f"give OTHER another {field.name}"
        if field.name not in CONVERTED:
            assert getattr(trainer.args, field.name) == value, field.name
    args = trainer.args
    assert trainer.train_dataset.num_epochs == OTHER.num_train_epochs
    assert getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    assert (args.save_strategy, args.save_steps) == ("steps", OTHER.save_steps)
    assert callback_of(trainer, SealCheckpoint).limit == OTHER.save_total_limit
    assert callback_of(trainer, ProfileSteps).num_steps == OTHER.profile_steps
    assert (args.adam_beta2, args.adam_epsilon) == (0.9, 1e-6)


def test_without_save_steps_nothing_is_saved_on_the_way(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", save_steps=0)
    assert build(config).args.save_strategy == "no"


class StepRecorder(TrainerCallback):
    """Records the optimizer's settings and the norm of the clipped gradient at every step."""

    def __init__(self) -> None:
        self.learning_rates: list[float] = []
        self.norms: list[float] = []
        self.decays: dict[float, set[int]] = {}  # weight decay -> dimensions of the tensors that it applies to

    def on_pre_optimizer_step(self, *_: Any, optimizer: torch.optim.Optimizer, **kwargs: Any) -> None:
        """After clipping."""
        groups = optimizer.param_groups
        (rate,) = {group["lr"] for group in groups}
        self.learning_rates.append(rate)
        gradients = [p.grad.flatten() for group in groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        self.decays = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups}


def test_a_run_uses_warm_up_schedule_weight_decay_and_gradient_clipping(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    settings = {"learning_rate": 1e-3, "max_steps": 6, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    settings |= {"weight_decay": 0.1, "max_grad_norm": 0.5}
    config, recorder = experiment(base_folder, chats_file, tmp_path / "run", **settings), StepRecorder()
    train(config, callbacks=[recorder])
    factors = [0, 1 / 2, *(0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4))]
    assert recorder.learning_rates == pytest.approx([1e-3 * factor for factor in factors])
    assert recorder.decays == {0.1: {2}, 0.0: {1}}  # matrices, and biases and norms
    assert all(row["grad_norm"] > 0.5 for row in log_lines(config))  # before clipping
    assert recorder.norms == pytest.approx([0.5] * 6, rel=1e-3)


def test_a_stable_learning_rate_decays_in_the_last_steps(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    settings = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "decay_steps": 4, "max_steps": 9}
    recorder = StepRecorder()
    train(experiment(base_folder, chats_file, tmp_path / "run", learning_rate=1e-3, **settings), callbacks=[recorder])
    decay = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert recorder.learning_rates == pytest.approx([1e-3 * factor for factor in (0, 0.5, 1, 1, 1, *decay)])


def test_a_profile_has_the_steps_after_the_warm_up(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    train(experiment(base_folder, chats_file, tmp_path / "run", max_steps=8, profile_steps=1))
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert "aten::" in trace.read_text()


@pytest.mark.parametrize(
    "name", ["learning_rat", "label_smoothing_factor", "data_seed", "save_only_model", "fp16", "ddp_timeout"]
)
def test_an_extra_field_that_does_not_exist_does_nothing_or_harms_is_refused(
    base_folder: Path, chats_file: Path, tmp_path: Path, name: str
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", extra={name: 1})
    with pytest.raises(UserError, match=rf"trainer\.extra\.{name} "):
        train(config)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_is_chosen_by_its_name_and_an_unknown_one_is_refused(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trainer\.optim=adamw_fussed: .*adamw_torch_fused"):
        train(experiment(base_folder, chats_file, tmp_path / "run", optim="adamw_fussed"))
    assert not (tmp_path / "run").exists()
    losses = {}
    for name in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        config = experiment(base_folder, chats_file, tmp_path / name, optim=name, max_steps=3)
        train(config)
        losses[name] = [row["loss"] for row in log_lines(config)]
    assert losses["adamw_torch"] == pytest.approx(losses["adamw_torch_fused"], rel=1e-5)
    assert losses["adafactor"][0] == pytest.approx(losses["adamw_torch"][0], rel=1e-5)  # before the first update
    assert abs(losses["adafactor"][2] - losses["adamw_torch"][2]) > 1e-3


class HourPasses(UsesTrainer):
    """Within a step, as the guard sees it."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In the step after `step` finished ones."""
        if state.global_step == self.step:
            callback_of(self.trainer, StepGuard).saved -= 3600


def test_the_minutes_to_the_next_checkpoint_start_again_with_each(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 6, "save_minutes": 30, "save_total_limit": 9}
    run = train(experiment(base_folder, chats_file, tmp_path / "run", **settings), [HourPasses(2)]).parent
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3"]


def test_deepspeed_in_bfloat16_rounds_no_weight_of_a_slot(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    trainer = build(experiment(base_folder, chats_file, tmp_path / "run", bf16=True))
    trainer.is_deepspeed_enabled = True  # then Trainer would cast them
    batch = trainer.data_collator([trainer.train_dataset[0]])
    inputs = trainer._prepare_inputs(batch)
    assert {name: x.dtype for name, x in inputs.items()} == {name: x.dtype for name, x in batch.items()}
