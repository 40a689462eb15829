"""Trainer callbacks: epochs, intervals, interruptions, checkpoints, metrics.jsonl, progress bar, profiler trace."""

from __future__ import annotations

import json
import logging
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from pard_train.errors import UserError
from pard_train.runs import METRICS_FILE, new_file, prune_checkpoints, read_metrics, seal_folder

logger = logging.getLogger(__name__)

WARM_UP_LOGS = 2  # compilation happens for the first pack, and for the second with another number of supervised slots
WARM_UP_STEPS = 5  # before a profile
BAD_PACKS_FOLDER = "bad_packs"  # of a run: packs of steps with a loss or gradient that is NaN or infinite
SPIKE_LOGS = 20  # logged losses that the next one is compared with
SPIKE_SIZE = 10  # median distances above their median; noise alone reaches 7 once in a million logs


class DataEpoch(TrainerCallback):
    """Logs epochs over the data: for Trainer, the packs of all epochs are one epoch."""

    def __init__(self, num_epochs: int):
        self.num_epochs = num_epochs

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Scale Trainer's 0..1 to 0..num_epochs."""
        state.epoch = (state.epoch or 0.0) * self.num_epochs


class CurrentIntervals(TrainerCallback):
    """Logs and saves at the intervals of the current settings; a resumed Trainer would use those of the checkpoint."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Overwrite the intervals that the checkpoint brought."""
        state.logging_steps, state.save_steps = int(args.logging_steps), int(args.save_steps)


class UsesTrainer(TrainerCallback):
    """A callback with access to the trainer, a PardTrainer, which `build_trainer` or `train` sets."""

    trainer: Any


class StepGuard(UsesTrainer):
    """Skips bad steps, saves by minutes, and ends the run with a checkpoint after a signal. All ranks decide alike.

    A step is bad if any loss or the gradient norm is NaN or infinite on any rank.

    Args:
        received: stop signals of this process, from `stop_signals`.
        output_dir: folder of the run, for the packs of bad steps.
        max_bad_steps: in a row, at which the run stops.
        save_minutes: since the last checkpoint, after which the next one is due; 0: never.
    """

    def __init__(self, received: Sequence[str], output_dir: Path, max_bad_steps: int, save_minutes: float = 0):
        self.received, self.output_dir, self.max_bad_steps = received, output_dir, max_bad_steps
        self.save_seconds, self.saved = 60 * save_minutes or math.inf, time.monotonic()
        self.is_stopping = self.is_due = False

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare with all ranks: one all-reduce and one synchronization a step.

        Raises:
            UserError: after too many bad steps in a row, or if DeepSpeed has taken a bad one: in float32, ZeRO-0 does
                not check gradients.
        """
        trainer, accelerator = self.trainer, self.trainer.accelerator
        is_due = time.monotonic() - self.saved > self.save_seconds
        mine = torch.tensor([bool(self.received), is_due], device=args.device)
        flags = torch.cat([~trainer.is_finite[None], mine]).float()
        num_bad, num_stopping, num_due = accelerator.reduce(flags, reduction="sum").tolist()
        self.is_stopping, self.is_due = num_stopping > 0, num_due > 0
        if not num_bad:
            trainer.num_bad_steps = 0
            return
        self._keep_packs(state.global_step + 1)
        trainer.skip_step()
        what = f"step {state.global_step + 1}: the loss or the gradient norm is NaN or infinite"
        is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_deepspeed and not accelerator.optimizer_step_was_skipped:
            raise UserError(f"{what}, and DeepSpeed has taken the step: resume the run from its newest checkpoint")
        if trainer.num_bad_steps >= self.max_bad_steps:
            raise UserError(
                f"{what}, {trainer.num_bad_steps} times in a row (trainer.max_bad_steps={self.max_bad_steps}): check "
                "model.path and data.scores, or lower trainer.learning_rate in a new output_dir"
            )
        if state.is_world_process_zero:
            logger.warning("%s; skipped", what)

    def _keep_packs(self, step: int) -> None:
        """Write the packs whose loss is bad, or all if the gradient alone is. All ranks call it."""
        trainer = self.trainer
        losses = [float(loss) for loss in trainer.pack_losses]
        bad = torch.tensor([not math.isfinite(loss) for loss in losses])
        is_any = bool(trainer.accelerator.reduce(bad.sum().to(trainer.args.device), reduction="sum"))
        folder = self.output_dir / BAD_PACKS_FOLDER
        rank, num_ranks = trainer.args.process_index, trainer.args.world_size
        for number, pack in enumerate(trainer.packs):
            if (not is_any or bad[number]) and len(list(folder.glob("*.safetensors"))) < 20:
                place = ((step - 1) * trainer.args.gradient_accumulation_steps + number) * num_ranks + rank
                origins = [member.document.origin for member in trainer.train_dataset[place]]
                facts = {"step": step, "rank": rank, "loss": losses[number], "origins": origins}
                with new_file(folder / f"step-{step}-rank-{rank}-pack-{number}.safetensors") as partial:
                    save_file(pack, partial, {"pack": json.dumps(facts)})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save where a checkpoint is due, and stop after a signal."""
        control.should_save |= self.is_stopping or self.is_due
        control.should_training_stop |= self.is_stopping

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the minutes again."""
        self.saved = time.monotonic()


class SpikeWarning(TrainerCallback):
    """Warns of a logged loss far above those before it: the run goes on, but may have met bad data."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=SPIKE_LOGS)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Compare with the median, in units of the median distance from it."""
        if not state.is_world_process_zero or not logs or not math.isfinite(loss := logs.get("loss", math.nan)):
            return
        if len(self.losses) == SPIKE_LOGS:
            median = statistics.median(self.losses)
            spread = statistics.median(abs(other - median) for other in self.losses)
            if loss > median + SPIKE_SIZE * max(spread, 0.01 * median):
                logger.warning("step %d: the loss is %.3g, its median before %.3g", state.global_step, loss, median)
        self.losses.append(loss)


