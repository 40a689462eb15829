"""FLOPs, bytes and rates against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stages import StepBytes, step_bytes
from tiny import build_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GraniteConfig, Qwen2Config, Qwen3MoeConfig

from pard_train.config import DraftConfig
from pard_train.layout import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    DrawKey,
    SlotLayout,
    is_visible,
    lay_out_document,
    sample_chain_lengths,
)
from pard_train.training.throughput import (
    CHIPS,
    ModelShape,
    Work,
    chip_of,
    count_work,
    peak_memory,
    step_flops,
    throughput_metrics,
)

SHAPE = ModelShape(
    num_layers=2, hidden=4, num_heads=2, num_key_value_heads=1, head_size=3, intermediate=5, vocabulary=7
)
WORK = Work(slots=10, supervised=6, pairs=40, tokens=3)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_counted_from_the_config_are_those_of_the_model(family: str, tied: bool) -> None:
    model = build_model(family, seed=0, tied=tied)
    shape = ModelShape.of(model.config)
    if family == "gemma3":  # its windows are not counted
        assert shape is None
        return
    assert shape is not None
    linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    assert shape.layer_weights == sum(module.weight.numel() for module in linear)
    assert shape.head_weights == model.get_output_embeddings().weight.numel()


def test_the_matrices_of_qwen2_5_0_5b_hold_358_million_weights_and_its_head_136_million() -> None:
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    )
    shape = ModelShape.of(config)
    assert shape is not None
    layer = 896 * (896 + 128 + 128 + 896) + 3 * 896 * 4864
    assert shape.layer_weights == 24 * layer == 357_826_560
    assert shape.head_weights == 136_134_656


def test_a_model_of_another_kind_has_no_count() -> None:
    assert ModelShape.of(Qwen3MoeConfig()) is None
    assert ModelShape.of(GraniteConfig()) is None


def test_the_operations_of_a_step_are_those_counted_by_hand() -> None:
    # One layer: query 4x6, key and value 4x3 each, output 6x4, gate and up 4x5 each, down 5x4: 24+12+12+24+20+20+20.
    assert SHAPE.layer_weights == 2 * 132
    flops = step_flops(SHAPE, WORK)
    assert flops.layers == 3 * 2 * 10 * 264  # forward and two of backward, multiply and add, slots, weights
    assert flops.head == 3 * 2 * 6 * (4 * 7)
    # Forward: 40 pairs, 2 layers, 2 heads, 3 products for the score and 3 for the weighted sum, multiply and add.
    assert flops.attention == 3 * (40 * 2 * 2 * (3 + 3) * 2)


def test_the_bytes_of_a_step_are_those_counted_by_hand() -> None:
    moved = step_bytes(SHAPE, WORK, bytes_per_value=4)
    inputs = 10 * (4 + 4 + 4 + 6 + 4 + 4 + 5)  # of the seven matrices of a layer
    outputs = 10 * (6 + 3 + 3 + 4 + 5 + 5 + 4)
    head = 6 * 4 + 6 * 7 + 4 * 7
    expected = StepBytes(
        products=4 * 3 * (2 * (inputs + outputs + 132) + head),
        attention=4 * 3 * 2 * 10 * (6 + 3 + 3 + 6),  # query, key, value, output
        optimizer=4 * 7 * (264 + 28),
    )
    assert moved == expected
    assert moved.total == expected.products + expected.attention + expected.optimizer


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_operations_of_the_real_forward_and_backward_are_those_of_the_formula(family: str) -> None:
    """By PyTorch's own counter, for a causal text through attention that computes every pair."""
    model = build_model(family, seed=0)
    model.set_attn_implementation("eager")
    shape, size = ModelShape.of(model.config), 32
    assert shape is not None
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(size)[None], use_cache=False).logits.sum().backward()
    flops = sum(step_flops(shape, Work(size, size, size * size)))
    extra = counter.get_total_flops() - flops
    assert 0 <= extra <= 0.02 * flops  # rotary angles, which are an outer product


def test_work_is_that_of_the_mask_without_padding() -> None:
    draft, mask = DraftConfig(num_draft_tokens=5), np.arange(30) >= 11
    layouts = [lay_out_document(sample_chain_lengths(mask, draft, DrawKey(0, 0, n)), n) for n in range(2)]
    padding = SlotLayout(np.full(9, PADDING_DOCUMENT), np.arange(9), np.zeros(9, dtype=int))
    names = ("document", "anchor", "depth")
    parts = [np.concatenate([getattr(layout, name) for layout in [*layouts, padding]]) for name in names]
    layout = SlotLayout(*map(torch.from_numpy, parts))
    labels = torch.full((len(layout),), IGNORE_INDEX)
    labels[[3, 5, 40]] = 0
    real = layout[layout.document >= 0]
    num_tokens = int((layout.depth[[3, 5, 40]] == 0).sum())
    expected = [len(layout) - 9, 3, int(is_visible(real, real).sum()), num_tokens]
    assert count_work(layout, labels).tolist() == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA H200 NVL", 835.5),
        ("AMD Instinct MI210", 181.0),
        ("AMD Instinct MI250", 181.05),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2516.6),
    ],
)
def test_a_known_chip_has_its_peak_with_a_source(name: str, peak: float) -> None:
    chip = chip_of(name)
    assert chip is not None
    assert chip.peak == pytest.approx(peak * 1e12)
    assert "data sheet" in chip.source


@pytest.mark.parametrize(
    "name", ["NVIDIA GH200 480GB", "NVIDIA H20", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "cpu"]
)
def test_a_chip_that_is_not_in_the_list_has_no_peak(name: str) -> None:
    assert chip_of(name) is None


def test_rates_are_work_over_seconds_and_a_share_of_what_all_devices_could_do() -> None:
    flops = sum(step_flops(SHAPE, WORK))
    chip = CHIPS[0]
    metrics = throughput_metrics(WORK, 2.0, SHAPE, chip, num_devices=4)
    assert metrics == pytest.approx(
        {
            "slots_per_second": 5.0,
            "supervised_tokens_per_second": 1.5,
            "model_flops_per_second": flops / 2,
            "mfu": flops / 2 / (4 * chip.peak),
        }
    )


def test_what_is_not_known_is_absent() -> None:
    rates = {"slots_per_second", "supervised_tokens_per_second"}
    assert throughput_metrics(WORK, 2.0, None, CHIPS[0], 1).keys() == rates
    assert throughput_metrics(WORK, 2.0, SHAPE, None, 1).keys() == rates | {"model_flops_per_second"}
    assert peak_memory(torch.device("cpu")) is None
