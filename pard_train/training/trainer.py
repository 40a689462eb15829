"""Training: `transformers.Trainer` with our batch, our loss and our log. DeepSpeed, resume and trackers are its own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pard_train.config import Config, ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS, resolve_attention
from pard_train.core.objectives import DepthStatistics, PackLoss
from pard_train.data.chat import ChatEncoder
from pard_train.data.packing import PackedDataset, PardCollator
from pard_train.data.scores import Scores, open_teacher
from pard_train.data.store import TokenStore, open_store
from pard_train.device import device_name
from pard_train.errors import UserError
from pard_train.layout import SlotLayout
from pard_train.model import (
    inspect_base,
    load_causal_lm,
    load_tokenizer,
    required_mask_token_of,
    write_initial_draft,
    write_model_folder,
)
from pard_train.runs import check_run, claim_run, newest_checkpoint, read_json, write_json
from pard_train.training.arguments import training_settings
from pard_train.training.callbacks import DataEpoch, OwnSteps, SealCheckpoint, ShortProgress
from pard_train.training.clock import StepClock, device_mark, num_compilations
from pard_train.training.throughput import (
    ModelShape,
    Work,
    chip_of,
    count_work,
    peak_memory,
    throughput_metrics,
)
from pard_train.training.trackers import ConfigToWandb, MetricsFile

INITIAL_FOLDER = "init"  # the untrained draft model
DRAFT_FOLDER = "draft"  # the trained one
TEACHER_FILE = "teacher.json"  # manifest of the target's scores that the objective used
TOKENS_FILE = "tokens.json"  # manifest of the tokens


def train(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train a draft model: the whole of `recipes/train.py`.

    Args:
        config: validated.
        callbacks: added to our own.

    Returns:
        Folder of the trained draft model, output_dir/draft.

    Raises:
        UserError: for bad data, a base that cannot draft, or an output folder that is taken.
    """
    output_dir, settings = Path(config.output_dir), training_settings(config)
    check_output(config)
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer, config.data.template_kwargs))
    check_tokens(output_dir, store)
    scores = teacher_of(config, store)
    if _is_first():  # the other ranks wait below for this one to join them
        claim_run(output_dir, _identity(config))
        write_initial_draft(base, config.draft.num_draft_tokens, output_dir / INITIAL_FOLDER)
    # From here on DeepSpeed may shard every model that is loaded (ZeRO-3), which takes all ranks.
    arguments = TrainingArguments(**settings)
    if arguments.n_gpu > 1:
        print(f"no launcher: training on one of {arguments.n_gpu} GPUs (torchrun or deepspeed uses them all)")
        arguments._n_gpu = 1  # else Trainer would wrap the model in DataParallel, which splits packs
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if not (output_dir / INITIAL_FOLDER).is_dir():
        raise UserError(
            f"output_dir={output_dir} was made by the first process, and this one does not see it: choose a folder "
            "on a disk that all nodes share"
        )
    checkpoint = newest_checkpoint(output_dir) if config.resume else None
    trainer = build_trainer(config, arguments, store, scores)
    for callback in callbacks:
        if isinstance(callback, UsesTrainer):
            callback.trainer = trainer
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.write_draft(output_dir / DRAFT_FOLDER)


def check_output(config: Config) -> None:
    """Check that the run may write to its output folder. Raises UserError if another run stands there."""
    if _is_first():
        check_run(Path(config.output_dir), _identity(config), resume=config.resume)


def check_tokens(folder: Path, store: TokenStore) -> None:
    """Check that a run goes on with the tokens it began with: others have other packs, of which it would skip some.

    Raises:
        UserError: naming what differs.
    """
    record = folder / TOKENS_FILE
    if not record.exists():
        return
    before, now = read_json(record)["identity"], store.manifest["identity"]
    changed = ", ".join(name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name))
    if changed:
        raise UserError(
            f"the chats are not those that the run in {folder} began with ({changed} differs; see {record}): give it "
            "those, or choose another output_dir"
        )


def _is_first() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _identity(config: Config) -> dict[str, Any]:
    """What a run is made with. The number of processes decides what a step is made of, so a resumed run has as many."""
    return dataclasses.asdict(config) | {"world_size": int(os.environ.get("WORLD_SIZE", 1))}


