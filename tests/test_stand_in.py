"""A stand-in for a larger target computes the same logits bit for bit, wherever a target is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_model, config_for, conversations
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.config import Config, DraftConfig, ModelConfig
from pard_train.downloads import local_model
from pard_train.errors import UserError
from pard_train.evaluation.evaluate import evaluate
from pard_train.generation.decoding import Limits, decode
from pard_train.model import inspect_base, load_causal_lm, load_config, write_initial_draft
from pard_train.publishing.verification import verify
from pard_train.targets.regeneration import write_answers
from pard_train.targets.target import Target

PROMPT = [1, 120, 130, 140, 2, 7, 55]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pard_train" / "stand-ins"


def write_model(folder: Path, family: str, **shape: Any) -> Path:
    """A tiny model whose biases are not zero, in two files."""
    model = build_model(family, seed=4, **shape)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits


BIASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
    "gemma3": {},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_equal_bit_for_bit_with_biases_and_grouped_heads(
    family: str, tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = write_model(tmp_path / "model", family, tied=tied, **BIASES[family])
    assert len(list(source.glob("*.safetensors"))) > 1
    model, larger = (load_causal_lm(name, dtype=dtype) for name in (str(source), f"{source}*4"))
    assert larger.config.num_hidden_layers == len(larger.model.layers) == 8
    assert torch.equal(logits_of(model), logits_of(larger))
    limits = Limits(20, frozenset())
    texts = [[token for step in decode(m, PROMPT, limits) for token in step.tokens] for m in (model, larger)]
    assert texts[0] == texts[1]


def test_every_copy_computes_all_that_its_layer_does_and_adds_nothing(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "llama", **BIASES["llama"])
    own = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    folder = Path(local_model(f"{source}*3"))
    written = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert {name for name in written if ".layers." not in name} == {name for name in own if ".layers." not in name}
    for name, tensor in own.items():
        assert torch.equal(written[name], tensor)
        for layer in range(2) if name.startswith("model.layers.0.") else ():
            copied = written[name.replace(".0.", f".{2 * (layer + 1)}.")]
            is_output = "o_proj" in name or "down_proj" in name
            assert torch.equal(copied, torch.zeros_like(tensor) if is_output else tensor)
    assert own["model.layers.0.self_attn.o_proj.bias"].abs().min() > 0  # the claim includes biases


def test_layer_types_and_windows_grow_with_the_layers(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", "qwen2")
    config = json.loads((source / "config.json").read_text())
    assert config["layer_types"] == ["full_attention"] * 2
    (source / "config.json").write_text(json.dumps({**config, "no_rope_layers": [1, 0]}))  # as SmolLM3 has it
    larger = load_config(f"{source}*5")
    assert larger.layer_types == ["full_attention"] * 10
    assert larger.max_window_layers == 5 * config["max_window_layers"]
    assert larger.no_rope_layers == [1, 0] * 5


def test_a_stand_in_is_written_once_for_the_same_weights(tmp_path: Path, cache: Path) -> None:
    source = write_model(tmp_path / "model", "qwen2")
    folder = local_model(f"{source}*2")
    assert local_model(f"{source}*2") == folder
    write_model(source, "qwen2", num_hidden_layers=1)
    assert local_model(f"{source}*2") != folder
    assert load_config(f"{source}*2").num_hidden_layers == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("name, reason", [("MODEL*1", "must be 2 to 64"), ("MODEL*65", "must be 2 to 64")])
def test_other_numbers_are_refused(name: str, reason: str, base_folder: Path) -> None:
    with pytest.raises(UserError, match=reason):
        load_config(name.replace("MODEL", str(base_folder)))


def test_layers_without_output_projections_are_refused(tmp_path: Path, cache: Path) -> None:
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    keys = json.loads((tmp_path / "gpt2" / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(keys))
    with pytest.raises(UserError, match=r"layer 0 has no self_attn\.o_proj"):
        local_model(f"{tmp_path / 'gpt2'}*2")
    assert not cache.exists() or not list(cache.iterdir())


def test_a_stand_in_is_a_target_of_regeneration_and_evaluation_with_the_same_text(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": c[:1]}) + "\n" for c in conversations(3, seed=5)))
    names = [str(base_folder), f"{base_folder}*3"]
    targets = [Target(name, Config(targets=names)) for name in names]
    assert targets[1].label == targets[0].label + "-stand-in-x3"
    assert targets[1].end_ids == targets[0].end_ids
    assert targets[1].fingerprint != targets[0].fingerprint  # speeds are not shared
    rows = []
    for name in names:
        out = tmp_path / name.replace("/", "-")
        written = write_answers(
            config_for("regenerate", target=name, max_new_tokens=12, output_dir=str(out), seed=0), prompts, out
        )
        rows.append([json.loads(line)["token_ids"] for line in written.open()])
    assert rows[0] == rows[1]
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 4, tmp_path / "draft")
    result = evaluate(
        config_for(
            "evaluate",
            draft=str(tmp_path / "draft"),
            targets=names,
            benchmarks=[str(prompts)],
            num_draft_tokens=[4],
            max_new_tokens=12,
            live_prompts=1,
            live_rounds=1,
            output_dir=str(tmp_path / "out"),
        )
    )
    assert result["failures"] == []
    replayed = [record for record in result["records"] if record["mode"] == "replay"]
    assert [r["target"] for r in replayed] == ["base", "base-stand-in-x3"]
    assert replayed[0]["histogram"] == replayed[1]["histogram"]
    live = [record for record in result["records"] if record["mode"] == "live"]
    assert all(record["speed"]["num_identical_answers"] == record["num_turns"] for record in live)
    shared = {"draft": str(tmp_path / "draft"), "engine": "transformers", "benchmarks": [str(prompts)]}
    verified = [
        verify(config_for("verify", target=name, max_new_tokens=8, output_dir=str(tmp_path / f"{n}"), **shared))
        for n, name in enumerate(names)
    ]
    assert all(report["agrees"] for report in verified)
    assert verified[0]["observed"] == verified[1]["observed"]