class SealCheckpoint(TrainerCallback):
    """Seals a checkpoint once every rank has written its part, and only then deletes older ones.

    Trainer would delete them first, and a run that is killed in between would have no checkpoint to resume from.

    Args:
        limit: checkpoints to keep.
    """

    def __init__(self, limit: int):
        self.limit = limit

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Delete what a kill while checkpoints were written or deleted has left."""
        if state.is_world_process_zero:
            prune_checkpoints(Path(args.output_dir), self.limit)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Wait for all ranks, write the list of files, and delete the oldest checkpoints above the limit."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            seal_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            prune_checkpoints(Path(args.output_dir), self.limit)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # here the watchdog waits longer than in a step


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl, one JSON object per line, on the first rank."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop lines past the step that a resumed run starts from, and summaries: none is logged twice."""
        if state.is_world_process_zero and self.path.exists():
            rows = read_metrics(self.path.parent) if state.global_step else []
            kept = [row for row in rows if row["step"] <= state.global_step and "train_runtime" not in row]
            with new_file(self.path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append one line, with null for NaN and infinity. Names with `eval_` get `eval/`, as trackers show them."""
        if state.is_world_process_zero:
            finite = {name: value if math.isfinite(value) else None for name, value in (logs or {}).items()}
            named = {re.sub("^eval_", "eval/", name): value for name, value in finite.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **named}) + "\n")


class ProfileSteps(TrainerCallback):
    """Writes a `torch.profiler` trace of some steps after the warm-up, one file per rank (for Perfetto).

    Args:
        folder: of the traces.
        num_steps: to record.
    """

    def __init__(self, folder: Path, num_steps: int):
        self.num_steps = num_steps
        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=WARM_UP_STEPS, warmup=1, active=num_steps, repeat=1),
            on_trace_ready=torch.profiler.tensorboard_trace_handler(str(folder)),
        )

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start before the first step."""
        self.profiler.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Advance the schedule."""
        self.profiler.step()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Write what has been recorded, if the run was shorter than the schedule."""
        self.profiler.stop()


class ShortProgress(ProgressCallback):
    """Trainer's progress bar with one short line per log."""

    def __init__(self) -> None:
        super().__init__()
        self.num_logs, self.has_warned = 0, False

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print loss, expected accepted length and speed above the bar; warn once about recompilation."""
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
        return f"  (recompiled {num_graphs} graphs, which takes time; TORCH_LOGS=recompiles shows why)"