def teacher_of(config: Config, store: TokenStore) -> Scores | None:
    """The target's scores that the objective needs, None if it needs none.

    Raises:
        UserError: if they are missing, unfinished or those of other tokens, or if the run went so far with others.
    """
    folder = config.data.scores
    if not config.objective.needs_scores or folder is None:
        if folder is not None and _is_first():
            print(f"data.scores={folder} is not used: objective.kd, objective.lk and objective.cat are off")
        return None
    scores = open_teacher(Path(folder), store)
    record = Path(config.output_dir) / TEACHER_FILE
    if record.exists() and read_json(record)["identity"] != scores.manifest["identity"]:
        raise UserError(
            f"data.scores={folder} is of another target than the run in {config.output_dir} has learnt from (see "
            f"{record}): resume with the scores it began with, or choose another output_dir"
        )
    return scores


def build_trainer(
    config: Config, arguments: TrainingArguments, store: TokenStore, scores: Scores | None = None
) -> PardTrainer:
    """Load the untrained draft model of the output folder and pack its data.

    Args:
        config: validated.
        arguments: of Trainer.
        store: the tokens.
        scores: as `teacher_of` gives them.
    """
    initial = str(Path(config.output_dir) / INITIAL_FOLDER)
    tokenizer = load_tokenizer(initial)
    packs_per_step = arguments.world_size * arguments.gradient_accumulation_steps
    dataset = PackedDataset(
        store,
        store.slot_bounds(config.draft),
        slot_budget=config.data.slot_budget,
        num_epochs=config.trainer.num_train_epochs,
        seed=config.seed,
        packs_per_step=packs_per_step,
        scores=scores,
    )
    if arguments.process_index == 0:
        write_json(Path(config.output_dir) / TOKENS_FILE, store.manifest)
        print(f"{store.summary()}\n{len(dataset):,} packs of {config.data.slot_budget:,} slots")
        if scores is not None:
            write_json(Path(config.output_dir) / TEACHER_FILE, scores.manifest)
            print(scores.summary())
    num_steps = len(dataset) // packs_per_step
    if arguments.max_steps > num_steps:  # Trainer would go over the very same packs again
        if arguments.process_index == 0:
            print(f"trainer.max_steps={arguments.max_steps}: trainer.num_train_epochs ends after {num_steps} steps")
        arguments.max_steps = -1
    attention = resolve_attention(config.model.attention, arguments.device.type)
    model = load_causal_lm(initial, dtype=torch.float32, attention=IMPLEMENTATIONS[attention])
    mask_token_id = required_mask_token_of(model.config)
    collator = PardCollator(config.draft, config.objective, mask_token_id, config.data.slot_budget)
    trainer = PardTrainer(
        initial=initial,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[
            DataEpoch(dataset.num_epochs),
            OwnSteps(),
            SealCheckpoint(config.trainer.save_total_limit),
            MetricsFile(Path(config.output_dir)),
            ConfigToWandb(config),
        ],
        attention=attention,
        num_draft_tokens=config.draft.num_draft_tokens,
        objective=config.objective,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ShortProgress)
    return trainer


