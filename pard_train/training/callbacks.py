"""What happens beside the steps of a run: epochs, checkpoints and how often, and the bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from pard_train.runs import prune_checkpoints, seal_checkpoint

WARM_UP_LOGS = 2  # the first pack is compiled for, and the second, whose number of supervised slots is another one


class DataEpoch(TrainerCallback):
    """Shows epochs over the data: to Trainer, the packs of all epochs are one epoch."""

    def __init__(self, num_epochs: int):
        self.num_epochs = num_epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stretch Trainer's 0..1 to 0..num_epochs."""
        state.epoch = (state.epoch or 0.0) * self.num_epochs


class OwnSteps(TrainerCallback):
    """Logs and saves as often as this run was told to: a resumed Trainer would take the steps of the run before."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Overwrite what the checkpoint brought."""
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)


class SealCheckpoint(TrainerCallback):
    """Marks a checkpoint as whole, once every rank has written its part, and only then deletes older ones.

    Trainer would delete them before, and a run that is killed in between would have nothing to go on from.

    Args:
        limit: checkpoints that are kept.
    """

    def __init__(self, limit: int):
        self.limit = limit

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for all ranks, write the list of files, and delete the oldest checkpoints above the limit."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            prune_checkpoints(Path(args.output_dir), self.limit)


class ShortProgress(ProgressCallback):
    """Trainer's progress bar with one short line per log."""

    def __init__(self) -> None:
        super().__init__()
        self.num_logs, self.has_warned = 0, False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print loss, expected accepted length and speed above the bar, and once that something was compiled again."""
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(
                f"step {state.global_step:>6}  loss {float(logs['loss']):.3f}  expected accepted length "
                f"{logs['accepted_length']:.2f}  {logs['supervised_slots_per_second']:,.0f} supervised slots/s"
                f"{self._warning(logs)}"
            )

    def _warning(self, logs: dict[str, float]) -> str:
        self.num_logs += 1
        num_graphs = logs.get("throughput/compilations", 0)
        if self.num_logs <= WARM_UP_LOGS or self.has_warned or not num_graphs:
            return ""
        self.has_warned = True
        return f"  ({num_graphs} graphs were compiled again, which takes time; TORCH_LOGS=recompiles tells why)"
