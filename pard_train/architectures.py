"""Which architectures can draft, by `model_type`, and why others cannot. tests/test_architectures.py holds the lists.

An architecture works if a packed forward pass gives the logits of one forward pass per chain, in training, in decoding
with a cache and in replay. Some accept every argument and compute something else, so an unknown type is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from pard_train.layout import Window

WORKS = """
afmoe apertus apertus1p5_text arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm
deepseek_v2 deepseek_v3 doge dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe flex_olmo flint gemma gemma2
gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neox
gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1 laguna llama mellum mimo_v2_flash minicpm3 minimax_m2
minimax_m3_vl_text ministral ministral3 mistral mixtral nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3
phimoe qwen2 qwen2_moe qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open starcoder2 vaultgemma youtu
"""
WITHOUT_WINDOW = frozenset(("doge", "phimoe", "qwen2_moe"))  # do not tell the attention function their window

REFUSED = {  # reason -> types
    "it is an encoder, or needs one": """bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small
    camembert data2vec-text electra ernie marian mbart megatron-bert musicgen musicgen_melody mvp pegasus plbart
    prophetnet reformer rembert roberta roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta
    xlm-roberta-xl xlnet xmod""",
    "it reads images or sound beside text; give a text model": """blt emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant
    gemma4_unified gemma4_unified_assistant git got_ocr2 llama4 mllama moshi moss_transcribe_diarize phi4_multimodal
    qwen3_5 qwen3_5_moe qwen4_exp dots3_note""",
    "its recurrent layers pass every slot of a pack on to the next; each chain would need a copy of their state": """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid inkling2_loop_text inkling2_text inkling_text jamba
    kimi_linear lara_mini lfm2 lfm2_moe lfm3 mamba mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text
    qwen3_next qwen4_exp_text recurrent_gemma rwkv xlstm zamba zamba2 zaya""",
    "its layers choose or compress keys by their place in the sequence, which in a pack is not the position": """axk2
    cohere_compass_text deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4 llama4_text""",
    "its layers do not call Transformers' attention interface, so the mask of a pack does not reach them": """bloom
    codegen cpmant dbrx falcon gpt_neo gpt_neox_japanese gptj mpt nemotron openai-gpt stablelm xglm""",
    "its packed forward pass, or its decoding with a cache, differs from one pass per chain": """diffllama dory
    gemma3n_text gemma4_unified_text hrm_text longcat_flash modernbert-decoder""",
}
REASONS = {model_type: reason for reason, types in REFUSED.items() for model_type in types.split()}
LAYERS = {"full_attention", "sliding_attention"}


def windows_of(config: PretrainedConfig) -> tuple[Window, ...]:
    """The windows that the layers of a model may have, in tokens."""
    window, layers = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if window is None or (layers and "sliding_attention" not in layers):
        return (None,)
    return (None, window) if layers is None or "full_attention" in layers else (window,)


def per_layer_lists(config: Mapping[str, Any], num_layers: int) -> dict[str, list[Any]]:
    """What a config says per layer, such as layer_types."""
    lists = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == num_layers}
    return {name: value for name, value in lists.items() if name not in ("architectures", "eos_token_id")}


def why_refused(config: PretrainedConfig) -> str | None:
    """Why a model cannot draft, None if it can."""
    kind, others = config.model_type, sorted(set(getattr(config, "layer_types", None) or ()) - LAYERS)
    if kind not in WORKS.split():
        return REASONS.get(kind, "this architecture is not tested; see docs/extend/add-a-family.md")
    if others:
        return f"it has {', '.join(others)} layers"
    if kind in WITHOUT_WINDOW and windows_of(config) != (None,):
        return f"it has a sliding window (sliding_window={config.sliding_window}), which its layers do not announce"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal (use_bidirectional_attention)"
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "hidden_size_per_layer_input", 0):
        return "its layers share keys (num_kv_shared_layers) or read embeddings of their own"
    if grown := _rope_types(config) & {"dynamic", "longrope"}:
        return f"its rotary frequencies ({', '.join(grown)}) depend on the longest text of a pack"
    return None


def _rope_types(config: PretrainedConfig) -> set[str]:
    """Kinds of rotary positions; some models have one per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {value.get("rope_type", "default") for value in nested or [parameters]}
