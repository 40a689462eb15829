"""A draft from some layers of its target: a plain model of fewer layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LAYERS, build_model, experiment, exporting
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.config import DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.kept_layers import keep_layers, resolve_keep_layers
from pard_train.model import inspect_base, load_causal_lm, load_config
from pard_train.publishing.export import export
from pard_train.training.trainer import train

NUM_LAYERS = 6
TYPES = ["sliding_attention", "full_attention"] * 3
TEXTS = [np.arange(4, 40) * 7 % 300, np.arange(5, 30) * 11 % 300]


def deep_model(family: str) -> PreTrainedModel:
    """Six random layers."""
    types = {"layer_types": TYPES} if family in LAYERS else {}
    return build_model(family, seed=0, num_hidden_layers=NUM_LAYERS, **types)


def logits_through(model: PreTrainedModel, kept: list[int]) -> torch.Tensor:
    """The oracle: the other layers of the whole model return their input."""
    hooks = [
        layer.register_forward_hook(lambda _, args, output: args[0])
        for number, layer in enumerate(model.base_model.layers)
        if number not in kept
    ]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(TEXTS[0])[None], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def influence_through(model: PreTrainedModel, kept: list[int]) -> list[float]:
    """The oracle of block influence, from the hidden states between layers."""
    inputs: dict[int, list[torch.Tensor]] = {number: [] for number in range(NUM_LAYERS)}
    outputs: dict[int, list[torch.Tensor]] = {number: [] for number in range(NUM_LAYERS)}
    for number, layer in enumerate(model.base_model.layers):
        layer.see = layer.register_forward_hook(
            lambda _, args, output, n=number: (
                (inputs[n].append(args[0]), outputs[n].append(output), None)[-1] if n in kept else args[0]
            )
        )
    with torch.no_grad():
        for text in TEXTS:
            model(input_ids=torch.from_numpy(text)[None], use_cache=False)
    for layer in model.base_model.layers:
        layer.see.remove()
    means = []
    for n in kept:
        pairs = zip(inputs[n], outputs[n], strict=True)
        means.append(np.mean([float(1 - torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]))
    return means


def test_a_model_of_some_layers_computes_what_the_whole_computes_through_them(family: str, tmp_path: Path) -> None:
    kept = [0, 1, 3, 4]
    expected = logits_through(deep_model(family), kept)
    model = deep_model(family)
    assert keep_layers(model, kept, "influence", TEXTS) == kept
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = again(input_ids=torch.from_numpy(TEXTS[0])[None], use_cache=False).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert again.config.num_hidden_layers == 4
    if family in LAYERS:
        assert again.config.layer_types == [TYPES[layer] for layer in kept]


def test_the_layer_of_least_influence_is_left_out_and_the_others_are_measured_again(family: str) -> None:
    whole, kept = deep_model(family), list(range(NUM_LAYERS))
    while len(kept) > 3:
        del kept[int(np.argmin(influence_through(whole, kept)))]
    assert keep_layers(deep_model(family), 3, "influence", TEXTS) == kept


def test_a_count_of_layers_may_be_the_first_or_evenly_spaced() -> None:
    assert keep_layers(deep_model("llama"), 3, "first", TEXTS) == [0, 1, 2]
    assert keep_layers(deep_model("llama"), 3, "even", TEXTS) in ([0, 2, 5], [0, 3, 5])
    assert keep_layers(deep_model("llama"), 1, "even", TEXTS) == [0]
    assert keep_layers(deep_model("llama"), NUM_LAYERS, "even", TEXTS) == list(range(NUM_LAYERS))


@pytest.mark.parametrize(
    "keep, reason",
    [
        ([], "at least one"),
        ([0, 0], "named once"),
        ([2, 1], r"increasing order, such as \[1, 2\]"),
        ([0, 6], "from 0 to 5"),
        ([-1], "from 0 to 5"),
        (0, "the model has 6 layers"),
        (7, "the model has 6 layers"),
        (True, "not understood"),
        ("half", "not understood"),
        (2.5, "not understood"),
    ],
)
def test_layers_that_do_not_exist_are_refused_before_weights_are_loaded(
    keep: Any, reason: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    deep_model("qwen2").config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=reason) as error:
        inspect_base(ModelConfig(path=str(tmp_path), keep_layers=keep), DraftConfig())
    assert str(error.value).startswith(f"model.keep_layers={keep}")
    assert "\n" not in str(error.value)


def test_auto_keeps_two_thirds() -> None:
    assert [resolve_keep_layers("auto", number) for number in (1, 6, 24, 30)] == [1, 4, 16, 20]
    assert resolve_keep_layers(None, 6) is None


def test_layers_that_a_config_cannot_describe_are_refused() -> None:
    """The first layer of DeepSeek V3 is dense, and the others are mixtures of experts."""
    from test_architectures import tiny_model

    texts = [np.arange(3, 40)]
    assert keep_layers(tiny_model("deepseek_v3"), [0], "influence", texts) == [0]
    with pytest.raises(UserError, match="cannot describe"):
        keep_layers(tiny_model("deepseek_v3"), [1], "influence", texts)


def test_a_draft_of_some_layers_is_trained_and_exported_as_any_other(
    chats_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    deep_model("gemma3").save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = experiment(base, chats_file, tmp_path / "run", max_steps=3)
    config = replace(config, model=replace(config.model, keep_layers=4))
    draft = train(config)
    trained = load_config(str(draft))
    assert trained.num_hidden_layers == 4
    assert 0 < trained.pard_trained_length <= config.data.max_length
    assert len(trained.pard_kept_layers) == 4
    assert trained.layer_types == [TYPES[layer] for layer in trained.pard_kept_layers]
    for keep, number in (("auto", None), (4, None), (trained.pard_kept_layers, None), (2, 2)):
        assert inspect_base(ModelConfig(path=str(draft), keep_layers=keep), DraftConfig()).keep == number
    assert f"layers kept of {base}: {', '.join(map(str, trained.pard_kept_layers))}" in capsys.readouterr().out
    (folder,) = export(exporting(str(draft), str(tmp_path / "export")))
    before, after = (load_causal_lm(str(path), dtype=torch.float32).state_dict() for path in (draft, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16().float(), after[name]) for name in before)
