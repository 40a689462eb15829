"""Training: `transformers.Trainer` with our batch, loss and log. DeepSpeed, resume and trackers are Trainer's own."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import GenerationConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from pard_train.config import Config, ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS, resolve_attention
from pard_train.core.objectives import DepthStatistics, PackLoss
from pard_train.data.chat import ChatEncoder
from pard_train.data.packing import PackedDataset, PardCollator
from pard_train.data.scores import Scores
from pard_train.data.store import TokenStore, open_store
from pard_train.device import device_name
from pard_train.errors import Interrupted, UserError
from pard_train.layout import SlotLayout
from pard_train.mask_token import required_mask_token_of
from pard_train.model import inspect_base, load_causal_lm, load_tokenizer, write_initial_draft, write_model_folder
from pard_train.runs import claim_run, locked, newest_checkpoint, package_versions, require_recorded
from pard_train.training.arguments import training_settings
from pard_train.training.callbacks import (
    CurrentIntervals,
    DataEpoch,
    MetricsFile,
    ProfileSteps,
    SealCheckpoint,
    ShortProgress,
    SpikeWarning,
    StepGuard,
    UsesTrainer,
)
from pard_train.training.inputs import TOKENS_FILE, build_dataset, check_output, teacher_of
from pard_train.training.plan import announce
from pard_train.training.processes import (
    for_processes,
    is_first_process,
    num_processes,
    require_equal_processes,
    run_identity,
    use_fsdp,
)
from pard_train.training.signals import ignore_stop_signals, stop_signals
from pard_train.training.throughput import (
    ModelShape,
    Work,
    chip_of,
    count_work,
    num_compilations,
    peak_memory,
    step_flops,
    throughput_metrics,
)
from pard_train.training.trackers import tracking
from pard_train.training.watchdog import Watchdog

INITIAL_FOLDER = "init"  # the untrained draft model
DRAFT_FOLDER = "draft"  # the trained one
BEST_FOLDER = "best"  # the best draft so far, with BEST_FILE in it
BEST_FILE = "best.json"
PROFILE_FOLDER = "profile"  # traces of trainer.profile_steps


def train(config: Config, callbacks: Sequence[TrainerCallback] = ()) -> Path:
    """Train a draft model, from the configuration to the finished draft folder.

    Args:
        config: validated.
        callbacks: in addition to our own.

    Returns:
        Folder of the trained draft model, output_dir/draft.

    Raises:
        UserError: for bad data, a base that cannot draft, or an output folder that holds something else.
        Interrupted: if a signal ended the run before its last step. A checkpoint of the step is saved.
    """
    with locked(Path(config.output_dir)) if is_first_process() else nullcontext():
        return _train(config, callbacks)


def _train(config: Config, callbacks: Sequence[TrainerCallback]) -> Path:
    check_output(config)
    config = for_processes(config)
    output_dir, settings = Path(config.output_dir), training_settings(config)
    if config.resume and (output_dir / DRAFT_FOLDER).is_dir():  # which is written at the end
        return output_dir / DRAFT_FOLDER
    checkpoint = newest_checkpoint(output_dir) if config.resume else None
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer, config.data.template_kwargs))
    require_recorded(output_dir / TOKENS_FILE, store.manifest, "chats")
    scores = teacher_of(config, store)
    if is_first_process():  # the other ranks wait at the barrier below
        facts = {"device": device_name(), "world_size": num_processes(), "data_manifest": store.description()}
        claim_run(output_dir, run_identity(config), dataclasses.asdict(config), **facts)
        texts = (document.input_ids for document in store)
        write_initial_draft(base, config.draft.num_draft_tokens, output_dir / INITIAL_FOLDER, texts)
    # From here on DeepSpeed may shard every model that is loaded (ZeRO-3), so all ranks must take part.
    arguments = TrainingArguments(**settings)
    if arguments.n_gpu > 1:
        print(f"no launcher: training on one of {arguments.n_gpu} GPUs (torchrun or deepspeed use all)")
        arguments._n_gpu = 1  # else Trainer wraps the model in DataParallel, which splits packs
    facts = {"tokens": store.manifest["identity"], "packages": package_versions()}
    require_equal_processes({**run_identity(config), **facts})
    if not (output_dir / INITIAL_FOLDER).is_dir():
        raise UserError(
            f"output_dir={output_dir} exists for the first process only: choose a folder on a disk that all nodes share"
        )
    trainer = build_trainer(config, arguments, store, scores)
    drafts = {"last": output_dir / DRAFT_FOLDER, "best": output_dir / BEST_FOLDER}
    watchdog, is_first = Watchdog(output_dir, config.trainer.hang_minutes), is_first_process()
    with stop_signals() as received, tracking(config, drafts, is_first=is_first) as trackers, watchdog:
        guard = StepGuard(received, output_dir, config.trainer.max_bad_steps, config.trainer.save_minutes)
        trainer.callback_handler.callbacks += trackers  # `add_callback` warns of a second one of a class
        for callback in (watchdog, guard, *callbacks):
            if isinstance(callback, UsesTrainer):
                callback.trainer = trainer
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        step, num_steps = trainer.state.global_step, trainer.state.max_steps
        if step == num_steps:
            return trainer.write_draft(drafts["last"])
        trainer.accelerator.wait_for_everyone()  # a launcher ends the other ranks when the first one ends
        raise Interrupted(f"stopped after step {step:,} of {num_steps:,}, with a checkpoint")


def build_trainer(
    config: Config, arguments: TrainingArguments, store: TokenStore, scores: Scores | None = None
) -> PardTrainer:
    """Load the untrained draft model of the output folder, and pack its tokens with the scores of `teacher_of`."""
    output_dir, initial = Path(config.output_dir), str(Path(config.output_dir) / INITIAL_FOLDER)
    dataset = build_dataset(config, store, scores, num_devices=arguments.world_size)
    attention = resolve_attention(config.model.attention, arguments.device.type)
    model = load_causal_lm(initial, dtype=torch.float32, attention=IMPLEMENTATIONS[attention])
    model.generation_config = GenerationConfig()  # those of some models cannot be saved, and no checkpoint needs one
    model.get_input_embeddings().padding_idx = None  # its row would get no gradient, and it often ends a turn
    longest = int(store.lengths().max())
    model.config.pard_trained_length = max(longest, getattr(model.config, "pard_trained_length", 0))
    if model.config.tie_word_embeddings:  # a checkpoint has no tied head, and Trainer would warn about it
        model._keys_to_ignore_on_save = list(model._tied_weights_keys)
    announce(config, arguments, store, dataset, model.config)
    dropouts = [f"{n}={v}" for n, v in model.config.to_dict().items() if "att" in n and "drop" in n and v]
    if attention == "flex" and dropouts:
        print(f"{dropouts[0]} of the model is not used: FlexAttention has no dropout")
    mask_token_id = required_mask_token_of(model.config)
    callbacks: list[TrainerCallback] = [DataEpoch(dataset.num_epochs), CurrentIntervals(), SpikeWarning()]
    callbacks += [SealCheckpoint(config.trainer.save_total_limit), MetricsFile(output_dir)]
    if config.trainer.profile_steps:
        callbacks.append(ProfileSteps(output_dir / PROFILE_FOLDER, config.trainer.profile_steps))
    trainer = PardTrainer(
        initial=initial,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=PardCollator(config.draft, config.objective, mask_token_id, config.data.slot_budget),
        processing_class=load_tokenizer(initial),
        callbacks=callbacks,
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
        self.packs, self.pack_losses = list[dict[str, Tensor]](), list[Tensor]()  # of this rank in this step
        self.is_at: Callable[[str], None] = lambda place: None  # tells the watchdog
        self.initial = initial  # folder of the untrained draft model, whose tokenizer the trained one keeps
        self.pack_loss = PackLoss(self.model, attention, num_draft_tokens, objective)
        self.shape = ModelShape.of(self.model.config)
        self.chip = chip_of(device_name()) if self.args.bf16 else None  # its peak rate is that of bfloat16
        self.is_compiled = self.args.torch_compile or attention == "flex"
        self.is_finite = torch.ones((), dtype=torch.bool, device=self.args.device)  # losses and gradient of this step
        # Of the steps since the last log:
        self.loss = torch.zeros((), dtype=torch.float64, device=self.args.device)  # sum over good steps, of this rank
        self.statistics = DepthStatistics.zeros(num_draft_tokens, self.args.device)
        self.work = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # as `count_work` counts
        self.progress, self.pack_size = torch.zeros_like(self.work), 0  # since `store_flos`; skipped steps count
        self.window_start, self.window_step = time.perf_counter(), -1  # -1 until the first step
        self.seconds_waiting, self.num_skipped, self.num_bad_steps = 0.0, 0, 0  # the last one counts those in a row
        self.num_compiled_before = num_compilations()

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's, and FSDP2 on any device."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            use_fsdp(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _get_train_sampler(self, *args: Any) -> Sampler[int]:
        return SequentialSampler(cast(PackedDataset, self.train_dataset))  # packs are already in training order

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's, with workers that outlive a stop signal until the step is over."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
        inner.worker_init_fn = partial(ignore_stop_signals, inner.worker_init_fn)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Tensor]:
        """Micro-batches of one optimizer step, and the sum of their weights over all ranks (a float32 scalar)."""
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: Trainer would add one more
            self.control.should_training_stop = True
            return [], torch.zeros((), device=device)
        self.is_at(f"data of step {self.state.global_step + 1}")
        started = time.perf_counter()
        if self.window_step < 0:  # exclude the loading of a checkpoint
            self.window_start, self.window_step = started, self.state.global_step
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.seconds_waiting += time.perf_counter() - started
        self.is_finite.fill_(True)
        self.packs, self.pack_losses = batches, []
        self.sums_before = [tensor.clone() for tensor in self._sums()]
        weight = torch.stack([batch["weight"].sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(weight, reduction="sum")

    def _prepare_input(self, data: Any) -> Any:
        """Move to the device and keep dtypes: under DeepSpeed, Trainer would round the weights to the model's dtype."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

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
        with self.accelerator.autocast():  # accelerate puts it around models of DDP, not of FSDP2
            loss, statistics = self.pack_loss(model, inputs, self.args.world_size / cast(Tensor, num_items_in_batch))
        self.statistics.add(statistics)
        layout = SlotLayout(*(inputs[name] for name in ("document", "anchor", "depth")))
        work = count_work(layout, inputs["labels"])
        self.work += work
        self.progress += work
        self.pack_size = inputs["labels"].numel()  # all packs have the same
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: `store_flos` counts model FLOPs without a synchronization for every pack."""
        return 0

    def store_flos(self) -> None:
        """Add the work since the last call to the state, which checkpoints keep. All ranks call it."""
        work = Work(*map(int, self.accelerator.reduce(self.progress, reduction="sum").tolist()))
        self.progress = torch.zeros_like(self.progress)
        self.state.num_input_tokens_seen += work.tokens
        self.state.total_flos += sum(step_flops(self.shape, work)) if self.shape else 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's, which also notes the loss. Trainer's own sum leaves out what is not finite."""
        loss = super().training_step(*args, **kwargs)
        self.is_finite &= loss.isfinite()
        self.loss += loss
        self.pack_losses.append(loss)
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, which also notes whether it is finite. DeepSpeed has -1 for a norm that is not."""
        norm = super()._get_grad_norm(*args, **kwargs)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # of FSDP2
        size = torch.as_tensor(0.0 if norm is None else norm, device=self.args.device)
        self.is_finite &= size.isfinite() & (size >= 0)
        return norm

    def skip_step(self) -> None:
        """Leave weights, optimizer states and the sums of the log as they were before this step. All ranks call it."""
        for parameter in self.model.parameters():
            parameter.grad = None  # optimizers pass such parameters over
        for tensor, before in zip(self._sums(), self.sums_before, strict=True):
            tensor.copy_(before)
        self.num_skipped += 1
        self.num_bad_steps += 1

    def _sums(self) -> tuple[Tensor, ...]:
        """Sums over the steps since the last log."""
        return (*self.statistics, self.work, self.loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the loss, accuracy per depth, expected accepted length and throughput over all ranks, and progress."""
        if "loss" in logs:
            logs |= self._end_window()
        self.store_flos()
        logs["progress/supervised_tokens"] = self.state.num_input_tokens_seen
        if self.shape is not None:
            logs["progress/model_flops"] = self.state.total_flos
        super().log(logs, *args, **kwargs)

    def _end_window(self) -> dict[str, float]:
        """Metrics of the steps since the last log; starts the next window."""
        sums = self._sums()
        for tensor in sums:
            tensor.copy_(self.accelerator.reduce(tensor, reduction="sum"))
        now, step, num_compiled = time.perf_counter(), self.state.global_step, num_compilations()
        seconds, metrics = now - self.window_start, self.statistics.metrics()
        metrics["supervised_slots_per_second"] = metrics["supervised_slots"] / seconds
        num_steps = max(1, step - self.window_step)
        good = self.args.world_size * (num_steps - self.num_skipped)
        metrics |= {"loss": float(self.loss) / good if good else float("nan"), "skipped_steps": self.num_skipped}
        work = Work(*map(int, self.work.tolist()))
        rates = throughput_metrics(work, seconds, self.shape, self.chip, self.args.world_size)
        rates |= {"seconds_per_step": seconds / num_steps, "data_wait_share": self.seconds_waiting / seconds}
        room = good * self.args.gradient_accumulation_steps * self.pack_size
        rates["packing_fill"] = work.slots / room if room else float("nan")
        if (memory := peak_memory(self.args.device)) is not None:
            rates["peak_memory_gb"] = memory / 1e9
        if self.is_compiled:
            rates["compilations"] = num_compiled - self.num_compiled_before
        for tensor in sums:
            tensor.zero_()
        self.window_start, self.window_step, self.num_compiled_before = now, step, num_compiled
        self.seconds_waiting, self.num_skipped = 0.0, 0
        return metrics | {f"throughput/{name}": value for name, value in rates.items()}

    def write_draft(self, folder: Path) -> Path:
        """Write the model as a draft folder, in place of an older one. Raises UserError if a weight is not finite."""
        state = self.accelerator.get_state_dict(self.model_wrapped)
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in (state or {}).items()}  # of torch.compile
        if self.args.should_save:
            if not all(tensor.isfinite().all() for tensor in state.values()):
                raise UserError(f"NaN or infinite weights in step {self.state.global_step}: {folder} is not written")
            shutil.rmtree(folder, ignore_errors=True)
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            write_model_folder(model, self.initial, folder, state_dict=state)
        self.accelerator.wait_for_everyone()
        return folder
