"""What TensorRT-LLM is told, held against its documented settings and its documented way to find the mask token."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny import build_model

from pard_train.config import DraftConfig, ModelConfig
from pard_train.engines.tensorrt_llm import (
    llm_snippet,
    mask_token_it_reads,
    required_mask_token,
    serve_command,
    serve_config,
)
from pard_train.errors import UserError
from pard_train.model import inspect_base, write_initial_draft

# Fields of PARDDecodingConfig in the API reference of TensorRT-LLM 1.4.0rc1 that we set.
DOCUMENTED_FIELDS = {"decoding_type", "max_draft_len", "speculative_model", "mask_token_id"}


def write_config(folder: Path, **keys: Any) -> Path:
    """A folder with a config.json of these keys."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"pard_token": 300, "mask_token_id": 300},
        {"pard_token": 300},
        {"mask_token_id": 300},
        {"pard_token": None, "mask_token_id": 300},
        {"pard_token": 1, "mask_token_id": 2},
        {},
    ],
    ids=str,
)
def test_the_mask_token_is_found_as_their_attribute_lookup_finds_it(config: dict[str, Any]) -> None:
    attributes = SimpleNamespace(**config, vocab_size=320)
    theirs = getattr(attributes, "pard_token", getattr(attributes, "mask_token_id", attributes.vocab_size))
    assert mask_token_it_reads({**config, "vocab_size": 320}) == theirs


def test_a_draft_that_we_write_is_read_right(base_folder: Path, tmp_path: Path) -> None:
    base = inspect_base(ModelConfig(path=str(base_folder)), DraftConfig())
    write_initial_draft(base, 4, tmp_path / "draft")
    assert required_mask_token(tmp_path / "draft") == base.mask_token_id


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "would take 320 for the mask token"),
        ({"pard_token": None, "mask_token_id": 300}, "would take null for the mask token"),
        ({"pard_token": -1}, r"would take -1 .* allowed are ids in \[0, 320\)"),
        ({"pard_token": 320}, "would take 320"),
        ({"pard_token": "300"}, 'would take "300"'),
        ({"pard_token": 300, "mask_token_id": 301}, "pard_token=300 and mask_token_id=301 differ"),
    ],
    ids=str,
)
def test_a_folder_that_would_be_misread_is_refused(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "draft", vocab_size=320, **keys)
    for use in (
        lambda: required_mask_token(folder),
        lambda: serve_config(folder, 8),
        lambda: llm_snippet("t", folder, 8),
    ):
        with pytest.raises(UserError, match=message):
            use()


def test_a_model_that_is_no_draft_and_a_folder_that_is_no_model_are_refused(tmp_path: Path) -> None:
    build_model("qwen2", seed=0).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="would take 320 for the mask token"):
        serve_config(tmp_path / "base", 8)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        serve_config(tmp_path / "nothing", 8)


def test_the_configuration_is_yaml_with_documented_fields_only(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "a draft: 'of' \"mine\" #1", vocab_size=320, pard_token=300, mask_token_id=300)
    settings = yaml.safe_load(serve_config(folder, 12))
    assert settings == {
        "speculative_config": {
            "decoding_type": "PARD",
            "max_draft_len": 12,
            "speculative_model": str(folder),
            "mask_token_id": 300,
        },
        "return_perf_metrics": True,
        "enable_iter_perf_stats": True,
    }
    assert set(settings["speculative_config"]) == DOCUMENTED_FIELDS
    with pytest.raises(UserError, match="num_draft_tokens=0: must be at least 1"):
        serve_config(folder, 0)


def test_the_snippet_says_the_same_and_the_command_survives_a_shell(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "it's mine", vocab_size=320, pard_token=300, mask_token_id=300)
    call = next(
        node
        for node in ast.walk(ast.parse(llm_snippet("org/target", folder, 12)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "PARDDecodingConfig"
    )
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    settings = yaml.safe_load(serve_config(folder, 12))["speculative_config"]
    assert {"decoding_type": "PARD", **said} == settings
    command = serve_command("my models/target", tmp_path / "trt llm.yaml")
    assert shlex.split(command) == ["trtllm-serve", "my models/target", "--config", str(tmp_path / "trt llm.yaml")]
