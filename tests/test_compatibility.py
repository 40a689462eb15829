"""What must and what should agree between a draft and a target is found before weights are loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import build_model
from transformers import PreTrainedTokenizerBase

from pard_train.config import DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.model import inspect_base, write_initial_draft
from pard_train.targets.compatibility import ERROR, OK, WARNING, Finding, Model, check_pair, require
from pard_train.targets.serving import check_engine, check_environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def draft_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained draft of the base model."""
    folder = tmp_path_factory.mktemp("drafts") / "draft"
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 8, folder)
    return folder


def altered(folder: Path, to: Path, file: str, **changes: Any) -> Path:
    """A copy of a model folder with other values in one of its JSON files."""
    shutil.copytree(folder, to)
    content = json.loads((to / file).read_text()) if (to / file).exists() else {}
    (to / file).write_text(json.dumps(content | changes))
    return to


def find(draft: Path, target: Path, num_tokens: int = 100, dtype: str = "float32") -> dict[str, Finding]:
    """Findings by subject."""
    findings = check_pair(Model.load(str(draft)), Model.load(str(target)), num_tokens=num_tokens, dtype=dtype)
    return {finding.subject: finding for finding in findings}


def test_a_draft_and_its_own_base_agree_in_everything(draft_folder: Path, base_folder: Path) -> None:
    findings = find(draft_folder, base_folder)
    assert {finding.level for finding in findings.values()} == {OK}
    assert len(findings) == 11
    require(list(findings.values()))


def test_a_model_that_is_no_draft_is_an_error(base_folder: Path) -> None:
    findings = find(base_folder, base_folder)
    assert findings["mask token"].level == ERROR
    with pytest.raises(UserError, match=r"mask token: .* is not a parallel draft model"):
        require(list(findings.values()))


def test_vocabularies_of_other_sizes_are_a_warning_that_names_the_export(
    draft_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    build_model("qwen2", seed=1, num_rows=352).save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    finding = find(draft_folder, tmp_path / "larger")["vocabulary rows"]
    assert finding.level == WARNING
    assert "draft 320, target 352" in finding.text
    assert f"targets=[{tmp_path / 'larger'}]" in finding.text


def test_an_end_of_turn_that_the_draft_does_not_know_is_a_warning(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    target = altered(base_folder, tmp_path / "target", "generation_config.json", eos_token_id=[2, 7])
    finding = find(draft_folder, target)["end of turn"]
    assert finding.level == WARNING
    assert "[2, 7]" in finding.text


def test_another_chat_template_is_a_warning(draft_folder: Path, base_folder: Path, tmp_path: Path) -> None:
    target = shutil.copytree(base_folder, tmp_path / "target")
    template = target / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #}")
    assert find(draft_folder, target)["chat template"].level == WARNING


def test_a_text_longer_than_a_models_positions_is_an_error(draft_folder: Path, base_folder: Path) -> None:
    assert find(draft_folder, base_folder, num_tokens=2048)[f"context of {draft_folder}"].level == OK
    finding = find(draft_folder, base_folder, num_tokens=2049)[f"context of {draft_folder}"]
    assert finding.level == ERROR
    assert "2048 positions" in finding.text


def test_texts_longer_than_those_of_training_are_a_warning_with_both_lengths(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    shutil.copytree(draft_folder, trained)
    assert "unknown" in find(trained, base_folder, num_tokens=500)["trained length"].text
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"pard_trained_length": 256}))
    assert find(trained, base_folder, num_tokens=256)["trained length"].level == OK
    finding = find(trained, base_folder, num_tokens=257)["trained length"]
    assert finding.level == WARNING
    assert "up to 256 tokens" in finding.text
    assert "257" in finding.text


def test_another_dtype_than_the_stored_one_is_a_warning_unless_it_is_float32(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    target = altered(base_folder, tmp_path / "target", "config.json", dtype="bfloat16")
    assert find(draft_folder, target)["dtype"].level == OK
    assert find(draft_folder, target, dtype="bfloat16")["dtype"].level == WARNING


def test_a_target_that_can_be_split_further_than_the_draft_is_a_warning(
    draft_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    build_model("qwen2", seed=1, **heads).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    finding = find(draft_folder, tmp_path / "wide")["tensor parallelism"]
    assert finding.level == WARNING
    assert "1, 2, 4 ways" in finding.text
    assert "serve with 4 at most" in finding.text


@pytest.mark.parametrize(
    ("version", "level", "text"),
    [
        ("0.15.2", ERROR, "0.16 or newer"),
        ("0.15rc1", ERROR, "0.16 or newer"),
        ("0.1.dev1+g12ab", WARNING, "does not tell its age"),
        ("0.25.1", WARNING, "without CUDA graphs"),
        ("0.26.0", WARNING, "not tested"),
        ("0.27.1", OK, "0.27.1"),
        ("0.32.0", OK, "0.32.0"),
        ("0.33.0", WARNING, "not tested; 0.27.1 and 0.32.0 are"),
        ("", ERROR, "no vLLM"),
    ],
)
def test_an_engine_too_old_or_absent_is_an_error(version: str, level: str, text: str, tmp_path: Path) -> None:
    python = tmp_path / "python"  # an interpreter in whose environment that version of vLLM is installed
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    finding = check_engine(str(python))
    assert finding.level == level
    assert text in finding.text


def test_a_forced_model_runner_without_parallel_drafting_is_an_error() -> None:
    (finding,) = check_environment({"VLLM_USE_V2_MODEL_RUNNER": "1"})
    assert (finding.level, finding.subject) == (ERROR, "model runner")
    assert [finding.level for finding in check_environment({})] == [OK]


@pytest.mark.slow
def test_the_preflight_prints_all_that_is_known_and_ends_with_status_2_where_it_cannot_work(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.32.0\n")
    python.chmod(0o755)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n')
    command = [sys.executable, "recipes/verify.py", f"draft.path={draft_folder}", f"targets=[{base_folder}]"]
    command += [f"benchmarks=[{prompts}]", "preflight=true", f"output_dir={tmp_path / 'out'}"]

    def preflight(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, **environment}
        return subprocess.run([*command, *more], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)

    fine = preflight(f"engine_python={python}", "num_draft_tokens=4")
    assert fine.returncode == 0, fine.stderr
    subjects = [line.split(":")[0].split(maxsplit=1) for line in fine.stdout.splitlines()]
    assert ["ok", "engine"] in subjects
    assert ["ok", "model runner"] in subjects
    assert ["ok", "vocabulary rows"] in subjects
    assert "2 K = 8 tokens" in fine.stdout
    refused = preflight(f"engine_python={python}", VLLM_USE_V2_MODEL_RUNNER="1")
    assert refused.returncode == 2
    assert "unset it" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_an_interpreter_that_is_not_there_is_an_error() -> None:
    assert check_engine("/nowhere/python").level == ERROR
    assert check_engine(sys.executable).text.endswith("launch/vllm_cpu.sh")  # our own environment has no vLLM
