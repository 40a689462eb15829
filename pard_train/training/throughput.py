"""What a training step costs in operations and bytes, and what the device could do.

Model FLOPs are those of the mathematics, forward and backward, a multiplication with its addition counted as two:
matrix products of the layers for every slot, of the head for supervised slots, and attention for the pairs that see
each other. What a program does besides (recomputation under gradient checkpointing, masked pairs, padding) is no part
of them, so that their rate compares programs that learn the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pard_train.layout import IGNORE_INDEX, SlotLayout

# Legend: T slots, S supervised slots, V vocabulary.

BACKWARD = 2  # the backward pass of a product is two products of its size
ADAM_VALUES = 7  # read weight, gradient and two moments, write weight and two moments


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder with gated MLPs (Llama, Qwen2, Qwen3)."""

    num_layers: int
    hidden: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> ModelShape | None:
        """Shape from a model's config, None for another kind of model (experts, MLPs without a gate)."""
        if config.model_type not in ("llama", "qwen2", "qwen3"):
            return None
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.intermediate_size,
            config.vocab_size,
        )

    @property
    def layer_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every matrix of one layer: query, key, value, output, gate, up, down."""
        queries, keys = self.num_heads * self.head_size, self.num_key_value_heads * self.head_size
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def layer_weights(self) -> int:
        """Weights in the matrices of all layers."""
        return self.num_layers * sum(inputs * outputs for inputs, outputs in self.layer_matrices)

    @property
    def head_weights(self) -> int:
        """Weights of the head (and of the embedding)."""
        return self.hidden * self.vocabulary


@dataclass(frozen=True)
class Work:
    """What there is to do in some packs.

    Attributes:
        slots: real tokens and mask slots, without padding.
        supervised: slots with a label.
        pairs: (slot, slot) pairs that see each other.
    """

    slots: int
    supervised: int
    pairs: int


def count_work(layout: SlotLayout, labels: Tensor) -> Tensor:
    """Slots, supervised slots and visible pairs of a pack as float64 [3], on its device.

    A slot sees position + 1 slots: the text up to its anchor, and its chain up to its depth.
    """
    is_real = layout.document >= 0
    pairs = ((layout.position + 1) * is_real).sum()
    return torch.stack([is_real.sum(), (labels != IGNORE_INDEX).sum(), pairs]).double()


@dataclass(frozen=True)
class StepCost:
    """Model FLOPs of a step, forward and backward, by stage; and bytes that at least move.

    Attributes:
        layers: FLOPs of the layers' matrix products.
        head: FLOPs of the output head.
        attention: FLOPs of scores and weighted sums.
        matrix_bytes: operands and results of all matrix products, each read or written once in each product.
        attention_bytes: queries, keys, values and outputs, and their gradients.
        optimizer_bytes: Adam in float32.
    """

    layers: float
    head: float
    attention: float
    matrix_bytes: float
    attention_bytes: float
    optimizer_bytes: float

    @property
    def flops(self) -> float:
        """All stages."""
        return self.layers + self.head + self.attention

    @property
    def bytes(self) -> float:
        """All of them. Norms, activations and residual sums are not counted: a compiler may fuse them away."""
        return self.matrix_bytes + self.attention_bytes + self.optimizer_bytes


def step_cost(shape: ModelShape, work: Work, bytes_per_value: int = 2) -> StepCost:
    """Cost of one optimizer step over some packs.

    Args:
        shape: of the model.
        work: of the packs.
        bytes_per_value: 2 in bfloat16, 4 in float32.
    """
    passes = 1 + BACKWARD
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size

    def traffic(rows: int, inputs: int, outputs: int) -> int:  # every product touches all three once
        return passes * (rows * inputs + rows * outputs + inputs * outputs)

    layer_values = sum(traffic(work.slots, *matrix) for matrix in shape.layer_matrices)
    values = shape.num_layers * layer_values + traffic(work.supervised, shape.hidden, shape.vocabulary)
    return StepCost(
        layers=2.0 * passes * work.slots * shape.layer_weights,
        head=2.0 * passes * work.supervised * shape.head_weights,
        attention=4.0 * passes * shape.num_layers * queries * work.pairs,  # 2 for scores, 2 for the weighted sum
        matrix_bytes=float(bytes_per_value * values),
        attention_bytes=float(bytes_per_value * passes * shape.num_layers * work.slots * 2 * (queries + keys)),
        optimizer_bytes=4.0 * ADAM_VALUES * (shape.layer_weights + shape.head_weights),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What devices can do
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """Peak rate of dense bfloat16 matrix products, in FLOP/s, of one device as PyTorch counts devices."""

    pattern: str  # of the device's name
    peak: float
    source: str


CHIPS = (
    Chip(r"\bA100\b", 312e12, "NVIDIA A100 data sheet: 312 TFLOPS"),
    Chip(r"\bL40S\b", 362.05e12, "NVIDIA L40S data sheet: 362.05 TFLOPS"),
    Chip(r"\bH100\b.*\bPCIe\b", 756.5e12, "NVIDIA H100 data sheet: 1,513 TFLOPS with sparsity, half without"),
    Chip(r"\bH100\b.*\bNVL\b", 835.5e12, "NVIDIA H100 data sheet: 1,671 TFLOPS with sparsity, half without"),
    Chip(r"\bH100\b", 989.5e12, "NVIDIA H100 (SXM) data sheet: 1,979 TFLOPS with sparsity, half without"),
    Chip(r"\bH200\b.*\bNVL\b", 835.5e12, "NVIDIA H200 data sheet: 1,671 TFLOPS with sparsity, half without"),
    Chip(r"\bH200\b", 989.5e12, "NVIDIA H200 (SXM) data sheet: 1,979 TFLOPS with sparsity, half without"),
    Chip(r"\bB200\b", 2250e12, "NVIDIA HGX B200 data sheet: 4.5 PFLOPS with sparsity for one GPU, half without"),
    Chip(r"\bGB200\b", 2500e12, "NVIDIA GB200 NVL72 data sheet: 5 PFLOPS with sparsity for one GPU, half without"),
    Chip(r"\bMI210\b", 181.0e12, "AMD MI210 data sheet: 181.0 TFLOPS"),
    Chip(r"\bMI250\b", 181.05e12, "AMD MI250 data sheet: 362.1 TFLOPS for two dies, each a device"),
    Chip(r"\bMI250X\b", 191.5e12, "AMD MI250X data sheet: 383.0 TFLOPS for two dies, each a device"),
    Chip(r"\bMI300X\b", 1307.4e12, "AMD MI300X data sheet: 1,307.4 TFLOPS"),
    Chip(r"\bMI325X\b", 1307.4e12, "AMD MI325X data sheet: 1,307.4 TFLOPS"),
    Chip(r"\bMI355X\b", 2516.6e12, "AMD MI355X data sheet: 2.5 PFLOPS (2,516.6 TFLOPS)"),
)


def chip_of(device_name: str) -> Chip | None:
    """The chip that a device's name tells, None if it is not in the list. Rates of partitions are not in the list.

    >>> chip_of("NVIDIA H100 80GB HBM3").peak, chip_of("NVIDIA GH200 480GB")
    (989500000000000.0, None)
    """
    if "MIG" in device_name:
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_name)), None)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors took on an accelerator since the program began, None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def throughput_metrics(
    work: Work, num_tokens: float, seconds: float, shape: ModelShape | None, chip: Chip | None, num_devices: int
) -> dict[str, float]:
    """Rates of a window of steps over all devices, for the log.

    Args:
        work: of all devices.
        num_tokens: supervised tokens: supervised slots of depth 0.
        seconds: of the window.
        shape: None leaves FLOPs out.
        chip: None leaves the share of its peak out.
        num_devices: that shared the work.
    """
    metrics = {"slots_per_second": work.slots / seconds, "supervised_tokens_per_second": num_tokens / seconds}
    if shape is not None:
        metrics["model_flops_per_second"] = step_cost(shape, work).flops / seconds
        if chip is not None:
            metrics["share_of_peak"] = metrics["model_flops_per_second"] / num_devices / chip.peak
    return metrics
