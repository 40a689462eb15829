"""Published PARD folders of every family evaluate and train further as they are.

The folders have the shape of amd/PARD-Qwen2.5-0.5B, PARD-Qwen3-0.6B, PARD-Llama-3.2-1B and
PARD-DeepSeek-R1-Distill-Qwen-1.5B: config.json as transformers 4 wrote it with `pard_token` and `spd_type` added, bf16
safetensors, and the base model's tokenizer with its template inside tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHATML, FAMILIES, build_tokenizer, conversations, experiment, exporting, replay
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from pard_train.acceptance.counting import walk
from pard_train.config import DraftConfig, ModelConfig
from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits, decode, end_ids_of
from pard_train.generation.proposers import Drafter
from pard_train.mask_token import choose_mask_token
from pard_train.model import inspect_base, load_causal_lm, load_tokenizer
from pard_train.publishing.export import export
from pard_train.training.trainer import train

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|unused|>\n\n{{ m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|unused|>\n\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
    "{% endif %}<|unused|>{{ content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|unused|>{% endif %}"
)

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "spd_type": "pard",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": False,
    "vocab_size": 320,
}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 0, "eos_token_id": 2}
QWEN2 |= {"max_window_layers": 21, "sliding_window": 32768, "use_sliding_window": False, "pard_token": 300}
PUBLISHED: dict[str, tuple[dict[str, Any], str, str]] = {  # config.json, chat template, class of the tokenizer
    "qwen2.5": (QWEN2, CHATML, "Qwen2Tokenizer"),
    "qwen3": (
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "bos_token_id": 0, "eos_token_id": 2}
        | {"attention_bias": False, "head_dim": 16, "max_window_layers": 28, "sliding_window": None}
        | {"use_sliding_window": False, "pard_token": 305},  # not the first spare row
        CHATML,
        "Qwen2Tokenizer",
    ),
    "llama3": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 0, "eos_token_id": [1, 2]}
        | {"attention_bias": False, "head_dim": 16, "mlp_bias": False, "pretraining_tp": 1, "rope_theta": 500000.0}
        | {"rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0}}
        | {"vocab_size": 301, "pard_token": 300},  # every row has an entry: the mask token is a reserved one
        LLAMA3,
        "PreTrainedTokenizerFast",
    ),
    "deepseek-r1": (
        QWEN2 | {"sliding_window": 4096, "use_mrope": False, "tie_word_embeddings": False, "rope_theta": 10000.0},
        DEEPSEEK,
        "LlamaTokenizerFast",
    ),
}
PUBLISHED["llama3"][0]["rope_scaling"] |= {"original_max_position_embeddings": 8192, "rope_type": "llama3"}


def publish(name: str, folder: Path, **keys: Any) -> Path:
    """Write a folder as it was published; keyword arguments are keys of config.json, None leaves one out."""
    config, template, tokenizer_class = PUBLISHED[name]
    config = COMMON | config
    torch.manual_seed(1)
    shape = {key: config[key] for key in ("vocab_size", "tie_word_embeddings", *list(COMMON)[2:9])}
    family = FAMILIES[config["model_type"]](**shape, head_dim=16)
    AutoModelForCausalLM.from_config(family, dtype=torch.bfloat16).save_pretrained(folder)
    ends = {"bos_token_id": 0, "eos_token_id": [2, 1], "do_sample": True, "temperature": 0.7, "top_p": 0.8}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    config = {key: value for key, value in (config | keys).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(template)
    tokenizer.bos_token = "<|endoftext|>"
    if name == "llama3":
        tokenizer.add_tokens([AddedToken("<|reserved_special_token_12|>", special=True, normalized=False)])
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(number): {"content": token.content, "special": token.special, "normalized": token.normalized}
        | {"lstrip": False, "rstrip": False, "single_word": False}
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    settings = {"added_tokens_decoder": added, "chat_template": template, "tokenizer_class": tokenizer_class}
    settings |= {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}  # as the reference
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_draft_evaluates_and_trains_further_as_it_is(name: str, chats_file: Path, tmp_path: Path) -> None:
    folder = publish(name, tmp_path / "published")
    mask = PUBLISHED[name][0]["pard_token"]
    base = inspect_base(ModelConfig(path=str(folder)), DraftConfig())
    assert (base.is_draft, base.mask_token_id) == (True, mask)
    target = load_causal_lm(str(folder), dtype=torch.float32)
    encoder = ChatEncoder(load_tokenizer(str(folder)))
    end_ids = end_ids_of(str(folder), encoder.tokenizer)
    assert end_ids == {1, 2}
    assert_replay_is_live(folder, target, encoder, Limits(24, end_ids))

    settings = experiment(folder, chats_file, tmp_path / "run", max_steps=2)
    trained = train(settings)
    assert json.loads((trained / "config.json").read_text())["pard_token"] == mask
    before, after = (load_causal_lm(str(path), dtype=torch.float32).state_dict() for path in (folder, trained))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    for name in ("chat_template.jinja", "special_tokens_map.json"):
        assert not (trained / name).exists()  # the template stays where it was, and nothing is made up
    assert (trained / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert_replay_is_live(trained, target, encoder, Limits(24, end_ids))


def replayed(folder: Path, prompt: list[int], answer: list[int]) -> list[int]:
    """Leading matches of a draft at every place of an answer, K = 4."""
    drafter = Drafter.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    return np.asarray(replay(drafter, prompt, answer, 4)).tolist()


def assert_replay_is_live(draft: Path, target: torch.nn.Module, encoder: ChatEncoder, limits: Limits) -> None:
    """Replay of the target's text accepts what live decoding accepts, step for step."""
    drafter = Drafter.load(str(draft), dtype=torch.float32, device=torch.device("cpu"))
    for chat in conversations(3, seed=5):
        prompt = encoder.encode_prompt(chat[:1])
        answer = [token for step in decode(target, prompt, limits) for token in step.tokens]
        live = list(decode(target, prompt, limits, drafter=drafter, num_draft_tokens=4))
        assert [token for step in live for token in step.tokens] == answer
        assert walk(replayed(draft, prompt, answer), 4).accepted == [step.num_accepted for step in live]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_draft_is_exported_for_a_larger_target_with_all_keys(name: str, tmp_path: Path) -> None:
    folder = publish(name, tmp_path / "published")
    target = publish(name, tmp_path / "target", vocab_size=384, pard_token=None, spd_type=None)
    export(
        exporting(
            str(folder),
            str(tmp_path / "export"),
            targets=[str(target)],
            dtype="float32",
        )
    )
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    old = COMMON | PUBLISHED[name][0]
    assert config["pard_token"] == config["mask_token_id"] == old["pard_token"]
    assert (config["vocab_size"], config["rope_theta"]) == (384, old["rope_theta"])
    assert config.get("rope_scaling") == old["rope_scaling"]
    assert "pard_num_draft_tokens" not in config  # nobody knows it
    prompt, answer = [5, 6, 7, 8], list(range(20, 50))
    assert replayed(tmp_path / "export", prompt, answer) == replayed(folder, prompt, answer)
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_draft_with_nothing_but_its_mask_token_is_completed(tmp_path: Path) -> None:
    folder = publish("qwen2.5", tmp_path / "published", spd_type=None, eos_token_id=None, bos_token_id=None)
    (folder / "generation_config.json").unlink()
    assert end_ids_of(str(folder), load_tokenizer(str(folder))) == {2}
    export(exporting(str(folder), str(tmp_path / "export")))
    assert json.loads((tmp_path / "export" / "config.json").read_text())["spd_type"] == "pard"
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text()) == {"eos_token_id": [2]}


