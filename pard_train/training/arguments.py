"""Arguments of `transformers.Trainer` for an experiment, and which of them a user may not give."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from pard_train.config import Config
from pard_train.device import default_device
from pard_train.errors import UserError
from pard_train.training.trackers import configure_tracker

NOT_EXTRA = {  # fields of TrainingArguments that would change nothing, or break what a run promises
    "label_smoothing_factor": "is no part of our objectives",
    "data_seed": "has no say: packs are planned by `seed`",
    "train_sampling_strategy": "has no say: packs stand in the order of training",
    "save_only_model": "would keep a run from being resumed as it was",
    "ignore_data_skip": "would keep a run from being resumed as it was",
    "resume_from_checkpoint": "is resume=true here",
    "fp16": "rounds small gradients of the head to nothing: take trainer.bf16=true",
}


def training_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for an experiment.

    Raises:
        UserError: if trainer.optim is unknown, or trainer.extra has a field that TrainingArguments lacks, that is
            set elsewhere, or that would do harm.
    """
    settings = config.trainer
    is_cpu = default_device().type == "cpu"
    ours: dict[str, Any] = {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,  # the packs of all epochs are one list
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": 1,  # one pack; data.slot_budget is the batch size
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "lr_scheduler_type": settings.lr_scheduler_type,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.bf16,
        "optim": settings.optim,
        "torch_compile": settings.torch_compile,
        "logging_steps": settings.logging_steps,
        "logging_first_step": True,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": None,  # `SealCheckpoint` deletes older ones
        "dataloader_num_workers": settings.dataloader_num_workers,
        "remove_unused_columns": False,
        "report_to": configure_tracker(config),
        "use_cpu": is_cpu,
        "ddp_backend": "gloo" if is_cpu and "RANK" in os.environ else None,
        "ddp_find_unused_parameters": False,  # there are none; looking for them walks the graph at every step
        "deepspeed": config.deepspeed or None,
    }
    optimizers = [name.value for name in OptimizerNames]
    if settings.optim not in optimizers:
        raise UserError(f"trainer.optim={settings.optim}: allowed are {', '.join(optimizers)}")
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    if settings.gradient_checkpointing:  # transformers 5.23 renamed it
        ours["activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"] = True
    for name in settings.extra:
        reason = NOT_EXTRA.get(name) or ("is set by a field of its own" if name in ours else None)
        if reason or name not in known:
            raise UserError(f"trainer.extra.{name} {reason or 'is not a field of TrainingArguments'}")
    return ours | settings.extra
