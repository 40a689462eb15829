"""Model FLOPs of a training step, peak rates of devices, and the throughput metrics of the log.

Model FLOPs count the forward and backward pass, a multiply-add as two: matrix products of the layers for every slot,
of the head for supervised slots, and attention for visible pairs. Recomputation (gradient checkpointing), masked pairs
and padding are left out, so the rate compares programs that train on the same data.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters  # the only count of compilations that PyTorch keeps
from transformers import PretrainedConfig

from pard_train.layout import IGNORE_INDEX, SlotLayout

# Legend: T slots, S supervised slots, V vocabulary.

PASSES = 3  # the forward pass of a product, and two products of its size in the backward pass


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
        """Shape from a model's config; None for other architectures (mixture of experts, MLPs without a gate)."""
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
    """Size of some packs.

    Attributes:
        slots: real tokens and mask slots, without padding.
        supervised: slots with a label.
        pairs: visible (query slot, key slot) pairs.
        tokens: supervised tokens, which are the supervised slots of depth 0.
    """

    slots: int
    supervised: int
    pairs: int
    tokens: int = 0


def count_work(layout: SlotLayout, labels: Tensor) -> Tensor:
    """Slots, supervised slots, visible pairs and supervised tokens of a pack as float64 [4], on its device.

    A slot attends to position + 1 slots: the text up to its anchor, and its chain up to its depth.
    """
    is_real, is_supervised = layout.document >= 0, labels != IGNORE_INDEX
    pairs = ((layout.position + 1) * is_real).sum()
    tokens = (is_supervised & (layout.depth == 0)).sum()
    return torch.stack([is_real.sum(), is_supervised.sum(), pairs, tokens]).double()


class StepFlops(NamedTuple):
    """Model FLOPs of a step, forward and backward, by stage; their sum is those of the step.

    Attributes:
        layers: matrix products of the layers.
        head: the output head.
        attention: scores and weighted sums.
    """

    layers: float
    head: float
    attention: float


def step_flops(shape: ModelShape, work: Work) -> StepFlops:
    """Model FLOPs of one optimizer step over some packs."""
    queries = shape.num_heads * shape.head_size
    return StepFlops(
        layers=2.0 * PASSES * work.slots * shape.layer_weights,
        head=2.0 * PASSES * work.supervised * shape.head_weights,
        attention=4.0 * PASSES * shape.num_layers * queries * work.pairs,  # 2 for scores, 2 for the weighted sum
    )


def num_compilations() -> int:
    """Graphs that `torch.compile` has made in this process so far, for the model or for FlexAttention."""
    return counters["stats"]["unique_graphs"]


# ---- Devices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """Peak rate of dense bfloat16 matrix products in FLOP/s, per device as PyTorch counts devices."""

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
    """The chip with this device name; None for unknown devices and for partitions (MIG).

    >>> chip_of("NVIDIA H100 80GB HBM3").peak, chip_of("NVIDIA GH200 480GB")
    (989500000000000.0, None)
    """
    if "MIG" in device_name:
        return None
    return next((chip for chip in CHIPS if re.search(chip.pattern, device_name)), None)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of tensors on an accelerator since the program started; None on the CPU."""
    return None if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def throughput_metrics(
    work: Work, seconds: float, shape: ModelShape | None, chip: Chip | None, num_devices: int
) -> dict[str, float]:
    """Rates of a window of steps over all devices.

    Args:
        work: of all devices.
        seconds: of the window.
        shape: None omits FLOPs.
        chip: None omits MFU (model FLOPs utilization), the share of the devices' peak rate.
        num_devices: that shared the work.
    """
    metrics = {"slots_per_second": work.slots / seconds, "supervised_tokens_per_second": work.tokens / seconds}
    if shape is not None:
        metrics["model_flops_per_second"] = sum(step_flops(shape, work)) / seconds
        if chip is not None:
            metrics["mfu"] = metrics["model_flops_per_second"] / num_devices / chip.peak
    return metrics
