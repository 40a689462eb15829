"""Where metrics and results go: metrics.jsonl always, TensorBoard or Weights & Biases on request."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pard_train.config import Config, LoggerConfig
from pard_train.reports.records import (
    PICTURE_FILE,
    Result,
    acceptance_records,
    at_largest_k,
    distinct,
    flatten,
    label_of,
)
from pard_train.runs import new_file

METRICS_FILE = "metrics.jsonl"


def configure_tracker(config: Config) -> list[str]:
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

    def __init__(self, config: Config):
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
        """Drop lines past the step that a resumed run starts from, and summaries: none is logged twice."""
        if state.is_world_process_zero and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True) if state.global_step else []
            whole = [line for line in lines if line.endswith("\n")]  # a full disk may have cut the last one
            with new_file(self.path) as partial:
                rows = [(line, json.loads(line)) for line in whole]
                kept = [line for line, row in rows if row["step"] <= state.global_step and "train_runtime" not in row]
                partial.write_text("".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line, with null for NaN and infinity. Names with `eval_` get `eval/`, as trackers show them."""
        if state.is_world_process_zero:
            finite = {name: value if math.isfinite(value) else None for name, value in (logs or {}).items()}
            named = {re.sub("^eval_", "eval/", name): value for name, value in finite.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **named}) + "\n")


def log_evaluation(logger: LoggerConfig, name: str, result: Result, page: Path) -> None:
    """Log a result to W&B if that is the chosen tracker: records, tau by draft, the picture and the page.

    Args:
        logger: settings of the tracker.
        name: of the run, unless the settings name it.
        result: acceptance.json.
        page: report.html; acceptance.png is next to it, and W&B writes its files there.
    """
    if logger.report_to != "wandb":
        return
    import wandb

    with wandb.init(
        project=logger.wandb_project,
        name=logger.run_name or name,
        mode="offline" if logger.wandb_mode == "offline" else "online",
        job_type="evaluation",
        dir=page.parent,
    ) as run:
        rows = [flatten({k: v for k, v in r.items() if k != "groups"}) for r in result["records"]]
        columns = distinct(column for row in rows for column in row)
        table = wandb.Table(columns=[*columns], data=[[row.get(column) for column in columns] for row in rows])
        picture = wandb.Image(str(page.with_name(PICTURE_FILE)))
        html = wandb.Html(page.read_text(), inject=False)
        run.log({"eval/records": table, "eval/acceptance": picture, "eval/report": html})
        for r in at_largest_k(acceptance_records(result)):
            run.summary[f"eval/tau/{r['target']}/{r['benchmark']}/{label_of(r)}"] = r["tau"]
