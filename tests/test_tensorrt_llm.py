"""TensorRT-LLM: the mask token it would use, and the settings on its page, which must be documented ones."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pard_train.config import DraftConfig, ModelConfig
from pard_train.model import inspect_base, write_initial_draft
from pard_train.targets.compatibility import OK, WARNING, Model, check_pair

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "serving" / "tensorrt-llm.md"
# Fields of PARDDecodingConfig in the API reference of TensorRT-LLM 1.4.0rc1 that the page sets.
DOCUMENTED_FIELDS = {"decoding_type", "max_draft_len", "speculative_model", "mask_token_id"}


@pytest.mark.parametrize(
    ("keys", "level"),
    [
        ({"pard_token": 300, "mask_token_id": 300}, OK),
        ({"pard_token": 300}, OK),
        ({"mask_token_id": 300}, OK),
        ({"pard_token": None, "mask_token_id": 300}, WARNING),  # TensorRT-LLM would use null
    ],
    ids=str,
)
def test_a_draft_whose_mask_token_tensorrt_llm_would_miss_is_a_warning(
    keys: dict[str, Any], level: str, base_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "draft"
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 4, folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("pard_token", "mask_token_id"):
        assert config.pop(name) == 300
    (folder / "config.json").write_text(json.dumps(config | keys))
    findings = check_pair(Model.load(str(folder)), Model.load(str(base_folder)), num_tokens=9, dtype="float32")
    (finding,) = [finding for finding in findings if finding.subject == "mask token"]
    assert finding.level == level
    assert ("pard_token=None" in finding.text) == (level == WARNING)


def test_the_page_sets_documented_fields_only_and_its_three_forms_agree() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (text,) = [text for language, text in blocks if language == "yaml"]
    settings = yaml.safe_load(text)["speculative_config"]
    assert set(settings) == DOCUMENTED_FIELDS
    (snippet,) = [text for language, text in blocks if language == "python"]
    (call,) = [
        node
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "PARDDecodingConfig"
    ]
    assert {"decoding_type": "PARD"} | {k.arg: ast.literal_eval(k.value) for k in call.keywords} == settings
    (command,) = [text for language, text in blocks if language == "bash"]
    assert shlex.split(command)[0] == "trtllm-serve"
