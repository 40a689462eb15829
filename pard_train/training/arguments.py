"""TrainingArguments of an experiment, and the fields of them that a user may not set."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from pard_train.config import Config
from pard_train.device import default_device
from pard_train.errors import UserError

CONVERTED: tuple[str, ...] = ("num_train_epochs", "gradient_checkpointing", "decay_steps", "save_steps", "save_minutes")
CONVERTED += ("save_total_limit", "max_bad_steps", "hang_minutes", "profile_steps", "extra")
NOT_EXTRA = {  # fields of TrainingArguments that have no effect here, or break a promise of the run
    "label_smoothing_factor": "is not part of the objective",
    "data_seed": "has no effect: `seed` plans the packs",
    "train_sampling_strategy": "has no effect: packs are already in training order",
    "eval_strategy": "has no data to evaluate: monitor.every_steps measures tau",
    "load_best_model_at_end": "has no effect: monitor.keep_best keeps the best draft",
    "save_only_model": "would make the run impossible to resume",
    "ignore_data_skip": "would make the run impossible to resume",
    "resume_from_checkpoint": "is set by resume=true",
    "enable_jit_checkpoint": "is not needed: a stop signal saves a checkpoint",
    "ddp_timeout": "has no effect on a CPU: trainer.hang_minutes ends a run that waits for a rank",
    "fp16": "rounds small gradients of the head to zero: use trainer.bf16=true",
}


def training_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for an experiment.

    Settings with TrainingArguments' own names are passed as they are; those in CONVERTED take part in other ways.

    Raises:
        UserError: if trainer.optim is unknown, or trainer.extra has a field that TrainingArguments lacks, that is
            set elsewhere, or that would do harm.
    """
    settings, is_cpu = config.trainer, default_device().type == "cpu"
    names = [field.name for field in dataclasses.fields(settings) if field.name not in CONVERTED]
    ours: dict[str, Any] = {name: getattr(settings, name) for name in names} | {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "num_train_epochs": 1,  # the packs of all epochs are one list
        "per_device_train_batch_size": 1,  # one pack; data.slot_budget is the batch size
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would show the loss of the steps before instead
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": None,  # `SealCheckpoint` deletes older ones
        "remove_unused_columns": False,
        "run_name": config.logger.run_name or Path(config.output_dir).name,
        "report_to": "none",  # `tracking` adds the trackers, each in its own thread
        "use_cpu": is_cpu,
        "ddp_backend": "gloo" if is_cpu and "RANK" in os.environ else None,
        "ddp_find_unused_parameters": False,  # there are none, and searching walks the graph at every step
        "ddp_timeout": max(1800, int(720 * settings.hang_minutes)),  # seconds; the watchdog ends the wait before
        "deepspeed": config.deepspeed or None,
    }
    if settings.decay_steps:
        ours["lr_scheduler_kwargs"] = {"num_decay_steps": settings.decay_steps}
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    if settings.gradient_checkpointing:  # transformers 5.23 renamed it
        ours["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    if "project" in known:
        ours["project"] = config.logger.wandb_project  # of trackio
    optimizers = [name.value for name in OptimizerNames]
    if settings.optim not in optimizers:
        raise UserError(f"trainer.optim={settings.optim}: must be one of {', '.join(optimizers)}")
    for name in settings.extra:
        reason = NOT_EXTRA.get(name) or ("has its own setting" if name in ours else None)
        if reason or name not in known:
            raise UserError(f"trainer.extra.{name} {reason or 'is not a field of TrainingArguments'}: leave it out")
    return ours | settings.extra
