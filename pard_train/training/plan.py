"""The plan of a run, before it starts: amount of data, steps, FLOPs, memory by part, and time.

Work is counted on some packs of the run and scaled. Memory is that of tensors, from the sizes of the model: what a
layer keeps for the backward pass was read from PyTorch's saved tensors, and a test compares it with them.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, TrainingArguments

from pard_train.config import Config, ObjectiveConfig
from pard_train.core.head import CHUNK_SLOTS, CHUNK_SLOTS_CPU
from pard_train.data.chat import ChatEncoder
from pard_train.data.packing import PackedDataset, PardCollator
from pard_train.data.store import TokenStore, open_store
from pard_train.device import default_device, device_name
from pard_train.errors import UserError
from pard_train.layout import SlotLayout
from pard_train.model import inspect_base, load_config
from pard_train.runs import PLAN_FILE, require_space, write_json
from pard_train.training.inputs import TEACHER_FILE, TOKENS_FILE, build_dataset
from pard_train.training.processes import num_processes
from pard_train.training.throughput import CHIPS, ModelShape, Work, chip_of, count_work, step_flops

NUM_SAMPLES = 8  # packs whose work is counted
GB = 1e9


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        packs, slots: of all steps and devices; slots without padding.
        supervised_tokens: of all steps, repetitions included.
        model_flops: None for architectures that are not counted, as `memory_gb`.
        memory_gb: per device by part; `peak` is what they take at once.
        disk_gb: that the run writes at most, checkpoints included; None as `memory_gb`.
        device, num_devices: on which `hours` are estimated, at `utilization` of the peak rate.
    """

    documents: int
    packs: int
    steps: int
    supervised_tokens: int
    slots: int
    model_flops: float | None
    memory_gb: dict[str, float] | None
    disk_gb: float | None
    device: str
    num_devices: int
    utilization: float
    hours: float | None

    def render(self) -> str:
        """The plan in some lines."""
        lines = [
            f"plan: {self.documents:,} documents, {self.packs:,} packs, {self.steps:,} steps, "
            f"{self.supervised_tokens:,} supervised tokens, {self.slots:,} slots"
        ]
        if self.model_flops is not None and self.memory_gb is not None:
            parts = ", ".join(f"{name} {size:.2f}" for name, size in self.memory_gb.items())
            lines.append(f"memory per device in GB: {parts}; disk: {self.disk_gb:.2f}")
            at = f"{self.num_devices} x {self.device} at {self.utilization:.0%} of the peak rate"
            lines.append(f"{self.model_flops:.3g} model FLOPs; about {_duration(self.hours or 0)} on {at}")
        return "\n".join(lines)


def _duration(hours: float) -> str:
    """In the largest unit that gives at least one.

    >>> _duration(1.5), _duration(0.05)
    ('1.5 hours', '3 minutes')
    """
    units = ((1.0, "hours"), (60.0, "minutes"), (3600.0, "seconds"))
    factor, unit = next(((f, u) for f, u in units if hours * f >= 1), units[-1])
    return f"{hours * factor:.2g} {unit}"


def plan_training(
    config: Config, store: TokenStore, dataset: PackedDataset, model: PretrainedConfig, *, num_devices: int
) -> Plan:
    """Plan a run.

    Args:
        config: of the experiment; `plan` names another chip or number of devices.
        store: the documents.
        dataset: the packs of all epochs, for the devices of the run.
        model: config of the draft model.
        num_devices: of the run.

    Raises:
        UserError: if `plan.chip` is unknown.
    """
    packs_per_step = num_devices * config.trainer.gradient_accumulation_steps
    most, wanted = len(dataset) // packs_per_step, config.trainer.max_steps
    steps = min(most, wanted) if wanted > 0 else most
    work, shape = _count(config, dataset, steps * packs_per_step), ModelShape.of(model)
    flops = sum(step_flops(shape, work)) if shape else None
    planned = config.plan.num_devices or num_devices
    device, peak = _rate(config)
    supervised = work.supervised // max(1, steps * packs_per_step)
    tokens = int(store.num_supervised().sum()) * config.trainer.num_train_epochs
    return Plan(
        documents=len(store),
        packs=steps * packs_per_step,
        steps=steps,
        supervised_tokens=tokens if steps == most else work.tokens,
        slots=work.slots,
        model_flops=flops,
        memory_gb=memory_by_part(config, shape, model, supervised, planned) if shape else None,
        disk_gb=disk_gb(config, num_weights(shape, model)) if shape else None,
        device=device,
        num_devices=planned,
        utilization=config.plan.utilization,
        hours=flops / (peak * planned * config.plan.utilization) / 3600 if flops else None,
    )


