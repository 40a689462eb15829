"""Processes of a run. Their number may change on resume, because packs are planned for a step and not for a process."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from pard_train.config import Config, decisive
from pard_train.errors import UserError
from pard_train.runs import CONFIG_FILE, read_json, require_same

# Trainer of transformers 5.17 loads the optimizer of several CPU processes to `cpu:0`, which PyTorch does not know.
torch.serialization.register_package(0, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None)


def num_processes() -> int:
    """Processes that the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the process that writes the files of the run."""
    return int(os.environ.get("RANK", 0)) == 0


def for_processes(config: Config) -> Config:
    """The settings of a run for these processes. A resumed run accumulates as many packs as keep its steps; a run that
    torchrun has restarted (--max-restarts) resumes.

    Args:
        config: of a new run, which is returned as it is, or of a resumed one.

    Raises:
        UserError: if the packs of a step cannot be shared evenly, or DeepSpeed has one shard per process.
    """
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    config = replace(config, resume=config.resume or is_restarted)
    started, number = _started(config), num_processes()
    if started is None or started["world_size"] == number:
        return config
    num_packs = started["world_size"] * started["gradient_accumulation_steps"]
    what = f"output_dir={config.output_dir} was trained by {started['world_size']} processes, not {number}"
    if config.deepspeed:
        raise UserError(f"{what}: a checkpoint of DeepSpeed has one part per process, so start as many as before")
    if num_packs % number:
        fitting = ", ".join(str(count) for count in range(1, num_packs + 1) if num_packs % count == 0)
        raise UserError(f"{what}: a step has {num_packs} packs; start {fitting} processes")
    return replace(config, trainer=replace(config.trainer, gradient_accumulation_steps=num_packs // number))


def run_identity(config: Config) -> dict[str, Any]:
    """The settings that decide a run. Of processes and accumulation only the product counts: a resumed run names those
    that it was started with.
    """
    settings, started = {**decisive(config), "world_size": num_processes()}, _started(config)
    accumulation = "gradient_accumulation_steps"
    if started and started["world_size"] * started[accumulation] == num_processes() * settings["trainer"][accumulation]:
        settings["world_size"] = started["world_size"]
        settings["trainer"] = {**settings["trainer"], accumulation: started[accumulation]}
    return settings


def require_equal_processes(facts: dict[str, Any]) -> None:
    """Check that all processes are about to do the same: else they would train a mixture, or wait for each other.

    Args:
        facts: what decides the run, JSON-like. All processes call this.

    Raises:
        UserError: in every process, naming the first one that differs from process 0, and every difference.
    """
    if not torch.distributed.is_initialized():
        return
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, facts)
    for rank, theirs in enumerate(everyone):
        what = f"process {rank} differs from process 0"
        require_same(everyone[0], theirs, what=what, fix="start all with the same command, code, packages and data")


def use_fsdp(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """Compute as DDP does: accelerate would cast the loss, and knows FSDP on accelerators only."""
    plugin = FullyShardedDataParallelPlugin(**settings)
    plugin.mixed_precision_policy = MixedPrecisionPolicy()  # autocast chooses the dtype of products
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):  # the first copies the second now and then
        state.distributed_type = DistributedType.FSDP


def _started(config: Config) -> dict[str, int] | None:
    """Processes and accumulation that the run in the output folder was started with; None if there is none."""
    file = Path(config.output_dir) / CONFIG_FILE
    if not config.resume or not file.is_file():
        return None
    old = read_json(file)
    accumulation = old.get("trainer", {}).get("gradient_accumulation_steps", 1)
    return {"world_size": old.get("world_size", 1), "gradient_accumulation_steps": accumulation}