def test_a_mask_token_that_the_tokenizer_has_an_entry_for_is_kept_but_never_drafted(tmp_path: Path) -> None:
    folder = publish("llama3", tmp_path / "published")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.convert_ids_to_tokens(300) == "<|reserved_special_token_12|>"
    with pytest.raises(
        UserError, match="is the token"
    ):  # a new draft must name it, so that nobody takes one by mistake
        choose_mask_token(tokenizer, 301, DraftConfig(mask_token_id=300))
    assert inspect_base(ModelConfig(path=str(folder)), DraftConfig(mask_token="<|reserved_special_token_12|>")).is_draft
    drafter = Drafter.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    logits = torch.zeros(1, 301)
    logits[0, 300] = 9.0
    assert drafter.choose(logits).tolist() == [0]


def test_a_draft_of_the_second_generation_serves_without_its_targets_features(chats_file: Path, tmp_path: Path) -> None:
    plain = publish("qwen3", tmp_path / "plain")
    folder = publish("qwen3", tmp_path / "second", spd_type="pard2", pard2=True, pard2_target_layers=[-1, -8])
    weights = load_file(folder / "model.safetensors") | {"target_proj.weight": torch.ones(64, 64)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    prompt, answer = [5, 6, 7, 8], list(range(20, 50))
    assert replayed(folder, prompt, answer) == replayed(plain, prompt, answer)
    assert (train(experiment(folder, chats_file, tmp_path / "run", max_steps=1)) / "model.safetensors").exists()


@pytest.mark.parametrize("mask", [-1, 320, 400])
def test_a_mask_token_outside_the_vocabulary_is_refused_with_its_folder(mask: int, tmp_path: Path) -> None:
    folder = publish("qwen2.5", tmp_path / "published", pard_token=mask)  # -1: trained without naming one
    with pytest.raises(UserError, match=rf"{folder}: pard_token={mask} .* must be one id in \[0, 320\)"):
        inspect_base(ModelConfig(path=str(folder)), DraftConfig())


def test_a_draft_without_a_chat_template_says_where_one_goes(chats_file: Path, tmp_path: Path) -> None:
    folder = publish("qwen2.5", tmp_path / "published")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"has no chat template: .* put chat_template\.jinja beside its tokenizer"):
        train(experiment(folder, chats_file, tmp_path / "run", max_steps=1))
    export(exporting(str(folder), str(tmp_path / "export")))  # engines use the target's
    (folder / "chat_template.jinja").write_text(template)
    assert (train(experiment(folder, chats_file, tmp_path / "run", max_steps=1)) / "chat_template.jinja").exists()


def test_weights_that_can_carry_code_are_not_read(tmp_path: Path) -> None:
    folder = publish("qwen2.5", tmp_path / "published")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        Drafter.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
