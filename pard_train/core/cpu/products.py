"""Matrix products on a CPU: float32 through oneDNN where PyTorch would use MKL.

MKL runs its AVX2 kernels on processors of other makers than Intel: on an AMD EPYC with AVX-512, PyTorch's float32
products reach less than half of oneDNN's rate (docs/explanation/speed.md). PyTorch ships both libraries but uses oneDNN
for float32 only where rounding to bfloat16 is allowed. `float32_onednn` allows it on processors where oneDNN does not
round, which a probe product verifies first. bfloat16 products use oneDNN anyway; on a GPU nothing changes.

`OneDnnLinear` is for weights that change. `PackedLinear` keeps a packed copy of constant weights, which pays off where
a step has few rows.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_float32_setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

# Legend: M rows, I inputs, O outputs.

ONE_ROW_WEIGHTS = 2**22  # with one row and at most this many weights, MKL is faster
PACKED_ROWS = 8  # rows that the packing is optimized for; any number works
PACKED_DTYPES = (torch.float32, torch.bfloat16)
OUTPUTS_PER_TILE = 4096  # of a weight's gradient: a tile's product is still in the CPU cache when it is added
PROBE_SIZE = 256  # rows and columns of the probe product


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` up to float32 rounding, differentiable.

    Args:
        rows: [..., I].
        weight: [O, I].
        bias: [O] or None.

    Returns:
        [..., O].
    """
    num_rows = rows[..., 0].numel()
    if not takes_onednn(rows, weight) or num_rows == 0 or (num_rows == 1 and weight.numel() <= ONE_ROW_WEIGHTS):
        return F.linear(rows, weight, bias)
    return _Linear.apply(rows, weight, bias)


def add_outer(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right`, the gradient of a weight, to `total` in place.

    Args:
        total: float32 [O, I].
        left: gradient of the outputs, [M, O].
        right: inputs, [M, I].
    """
    if left.device.type == "cpu":
        for start in range(0, len(total), OUTPUTS_PER_TILE):
            tile = slice(start, start + OUTPUTS_PER_TILE)
            total[tile].add_(_outer(left[:, tile], right))
    elif left.dtype == total.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def use_onednn(model: nn.Module) -> None:
    """Make a model's linear layers use `linear`. Weights and their names stay the same."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` that uses `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(input, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer with weights packed once by oneDNN, as `torch.compile` packs constants."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can pack these weights: on an x86 CPU, in float32 or bfloat16."""
    has_onednn = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not has_onednn or weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether their product is float32 on a CPU where oneDNN keeps float32. Never under `torch.compile`."""
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be compiled
        and left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _keeps_float32()
    )


@contextmanager
def float32_onednn() -> Iterator[None]:
    """Send float32 products on a CPU through oneDNN; for operands that `takes_onednn` accepts."""
    before = _float32_setting.fp32_precision
    _float32_setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        _float32_setting.fp32_precision = before


@functools.cache
def _keeps_float32() -> bool:
    """Whether oneDNN computes in float32 where bfloat16 is allowed: not on processors with AMX."""
    if not torch.backends.mkldnn.is_available():
        return False
    # Each is 1 in bfloat16 and in TF32.
    fine = torch.full((PROBE_SIZE, PROBE_SIZE), 1 + 2.0**-12, dtype=torch.float32, device="cpu")
    exact = PROBE_SIZE * (1 + 2.0**-12) ** 2
    with float32_onednn():
        products = (fine @ fine, torch.bmm(fine[None], fine.T[None]), F.linear(fine, fine))
    return all(bool(((product - exact).abs() < 1e-5 * exact).all()) for product in products)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`: [M, O] and [M, I] give [O, I]."""
    if not takes_onednn(left, right):
        return left.T @ right
    with float32_onednn():
        return left.T @ right


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., I] to [..., O]."""
        ctx.save_for_backward(rows, weight)
        with float32_onednn():
            return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, weight and bias, where needed."""
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2).contiguous()
        with float32_onednn():
            return (
                (flat @ weight).view_as(rows) if needs_rows else None,
                flat.T @ rows.flatten(0, -2) if needs_weight else None,
                flat.sum(dim=0) if needs_bias else None,
            )