def plan_run(config: Config) -> Plan:
    """The plan of a run that is not started: nothing is written but encoded chats in the cache.

    Raises:
        UserError: for bad data, a base that cannot draft, or an unknown chip.
    """
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer, config.data.template_kwargs))
    num_devices = config.plan.num_devices or num_processes()
    model = load_config(
        config.model.path, trust_remote_code=config.model.trust_remote_code, revision=config.model.revision
    )
    model.vocab_size = base.num_rows
    if base.keep is not None:
        model.num_hidden_layers = base.keep if isinstance(base.keep, int) else len(base.keep)
    dataset = build_dataset(config, store, None, num_devices=num_devices)
    return plan_training(config, store, dataset, model, num_devices=num_devices)


def announce(
    config: Config, arguments: TrainingArguments, store: TokenStore, dataset: PackedDataset, model: PretrainedConfig
) -> None:
    """Print and record the plan and what the packs are made of, and limit the steps to them.

    Raises:
        UserError: if the learning rate has no room to rise and fall, or the disk none for what the run will write.
    """
    num_steps = len(dataset) // (arguments.world_size * arguments.gradient_accumulation_steps)
    if too_many := arguments.max_steps > num_steps:  # Trainer would train on the same packs again
        arguments.max_steps = -1
    trainer, taken = config.trainer, arguments.max_steps if arguments.max_steps > 0 else num_steps
    if trainer.warmup_steps + trainer.decay_steps > taken:
        given = f"trainer.warmup_steps={trainer.warmup_steps} and trainer.decay_steps={trainer.decay_steps}"
        raise UserError(f"{given} exceed the {taken} steps of this run: lower them, or train for longer")
    if arguments.process_index:
        return
    output_dir = Path(config.output_dir)
    plan = plan_training(config, store, dataset, model, num_devices=arguments.world_size)
    write_json(output_dir / TOKENS_FILE, store.manifest)
    write_json(output_dir / PLAN_FILE, asdict(plan))
    print(f"{store.summary()}\n{plan.render()}")
    written = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    fix = "make room, choose another disk, or lower trainer.save_total_limit"
    require_space(output_dir, (plan.disk_gb or 0.0) * GB - written, fix)
    if dataset.scores is not None:
        write_json(output_dir / TEACHER_FILE, dataset.scores.manifest)
        print(dataset.scores.summary())
    if too_many:
        print(f"trainer.max_steps={config.trainer.max_steps}: trainer.num_train_epochs ends after {num_steps} steps")


def _count(config: Config, dataset: PackedDataset, num_packs: int) -> Work:
    """Work of the first packs of a run, scaled from some of them."""
    collate = PardCollator(config.draft, ObjectiveConfig(), 0, config.data.slot_budget)
    chosen = np.unique(np.linspace(0, num_packs - 1, NUM_SAMPLES).round().astype(int))
    total = torch.zeros(4, dtype=torch.float64)
    for number in chosen.tolist():
        pack = collate([dataset[number]])
        layout = SlotLayout(*(pack[name] for name in ("document", "anchor", "depth")))
        total += count_work(layout, pack["labels"])
    return Work(*(round(value * num_packs / len(chosen)) for value in total.tolist()))


def _rate(config: Config) -> tuple[str, float]:
    """Name and peak rate in FLOP/s of the planned device; that of an unknown one is measured by a product."""
    name = config.plan.chip or device_name()
    if (chip := chip_of(name)) is not None:
        return name, chip.peak
    if config.plan.chip:
        known = ", ".join(chip.pattern.split(r"\b")[1] for chip in CHIPS)
        raise UserError(f"plan.chip={name} is not a known chip: choose one of {known}")
    device, size = default_device(), 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if config.trainer.bf16 else torch.float32)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return name, 2 * size**3 / min(seconds)


def num_weights(shape: ModelShape, model: PretrainedConfig) -> int:
    """Weights of the layers, and of embedding and head, which may be one."""
    return shape.layer_weights + shape.head_weights * (1 if model.tie_word_embeddings else 2)


