"""Time of a step's stages alone, on the packs of the step, and the bytes that a step moves at least."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import AttentionInterface, PreTrainedModel

from pard_train.config import ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS, attention_inputs
from pard_train.core.cpu.products import linear
from pard_train.core.head import score_slots
from pard_train.core.terms import SlotTargets
from pard_train.layout import IGNORE_INDEX, SlotLayout
from pard_train.training.throughput import PASSES, ModelShape, Work

REPEATS = 3
ADAM_VALUES = 7  # read weight, gradient and two moments, write weight and two moments
PRODUCT_CPU = (2048, 576, 1536)  # rows, inputs, outputs: a matrix of SmolLM2-135M
PRODUCT = (16384, 896, 4864)  # a matrix of Qwen2.5-0.5B, with rows enough for an accelerator


@dataclass(frozen=True)
class StageTimes:
    """Seconds of a step, forward and backward."""

    head: float
    attention: float
    optimizer: float


def time_stages(
    model: PreTrainedModel,
    shape: ModelShape,
    batches: Sequence[dict[str, Tensor]],
    attention: str,
    dtype: torch.dtype,
    update: Callable[[], None],
) -> StageTimes:
    """Each stage by itself, in the dtype of its products; the median of a few repeats."""
    head, attended = 0.0, 0.0
    for batch in batches:
        layout = SlotLayout(*(batch[name][0] for name in ("document", "anchor", "depth")))
        labels = batch["labels"][0][batch["labels"][0] != IGNORE_INDEX]
        head += _seconds(_head_pass(model, labels, dtype))
        attended += shape.num_layers * _seconds(_attention_pass(model, shape, layout, attention, dtype))
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return StageTimes(head, attended, _seconds(update))


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step moves at least. Norms, activations and residual sums are left out: a compiler may fuse them.

    Attributes:
        products: operands and results of all matrix products, each read or written once per product.
        attention: queries, keys, values and outputs, and their gradients.
        optimizer: Adam in float32.
    """

    products: float
    attention: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.attention + self.optimizer


def step_bytes(shape: ModelShape, work: Work, bytes_per_value: int) -> StepBytes:
    """Bytes of one optimizer step over some packs, at 2 bytes a value in bfloat16 and 4 in float32."""
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size

    def traffic(rows: int, inputs: int, outputs: int) -> int:  # every product touches all three once
        return PASSES * (rows * inputs + rows * outputs + inputs * outputs)

    layer_values = sum(traffic(work.slots, *matrix) for matrix in shape.layer_matrices)
    values = shape.num_layers * layer_values + traffic(work.supervised, shape.hidden, shape.vocabulary)
    return StepBytes(
        products=float(bytes_per_value * values),
        attention=float(bytes_per_value * PASSES * shape.num_layers * work.slots * 2 * (queries + keys)),
        optimizer=4.0 * ADAM_VALUES * (shape.layer_weights + shape.head_weights),
    )


def product_of(device: torch.device) -> tuple[int, int, int]:
    """Rows, inputs and outputs of the product that the stages are compared with."""
    return PRODUCT_CPU if device.type == "cpu" else PRODUCT


@cache  # of one process
def product_rates(device: torch.device) -> dict[str, float]:
    """FLOP/s that one product of a layer's size reaches alone: the limit of a step that is made of them."""
    num_rows, inputs, outputs = product_of(device)
    rows, weight = torch.randn(num_rows, inputs, device=device), torch.randn(outputs, inputs, device=device)
    narrow = (rows.bfloat16(), weight.bfloat16())
    ways = {"float32 by PyTorch": (F.linear, (rows, weight)), "bfloat16 by PyTorch": (F.linear, narrow)}
    if device.type == "cpu":
        ways["float32 through oneDNN"] = (linear, (rows, weight))
    rates = {}
    for name, (product, operands) in ways.items():
        names = {"product": product, "operands": operands}
        timer = Timer("product(*operands)", globals=names, num_threads=torch.get_num_threads())
        rates[name] = 2 * num_rows * inputs * outputs / timer.blocked_autorange(min_run_time=0.5).median
    return rates


def _head_pass(model: PreTrainedModel, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    head = model.get_output_embeddings()
    hidden = torch.randn(len(labels), head.in_features, device=labels.device, dtype=dtype, requires_grad=True)
    targets = SlotTargets(labels, torch.ones(len(labels), device=labels.device))

    def run() -> None:
        with torch.autocast(labels.device.type, dtype, enabled=dtype != torch.float32):
            score_slots(hidden, head, targets, ObjectiveConfig()).loss.backward()

    return run


def _attention_pass(
    model: PreTrainedModel, shape: ModelShape, layout: SlotLayout, attention: str, dtype: torch.dtype
) -> Callable[[], None]:
    """One layer's attention, without its projections."""
    attend = AttentionInterface()[IMPLEMENTATIONS[attention]]
    module = model.get_decoder().layers[0].self_attn
    sizes = [(len(layout), heads, shape.head_size) for heads in (shape.num_heads, *[shape.num_key_value_heads] * 2)]
    device = layout.depth.device
    query, key, value = (
        torch.randn(size, device=device, dtype=dtype).transpose(0, 1)[None].requires_grad_() for size in sizes
    )
    inputs = {"attention_mask": None, **attention_inputs(attention, layout)}

    def run() -> None:
        out, _ = attend(module, query, key, value, scaling=shape.head_size**-0.5, **inputs)
        torch.autograd.grad(out.sum(), (query, key, value))

    return run


def _seconds(run: Callable[[], None]) -> float:
    """Median of a few repeats, after one that is not timed."""
    times = []
    for _ in range(1 + REPEATS):
        _wait()
        started = time.perf_counter()
        run()
        _wait()
        times.append(time.perf_counter() - started)
    return float(np.median(times[1:]))


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