class PardTrainer(Trainer):
    """A Trainer whose batch is one pack and whose loss is a mean over the supervised slots of the global batch."""

    def __init__(
        self, *args: Any, initial: str, attention: str, num_draft_tokens: int, objective: ObjectiveConfig, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is normalized here: no division by accumulation steps
        self.initial = initial  # folder of the untrained draft model, whose tokenizer the trained one keeps
        self.pack_loss = PackLoss(self.model, attention, num_draft_tokens, objective)
        self.statistics = DepthStatistics.zeros(num_draft_tokens, self.args.device)
        self.work = torch.zeros(3, dtype=torch.float64, device=self.args.device)  # as `count_work` counts
        self.shape = ModelShape.of(self.model.config)
        self.chip = chip_of(device_name()) if self.args.bf16 else None  # its peak is that of bfloat16
        self.clock = StepClock(device_mark(self.args.device))
        self.is_watched = False  # DDP, whose reductions the clock tells from the backward pass
        self.add_callback(self.clock)
        self.is_compiled = self.args.torch_compile or attention == "flex"
        self.compiled_before = num_compilations()  # this window
        self.window_start, self.has_begun = time.perf_counter(), False

    def _get_train_sampler(self, *args: Any) -> Sampler[int]:
        return SequentialSampler(cast(PackedDataset, self.train_dataset))  # the packs already stand in training order

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """Micro-batches of one optimizer step, and the sum of their weights over all ranks (a float32 scalar)."""
        if self.state.global_step >= self.state.max_steps:  # a checkpoint of the last step: Trainer would add one more
            self.control.should_training_stop = True
            return [], torch.zeros((), device=device)
        if not self.has_begun:  # loading a checkpoint is no part of the first window
            self.window_start, self.has_begun = time.perf_counter(), True
        with self.clock.phase("data"):
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        weight = torch.stack([batch["weight"].sum() for batch in batches]).sum().to(device)
        with self.clock.phase("communication"):
            return batches, self.accelerator.reduce(weight, reduction="sum")

    def _prepare_input(self, data: Any) -> Any:
        """A batch on the device, in its own dtypes: under DeepSpeed, Trainer would round its weights to the model's."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one pack."""
        wrapped = getattr(model, "_orig_mod", model)  # inside of what `torch.compile` makes of it
        if not self.is_watched and isinstance(wrapped, DistributedDataParallel):
            self.clock.watch_reductions(wrapped)
            self.is_watched = True
        with self.clock.phase("backward"):  # `compute_loss` takes its own time out of it
            return super().training_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Weighted loss of one pack over the weight of the global batch.

        Data-parallel engines average gradients over ranks, so the sum is scaled by their number.
        """
        with self.clock.phase("forward"):
            loss, statistics = self.pack_loss(model, inputs, self.args.world_size / cast(Tensor, num_items_in_batch))
        self.statistics.add(statistics)
        layout = SlotLayout(*(inputs[name] for name in ("document", "anchor", "depth")))
        self.work += count_work(layout, inputs["labels"])
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a window of steps, with accuracy per depth, expected accepted length and throughput over all ranks."""
        if "loss" in logs:
            sums = (*self.statistics.tensors(), self.work)
            for tensor in sums:
                tensor.copy_(self.accelerator.reduce(tensor, reduction="sum"))
            logs |= self.statistics.metrics()
            now = time.perf_counter()
            seconds, self.window_start = now - self.window_start, now
            logs["supervised_slots_per_second"] = logs["supervised_slots"] / seconds
            logs |= {f"throughput/{name}": value for name, value in self._throughput(seconds).items()}
            spent = self.clock.report()
            if not self.is_watched:  # one process, or an engine that reduces gradients where the clock cannot see it
                del spent["communication"]
            logs |= {f"throughput/share_{name}": value / seconds for name, value in spent.items()}
            logs |= self._count_compilations()
            for tensor in sums:
                tensor.zero_()
        super().log(logs, *args, **kwargs)

    def _count_compilations(self) -> dict[str, float]:
        before, self.compiled_before = self.compiled_before, num_compilations()
        return {"throughput/compilations": self.compiled_before - before} if self.is_compiled else {}

    def _throughput(self, seconds: float) -> dict[str, float]:
        work, num_tokens = Work(*map(int, self.work.tolist())), float(self.statistics.slots[0])
        metrics = throughput_metrics(work, num_tokens, seconds, self.shape, self.chip, self.args.world_size)
        memory = peak_memory(self.args.device)
        return metrics if memory is None else metrics | {"peak_memory_gb": memory / 1e9}

    def write_draft(self, folder: Path) -> Path:
        """Write the trained model as a draft folder, whole or not at all, from whatever shards the ranks hold."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in (state or {}).items()}  # of torch.compile
        if self.args.should_save and not folder.exists():
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            write_model_folder(model, self.initial, folder, state_dict=state)
        self.accelerator.wait_for_everyone()
        return folder


class UsesTrainer(TrainerCallback):
    """A callback that works with the trainer itself, which `train` gives it."""

    trainer: PardTrainer
