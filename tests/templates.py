"""Chat templates of real model families, written anew, on tiny byte-level tokenizers with their special tokens.

Each template gives the text of the family's own for system, user and assistant turns; tool calls are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tiny
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pard_train.data.chat import ChatEncoder

_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def _chatml(default_system: str) -> str:
    return (
        "{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\n" + default_system + "<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + _PROMPT
    )


def _wide(text: str) -> str:
    """DeepSeek's tokens have full-width bars."""
    return text.replace("<|", "<\uff5c").replace("|>", "\uff5c>")


# Thoughts are kept after the last question only, where a last answer without one shows an empty one.
_QWEN3_TURNS = (
    "{% set ns = namespace(last=messages | length) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% set words = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if m.reasoning_content is not string and '</think>' in words %}"
    r"{% set thought = words.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    r"{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\\n') }}\n</think>\n\n{% set words = words.lstrip('\\n') %}{% endif %}{% endif %}"
    "{{ words }}<|im_end|>\n{% endfor %}"
)
_QWEN3_PROMPT = _PROMPT.replace(
    "{% endif %}",
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
_LLAMA31 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ date_string | default('26 Jul 2024') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages[1 if messages[0].role == 'system' else 0 :] %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_GEMMA_TURNS = (
    "{% for m in messages if m.role != 'system' %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_SYSTEM = "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
_MISTRAL_V1 = (
    "{{ bos_token }}" + _SYSTEM + "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %} [INST] {{ system if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_MISTRAL_V3 = (  # the system prompt stands in the last message, if that is the user's
    "{{ bos_token }}" + _SYSTEM + "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST] {{ system if loop.last }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
_PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_PHI4_MINI = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
_DEEPSEEK_R1 = _wide(
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
_OLMO2 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role != 'assistant' %}{{ '\n' }}{% else %}{{ eos_token }}{{ '\n' if not loop.last }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_GRANITE3 = (
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\n"
    "Today's Date: {{ strftime_now('%B %d, %Y') }}.\n"
    "You are Granite, developed by IBM. You are a helpful AI assistant.<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """Chat format of a model family.

    Attributes:
        template: in Jinja.
        end: token that ends an answer.
        eos: the tokenizer's EOS token, where it is not `end`.
        bos: first token of every prompt; the tokenizer adds one by itself, too, unless it is also the EOS token.
        special: further special tokens.
        headers: tokens of the template that the tokenizer does not mark as special.
        prefix: what the template writes before plain content that ends a conversation, after the generation prompt.
        trims: the template strips both ends of content.
        thoughts: `<think>` and `</think>` are tokens (not special ones), and the template splits content at them.
        opens: the generation prompt opens a thought.
        closes: the generation prompt holds an empty thought.
        template_kwargs: arguments of the template.
    """

    template: str
    end: str
    eos: str | None = None
    bos: str | None = None
    special: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    prefix: str = ""
    trims: bool = False
    thoughts: bool = False
    opens: bool = False
    closes: bool = False
    template_kwargs: dict[str, Any] = field(default_factory=dict)


_CHATML: dict[str, Any] = {"end": "<|im_end|>", "special": ("<|im_start|>", "<|endoftext|>")}
_QWEN3: dict[str, Any] = {**_CHATML, "template": _QWEN3_TURNS + _QWEN3_PROMPT, "thoughts": True}
_OPENS: dict[str, Any] = {"opens": True, "prefix": "\n</think>\n\n"}
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_GEMMA: dict[str, Any] = {
    "end": "<end_of_turn>",
    "eos": "<eos>",
    "bos": "<bos>",
    "special": ("<start_of_turn>", "<pad>"),
    "trims": True,
}
_LLAMA3: dict[str, Any] = {
    "end": "<|eot_id|>",
    "bos": "<|begin_of_text|>",
    "special": ("<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "trims": True,
}
_PHI: dict[str, Any] = {
    "end": "<|end|>",
    "eos": "<|endoftext|>",
    "special": ("<|system|>", "<|user|>", "<|assistant|>"),
}
_SENTENCE: dict[str, Any] = {"bos": "<s>", "end": "</s>", "prefix": " "}

FAMILIES = {
    "smollm2": Family(_chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), **_CHATML),
    "qwen2.5": Family(_chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."), **_CHATML),
    "qwen3": Family(**_QWEN3, prefix=_NO_THOUGHT),
    "qwen3-thinking-on": Family(**_QWEN3, prefix=_NO_THOUGHT, template_kwargs={"enable_thinking": True}),
    "qwen3-thinking-off": Family(**_QWEN3, closes=True, template_kwargs={"enable_thinking": False}),
    "qwen3-thinking-2507": Family(
        **{**_QWEN3, "template": _QWEN3_TURNS + _PROMPT.replace("assistant\n", "assistant\n<think>\n")},
        **_OPENS,
    ),
    "llama3.1": Family(_LLAMA31, **_LLAMA3),
    "gemma2": Family("{{ bos_token }}" + _NO_SYSTEM + _GEMMA_TURNS, **_GEMMA),
    "gemma3": Family("{{ bos_token }}" + _GEMMA_TURNS, **_GEMMA),
    "mistral-v0.1": Family(_MISTRAL_V1, **_SENTENCE),
    "mistral-v0.3": Family(_MISTRAL_V3, **_SENTENCE, special=("[INST]", "[/INST]"), trims=True),
    "phi3": Family(_PHI3, **_PHI),
    "phi4-mini": Family(_PHI4_MINI, **_PHI),
    "deepseek-r1-distill": Family(
        _DEEPSEEK_R1,
        _wide("<|end▁of▁sentence|>"),
        bos=_wide("<|begin▁of▁sentence|>"),
        headers=(_wide("<|User|>"), _wide("<|Assistant|>")),
        thoughts=True,
        **_OPENS,
    ),
    "olmo2": Family(_OLMO2, "<|endoftext|>", bos="<|endoftext|>"),
    "granite3": Family(_GRANITE3, "<|end_of_text|>", special=("<|start_of_role|>", "<|end_of_role|>")),
}


def build(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the special tokens, BOS and chat template of a family."""
    family = FAMILIES[name]
    backend = tiny.build_tokenizer().backend_tokenizer
    special = dict.fromkeys([family.end, *filter(None, (family.eos, family.bos)), *family.special])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    thoughts = ("<think>", "</think>") if family.thoughts else ()
    backend.add_tokens([AddedToken(t, normalized=False) for t in ("\n\n", *family.headers, *thoughts)])
    if family.bos and family.bos != family.end:
        bos = (family.bos, backend.token_to_id(family.bos))
        backend.post_processor = TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos or family.end,
        chat_template=family.template,
        name_or_path=name,
    )


def build_encoder(name: str) -> ChatEncoder:
    """An encoder with the tokenizer and the template arguments of a family."""
    return ChatEncoder(build(name), FAMILIES[name].template_kwargs)
