"""Where metrics go: metrics.jsonl always, TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pard_train.config import TrainConfig

METRICS_FILE = "metrics.jsonl"


def configure_tracker(config: TrainConfig) -> list[str]:
    """Prepare the chosen tracker and return what TrainingArguments.report_to wants.

    Weights & Biases reads its key from the environment or `wandb login`; no secret passes through here.
    """
    settings = config.logger
    if settings.report_to == "none":
        return []
    if settings.report_to == "wandb":
        os.environ["WANDB_MODE"] = settings.wandb_mode
        os.environ["WANDB_PROJECT"] = settings.wandb_project
        os.environ["WANDB_NAME"] = settings.run_name or Path(config.output_dir).name
        os.environ["WANDB_DIR"] = config.output_dir
    if settings.report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / "tensorboard")
    return [settings.report_to]


class ConfigToWandb(TrainerCallback):
    """Adds the resolved settings of the experiment to the run on the W&B dashboard."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Trainer's own callback has opened the run by now."""
        if state.is_world_process_zero and "wandb" in args.report_to:
            import wandb

            wandb.config.update({"pard_train": asdict(self.config)})


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl, one JSON object per line, on the first rank."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drop lines past the step a resumed run starts from, so that no step is logged twice."""
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state.global_step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")