def disk_gb(config: Config, weights: int) -> float:
    """GB that a run writes at most: init, draft and best in float32, and checkpoints with two states of AdamW each.

    The oldest checkpoint is deleted only when the next one is complete.
    """
    trainer, monitor = config.trainer, config.monitor
    num_drafts = 3 if monitor.every_steps and monitor.keep_best != "none" else 2
    num_checkpoints = trainer.save_total_limit + 1 if trainer.save_steps or trainer.save_minutes else 0
    per_checkpoint = 5 if config.deepspeed or trainer.extra.get("fsdp") else 3  # these two store the weights twice
    return 4 * weights * (num_drafts + per_checkpoint * num_checkpoints) / GB


def memory_by_part(
    config: Config, shape: ModelShape, model: PretrainedConfig, supervised: int, num_devices: int
) -> dict[str, float]:
    """GB of tensors on one device by part, and the peak.

    With AdamW in float32: 16 bytes per weight, of which ZeRO shards states (1), gradients (2) and weights (3), and FSDP
    all. DeepSpeed in bfloat16 has weights and gradients of 2 bytes, and its optimizer 4 more for weights in float32.
    Activations, the head's chunk of logits and DeepSpeed's bucket are gone when the last gradients are written.
    """
    trainer, zero = config.trainer, config.deepspeed.get("zero_optimization", {})
    stage = 3 if trainer.extra.get("fsdp") else zero.get("stage", 0)
    of_states, of_gradients, of_weights = (num_devices if stage >= first else 1.0 for first in (1, 2, 3))
    of_states = math.inf if zero.get("offload_optimizer") else of_states
    own = 2.0 if config.deepspeed and trainer.bf16 else 4.0  # bytes of a weight in the model
    has_copy = bool(config.deepspeed) and (trainer.bf16 or stage > 0)  # of weights, and in a step of gradients
    on_cpu = config.plan.chip is None and default_device().type == "cpu"
    width = 2 if trainer.bf16 else 4
    head, weights = shape.head_weights, num_weights(shape, model)
    copies = 2 if num_devices > 1 and not config.deepspeed and not stage else 1  # DDP keeps gradients in buckets, too
    chunk = min(supervised, CHUNK_SLOTS_CPU if on_cpu else CHUNK_SLOTS)
    kept = config.data.slot_budget * activation_bytes(shape, model, width, trainer.gradient_checkpointing)
    parts = {
        "weights": own * weights / of_weights,
        "gradients": own * weights * copies / of_gradients,
        "optimizer": (12.0 if has_copy else 8.0) * weights / of_states,
        "activations": kept + (2.0 * shape.layer_weights if trainer.bf16 and own == 4 else 0.0),  # weights in bfloat16
        "head": chunk * shape.vocabulary * width * 2.0 + supervised * shape.hidden * (4.0 + width),
    }
    before = parts["gradients"] if trainer.gradient_accumulation_steps > 1 else own * head
    before += own * zero.get("reduce_bucket_size", 5e8) if stage and config.deepspeed else 0.0
    in_step = 4.0 * weights / of_states if has_copy else 0.0
    parts["peak"] = parts["weights"] + parts["optimizer"]
    parts["peak"] += max(before + parts["activations"] + parts["head"], parts["gradients"] + in_step)
    return {name: size / GB for name, size in parts.items()}


def activation_bytes(shape: ModelShape, model: PretrainedConfig, width: int, is_recomputed: bool) -> float:
    """Bytes that the layers keep for the backward pass, per slot.

    A layer keeps in float32 the input and normalized input of both norms and the rotated queries and keys and the
    values; in the dtype of products (`width` bytes) the inputs of the products, each cast for itself, and the parts of
    the MLP. The final norm keeps as much as another.
    """
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    casts = 2 if width == 4 else 5  # q, k, v, gate and up share their input unless it is cast
    layer = 16 * shape.hidden + casts * width * shape.hidden + width * queries + 4 * (queries + 2 * keys)
    layer += 4 * width * shape.intermediate
    layer += (4 + width) * (queries + keys) if model.model_type == "qwen3" else 0  # norms of queries and keys
    final = 8 * shape.hidden
    return shape.num_layers * 4 * shape.hidden + layer + final if is_recomputed else shape.num_layers * layer + final
