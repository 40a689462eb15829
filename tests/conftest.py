"""Fixtures: tiny models of every supported family, a tiny tokenizer, a tiny corpus. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make small loops ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")  # one process per core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, build_model, build_tokenizer, conversations
from transformers import PreTrainedTokenizerBase

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE with a ChatML template; 300 entries."""
    return build_tokenizer()


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each supported model family in turn."""
    return request.param


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Qwen2-style base model with tied embeddings and spare embedding rows."""
    folder = tmp_path_factory.mktemp("models") / "base"
    build_model("qwen2", seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations(40, seed=0)))
    return path
