"""Evaluation and export end to end on tiny models."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import build_model, conversations, experiment
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from pard_train.config import DraftConfig, EvaluateConfig, ExportConfig, GenerateConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.evaluation import evaluate
from pard_train.export import export
from pard_train.model import inspect_base, write_initial_draft
from pard_train.terminal import ChatSession
from pard_train.trainer import train

FIELDS = """draft target benchmark mode num_draft_tokens temperature num_prompts num_steps tau tau_low tau_high survival
histogram"""


@pytest.fixture(scope="module")
def drafts(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained and a trained draft of the base model."""
    run = tmp_path_factory.mktemp("drafts") / "run"
    trained = train(experiment(base_folder, chats_file, run, num_train_epochs=4, learning_rate=3e-3))
    return run / "init", trained


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts, half of them whole conversations that are asked again."""
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    chats = conversations(8, seed=4)
    rows = [{"prompt": chat[0]["content"]} for chat in chats[:4]] + [{"messages": chat} for chat in chats[4:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(drafts: tuple[Path, Path], base: Path, prompts: Path, output_dir: Path) -> EvaluateConfig:
    """An evaluation of both drafts, with live runs."""
    return EvaluateConfig(
        drafts={"before": str(drafts[0]), "after": str(drafts[1])},
        targets=[str(base)],
        benchmarks=[str(prompts)],
        num_draft_tokens=[1, 4],
        max_new_tokens=24,
        live_prompts=8,
        live_num_draft_tokens=4,
        output_dir=str(output_dir),
    )


def test_an_evaluation_writes_records_report_and_picture_and_replay_agrees_with_live(
    drafts: tuple[Path, Path], base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = settings(drafts, base_folder, prompts_file, tmp_path / "evaluation")
    evaluate(config)
    records = json.loads((tmp_path / "evaluation" / "acceptance.json").read_text())
    assert len(records) == 2 * (2 + 1)  # drafts x (two K by replay, one live)
    for record in records:
        assert set(FIELDS.split()) <= record.keys()
        assert record["tau_low"] <= record["tau"] <= record["tau_high"]
        assert sum(record["histogram"]) == record["num_steps"]
        assert record["num_prompts"] == 8
    for name in ("before", "after"):
        mine = {r["mode"]: r for r in records if r["draft"] == name and r["num_draft_tokens"] == 4}
        assert mine["live"]["num_equal_texts"] == 8
        assert mine["live"]["histogram"] == mine["replay"]["histogram"]
    report = (tmp_path / "evaluation" / "report.md").read_text()
    assert "| base | questions | after |" in report
    assert "8 of 8" in report
    assert (tmp_path / "evaluation" / "acceptance.png").read_bytes().startswith(b"\x89PNG")


def test_a_repeated_evaluation_reuses_the_targets_text_and_a_changed_one_is_refused(
    drafts: tuple[Path, Path], base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = replace(settings(drafts, base_folder, prompts_file, tmp_path / "evaluation"), live_prompts=0)
    first = evaluate(config)
    (cache,) = (tmp_path / "evaluation" / "target_text").iterdir()
    whole = cache.read_bytes()
    cache.write_bytes(whole[: whole.rindex(b"{") + 7])  # killed in the middle of the last line
    assert evaluate(config) == first
    assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(UserError, match="holds an evaluation with other settings"):
        evaluate(replace(config, max_new_tokens=12))
    assert cache.read_bytes().count(b"\n") == 8


def test_draft_and_target_with_different_tokenizers_are_refused_before_a_target_writes(
    drafts: tuple[Path, Path], base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    config = replace(settings(drafts, base_folder, prompts_file, tmp_path / "evaluation"), targets=[str(other)])
    with pytest.raises(UserError, match="different tokenizers: 2 entries differ"):
        evaluate(config)
    assert not (tmp_path / "evaluation" / "target_text").exists()


def test_an_export_pads_to_the_target_reloads_and_drafts_the_same(
    drafts: tuple[Path, Path], base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    build_model("qwen2", seed=8, num_rows=352).save_pretrained(target)
    tokenizer.save_pretrained(target)
    folder = tmp_path / "export"
    export(ExportConfig(str(drafts[1]), str(folder), target=str(target), dtype="float32"))
    exported, trained = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, drafts[1]))
    ids = torch.tensor([[5, 9, 250, 300, 300]])
    with torch.no_grad():
        padded, own = exported(ids).logits, trained(ids).logits
    assert padded.shape[-1] == exported.config.vocab_size == 352
    torch.testing.assert_close(padded[..., :320], own, atol=0, rtol=0)
    assert (padded[..., 320:].amax(dim=-1) < own.amax(dim=-1)).all()  # a padded row cannot win
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["pard_token"] == config["mask_token_id"] == 300
    assert config["spd_type"] == "pard"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors", "README.md"):
        assert (folder / name).exists(), name
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(
        (base_folder / "tokenizer.json").read_text()
    )


def test_an_export_refuses_a_taken_folder_and_a_smaller_target(
    drafts: tuple[Path, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="already exists"):
        export(ExportConfig(str(drafts[1]), str(tmp_path / "taken")))
    assert (tmp_path / "taken" / "mine.txt").read_text() == "precious"
    small = tmp_path / "small"
    build_model("qwen2", seed=8, num_rows=304).save_pretrained(small)
    tokenizer.save_pretrained(small)
    with pytest.raises(UserError, match="has 304 vocabulary rows, the draft 320"):
        export(ExportConfig(str(drafts[1]), str(tmp_path / "export"), target=str(small)))
    assert not (tmp_path / "export").exists()


def test_an_untied_head_is_padded_too(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    build_model("llama", seed=1, tied=False).save_pretrained(base)
    build_model("llama", seed=2, num_rows=400).save_pretrained(target)
    for folder in (base, target):
        tokenizer.save_pretrained(folder)
    write_initial_draft(inspect_base(ModelConfig(path=str(base)), DraftConfig()), 8, tmp_path / "init")
    export(ExportConfig(str(tmp_path / "init"), str(tmp_path / "export"), target=str(target), dtype="float32"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert len(model.lm_head.weight) == len(model.model.embed_tokens.weight) == 400
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    hidden = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert int((hidden @ model.lm_head.weight.T).argmax(dim=-1).max()) < 320


def test_the_terminal_chat_says_what_the_target_says_and_shows_tau(
    drafts: tuple[Path, Path], base_folder: Path
) -> None:
    console = Console(record=True, width=200, force_terminal=True, color_system="truecolor", file=io.StringIO())
    session = ChatSession(GenerateConfig(str(drafts[0]), str(base_folder), max_new_tokens=20), console)
    text = session.answer("the red cat")
    shown = console.export_text(styles=True)
    assert "tau " in shown
    assert "same text" in shown
    assert "\x1b[1;32m" in shown  # accepted draft tokens: bold green
    assert session.messages[-1] == {"role": "assistant", "content": text}
