"""Matrix products on a CPU, in float32 through oneDNN where PyTorch would take MKL.

MKL gives processors other than Intel's its AVX2 kernels: on an AMD EPYC with AVX-512, PyTorch's float32 products run at
less than half of the rate that oneDNN reaches (docs/speed.md). Both libraries come with PyTorch. Products in bfloat16
go through oneDNN anyway, and on a GPU nothing here differs from PyTorch.

`OneDnnLinear` serves weights that change. `PackedLinear` keeps a copy that is arranged once, for weights that do not:
worth it where a step has few rows.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Legend: M rows, I inputs, O outputs.

ONE_ROW_WEIGHTS = 2**22  # with one row and no more weights than this, MKL is the faster one
PACKED_ROWS = 8  # rows that the arrangement of packed weights is chosen for; it serves any number
PACKED_DTYPES = (torch.float32, torch.bfloat16)
OUTPUTS_PER_TILE = 4096  # of a weight's gradient: the product of a tile is still in the cache when it is added


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
    if not _takes_onednn(rows, weight) or num_rows == 0 or (num_rows == 1 and weight.numel() <= ONE_ROW_WEIGHTS):
        return F.linear(rows, weight, bias)
    return _Linear.apply(rows, weight, bias) if torch.is_grad_enabled() else _linear(rows, weight, bias)


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


def _takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether their product is in float32 on a CPU. A compiler is left to choose for itself."""
    return (
        not torch.compiler.is_compiling()  # first: a compiler would stumble over the rest
        and left.device.type == right.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right`: [M, O] and [M, I] give [O, I]."""
    if not _takes_onednn(left, right):
        return left.T @ right
    parts = (left.contiguous().to_mkldnn(), right.contiguous().to_mkldnn())
    weight = right.new_empty(left.shape[1], right.shape[1])  # of which the operator reads the shape alone
    return torch.ops.aten.mkldnn_linear_backward_weights(*parts, weight, False)[0]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()
        flat = gradient.flatten(0, -2)
        return (
            _linear(gradient, weight.T) if needs_rows else None,
            _outer(flat, rows.flatten(0, -2)) if needs_weight else None,
            flat.sum(dim=0) if needs_bias else None,
        )
