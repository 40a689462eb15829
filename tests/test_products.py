"""Products through oneDNN are PyTorch's own, to float32 rounding, with their gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pard_train.core.cpu import products
from pard_train.core.cpu.products import OneDnnLinear, add_outer, linear, use_onednn
from pard_train.device import default_device
from pard_train.model import load_causal_lm

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


def exact(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(rows.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("shape", [(1,), (2,), (3, 5), (2, 1, 7), (0,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear_and_its_gradients_are_those_of_float64(shape: tuple[int, ...], has_bias: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape, 24, generator=draw, requires_grad=True)
    weight = torch.randn(40, 24, generator=draw, requires_grad=True)
    bias = torch.randn(40, generator=draw, requires_grad=True) if has_bias else None
    upstream = torch.randn(*shape, 40, generator=draw)
    inputs = [tensor for tensor in (rows, weight, bias) if tensor is not None]
    out, wanted = linear(rows, weight, bias), exact(rows, weight, bias)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream.double()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_strided_and_expanded_operands_are_read_right() -> None:
    rows, weight = torch.randn(30, 7).T, torch.randn(30, 9).T.requires_grad_()  # both transposed
    out = linear(rows, weight)
    torch.testing.assert_close(out.double(), exact(rows, weight, None), rtol=1e-5, atol=1e-5)
    out.sum().backward()  # its gradient is one number, expanded
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, rows.sum(dim=0).expand(9, 30), rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_gets_no_gradient_and_its_rows_do() -> None:
    rows, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    linear(rows, weight).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, weight.sum(dim=0).expand(3, 8), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_outer_adds_tile_by_tile(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(products, "OUTPUTS_PER_TILE", 8)  # three tiles, the last of them short
    left, right, total = torch.randn(11, 20).to(dtype), torch.randn(11, 6).to(dtype), torch.randn(20, 6)
    wanted = total.double() + left.double().T @ right.double()
    add_outer(total, left, right)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_autocast_takes_bfloat16_as_ever() -> None:
    layer = nn.Linear(16, 8)
    changed = copy.deepcopy(layer)
    use_onednn(changed)
    rows = torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(rows).dtype == torch.bfloat16
        assert torch.equal(changed(rows), layer(rows))


def test_a_loaded_model_has_the_weights_and_names_that_it_had(base_folder: Path) -> None:
    if default_device().type != "cpu":
        pytest.skip("on a CPU only")
    model = load_causal_lm(str(base_folder))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert linears and all(type(module) is OneDnnLinear for module in linears)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if type(module) is OneDnnLinear:
            module.__class__ = nn.Linear
    assert list(model.state_dict()) == list(plain.state_dict())
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_products_keep_float32_and_leave_the_setting_as_it_was() -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    rows = torch.full((300, 500), 1 + 2.0**-12)  # 1 in bfloat16
    torch.testing.assert_close(linear(rows, rows), torch.full((300, 300), 500 * (1 + 2.0**-12) ** 2), rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="shapes"):
        linear(rows, torch.ones(4, 3))
    assert setting.fp32_precision == before


def test_a_processor_that_would_round_to_bfloat16_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded = torch.matmul

    def through_bfloat16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return rounded(left.bfloat16(), right.bfloat16()).float()

    monkeypatch.setattr(torch, "bmm", through_bfloat16)
    assert not products._keeps_float32.__wrapped__()
