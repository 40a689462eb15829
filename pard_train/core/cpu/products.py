"""Matrix products on a CPU, in float32 through oneDNN where PyTorch would take MKL.

MKL gives processors other than Intel's its AVX2 kernels: on an AMD EPYC with AVX-512, PyTorch's float32 products run at
less than half of the rate that oneDNN reaches (docs/speed.md). Both libraries come with PyTorch, which takes oneDNN for
float32 only where it may round to bfloat16. `float32_onednn` allows that on processors where oneDNN makes no use of it,
which a product shows first. Products in bfloat16 go through oneDNN anyway, and on a GPU nothing here differs.

`OneDnnLinear` serves weights that change. `PackedLinear` keeps a copy that is arranged once, for weights that do not:
worth it where a step has few rows.
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

ONE_ROW_WEIGHTS = 2**22  # with one row and no more weights than this, MKL is the faster one
PACKED_ROWS = 8  # rows that the arrangement of packed weights is chosen for; it serves any number
PACKED_DTYPES = (torch.float32, torch.bfloat16)
OUTPUTS_PER_TILE = 4096  # of a weight's gradient: the product of a tile is still in the cache when it is added
PROBE_SIZE = 256  # rows and columns of the product that shows whether float32 stays float32


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` to float32 rounding, with its gradients.

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
    """Send the products of a model's linear layers through `linear`. Weights and their names stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """An `nn.Linear` that takes its products from `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(input, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer whose weights oneDNN has arranged once; the same operator that `torch.compile` freezes into."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can arrange these weights: on an x86 CPU, in float32 or bfloat16."""
    has_onednn = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")
    if not has_onednn or weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return False
    return weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether their product is in float32 on a CPU, and oneDNN has it so. A compiler is left to choose for itself."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler would stumble over the rest
        and left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and _keeps_float32()
    )


@contextmanager
def float32_onednn() -> Iterator[None]:
    """Sends float32 products on a CPU through oneDNN while it lasts; for operands that `takes_onednn` has agreed to."""
    before = _float32_setting.fp32_precision
    _float32_setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        _float32_setting.fp32_precision = before


@functools.cache
def _keeps_float32() -> bool:
    """Whether oneDNN computes in float32 where bfloat16 is allowed: not with AMX, for one."""
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
        ctx.save_for_backward(rows, weight)
        with float32_onednn():
            return F.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2).contiguous()
        with float32_onednn():
            return (
                (flat @ weight).view_as(rows) if needs_rows else None,
                flat.T @ rows.flatten(0, -2) if needs_weight else None,
                flat.sum(dim=0) if needs_bias else None,
            )
