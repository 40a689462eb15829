"""Tiny models, tokenizer and conversations for tests."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, DataConfig, DraftConfig, LoggerConfig, ModelConfig, TrainerConfig
from pard_train.generation.proposers import Drafter
from pard_train.mask_token import set_draft_keys
from pard_train.model import inspect_base, write_initial_draft

NUM_ROWS = 320  # of the embedding; the tokenizer uses 300, so ids 300..319 are spare
VOCABULARY = 300
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {"gemma3": Gemma3TextConfig, "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
WINDOW = 20  # of the first layer of gemma3: longer than a chain, shorter than a text
LAYERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    }
}
WORDS = "the a blue red small large cat dog sun moon runs sleeps eats sees under over and then why because".split()  # noqa: SIM905


def build_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with VOCABULARY entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unused|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [m["content"] for chat in conversations(100, seed=1) for m in chat]
    bpe.train_from_iterator([*texts, "user assistant system\n"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|unused|>"]})
    return tokenizer


def build_model(
    family: str, *, seed: int, num_rows: int = NUM_ROWS, tied: bool = True, **shape: Any
) -> PreTrainedModel:
    """Two layers of random weights, large enough that its greedy text is not one repeated token."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": num_rows,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = FAMILIES[family](**settings | LAYERS.get(family, {}) | shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, weight in model.named_parameters():
        if (
            ".post_" in name and family == "gemma3"
        ):  # Gemma's: else its layers change little, and it repeats its last token
            weight.data.fill_(20.0)
    return model


def prefer_mask_token(model: PreTrainedModel) -> tuple[PreTrainedModel, int]:
    """A draft model whose mask token is an entry of the tokenizer, and by its logits the most likely token everywhere.

    Returns:
        The model, which is changed in place, and the mask token's id.
    """
    head, mask_token_id = model.get_output_embeddings(), 3  # <|unused|>
    model.lm_head = torch.nn.Linear(head.in_features, head.out_features, bias=True)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
        model.lm_head.bias.zero_()
        model.lm_head.bias[mask_token_id] = 1e4
    set_draft_keys(model.config, mask_token_id, 4)
    return model, mask_token_id


def conversations(number: int, *, seed: int) -> list[list[dict[str, str]]]:
    """Short random conversations of one to three turns."""
    draw = random.Random(seed)

    def sentence() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(2, 12)))

    chats = []
    for _ in range(number):
        turns = draw.randint(1, 3)
        chats.append([{"role": role, "content": sentence()} for _ in range(turns) for role in ("user", "assistant")])
    return chats


def free_port(ports: Iterable[int] = (0,)) -> int:
    """The first of some ports of this machine that nobody listens on; any such port if none are given."""
    for port in ports:
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise OSError("none of the ports is free")


def experiment(base: Path, chats: Path, output_dir: Path, **trainer: Any) -> Config:
    """A training experiment of a few steps in float32; keyword arguments are settings of the trainer."""
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "gradient_accumulation_steps": 1,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 0,
        "dataloader_num_workers": 0,
    }
    return Config(
        model=ModelConfig(path=str(base)),
        draft=DraftConfig(num_draft_tokens=4),
        data=DataConfig(
            source=str(chats), max_length=256, slot_budget=768, cache_dir=str(output_dir.with_name("tokens"))
        ),
        trainer=TrainerConfig(**{**settings, **trainer}),
        logger=LoggerConfig(page_minutes=0),  # drawing takes longer than such a run
        output_dir=str(output_dir),
    )


def write_served_pair(family: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[Path, Path]:
    """Target and untrained draft of shapes that vLLM takes on a CPU (heads of 32), whose spare rows are never said."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.1}
    model = build_model(family, seed=0, **heads)
    rows = model.get_input_embeddings().weight.data
    rows[len(tokenizer) :] = rows[: len(tokenizer)].mean(dim=0)
    model.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    base = inspect_base(ModelConfig(path=str(folder / "target")), DraftConfig())
    write_initial_draft(base, 4, folder / "draft")
    return folder / "target", folder / "draft"


def config_for(program: str, **values: Any) -> Config:
    """Settings of a program; see `with_settings`."""
    return with_settings(Config(), program, **values)


def exporting(checkpoint: str, output_dir: str, **values: Any) -> Config:
    """Settings of an export."""
    return config_for("export", checkpoint=checkpoint, output_dir=output_dir, **values)


def replay(
    drafter: Drafter, prompt: list[int], answer: list[int], max_draft_tokens: int, *, extra_ids: Sequence[int] = ()
) -> np.ndarray:
    """`replay_all` of one answer."""
    return replay_all(drafter, [(prompt, answer)], max_draft_tokens, extra_ids=[extra_ids])[0]


def with_settings(config: Config, program: str, **values: Any) -> Config:
    """Change settings by their names in the program's section, in `inference`, or at the top level."""
    changed = deepcopy(config)
    for name, value in values.items():
        if name == "draft":
            changed.draft.path = str(value)
        elif name == "target":
            changed.targets = [str(value)]
        elif name == "template_kwargs":
            changed.data.template_kwargs = value
        elif name in ("trust_remote_code", "revision"):
            setattr(changed.model, name, value)
        else:
            sections = (getattr(changed, program), changed.inference, changed)
            setattr(next(section for section in sections if hasattr(section, name)), name, value)
    return changed
