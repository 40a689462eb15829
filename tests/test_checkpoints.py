"""Locating the weights of a draft, in every kind of folder, and the choice between draft/ and best/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import experiment
from torch import equal

from pard_train.errors import UserError
from pard_train.training.checkpoints import choose_draft, find_checkpoint, resolve_draft
from pard_train.training.trainer import train


@pytest.fixture(scope="module")
def finished_run(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with a checkpoint at the second."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(experiment(base_folder, chats_file, run, max_steps=2, save_steps=2))
    return run


def test_a_checkpoint_of_trainer_holds_the_draft_and_keeps_the_tokenizer_of_the_base(finished_run: Path) -> None:
    checkpoint = find_checkpoint(str(finished_run / "checkpoint-2"))
    assert (checkpoint.step, checkpoint.run, checkpoint.home) == (2, finished_run, str(finished_run / "init"))
    draft = load_file(finished_run / "draft" / "model.safetensors")
    weights = load_file(Path(checkpoint.path) / "model.safetensors")
    assert weights.keys() == draft.keys()
    assert all(equal(weights[name], weight) for name, weight in draft.items())


def test_a_truncated_and_an_incomplete_checkpoint_are_refused(finished_run: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(finished_run, tmp_path / "run") / "checkpoint-2"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        find_checkpoint(str(checkpoint))
    (checkpoint / "files.json").unlink()
    with pytest.raises(UserError, match="checkpoint-2"):
        find_checkpoint(str(checkpoint))


@pytest.mark.parametrize(
    ("best", "last", "chosen"), [(3.2, 3.1, "best"), (3.1, 3.1, "draft"), (3.2, None, "best"), (None, 3.1, "draft")]
)
def test_of_a_run_the_draft_with_the_higher_tau_is_chosen_and_the_reason_named(
    finished_run: Path, tmp_path: Path, best: float | None, last: float | None, chosen: str
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    if best is not None:
        shutil.copytree(run / "draft", run / "best")
        record = {"chosen_by": "mean", "tau": best, "step": 1, "rows": {}}
        (run / "best" / "best.json").write_text(json.dumps(record))
    if last is not None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 2, "eval/tau/mean": last}) + "\n")
    checkpoint = choose_draft(run)
    assert (Path(checkpoint.path), checkpoint.run) == (run / chosen, run)
    assert checkpoint.step == (1 if chosen == "best" else 2)
    assert checkpoint.choice.startswith(str(run / chosen))
    assert find_checkpoint(str(run)) == checkpoint
    assert resolve_draft(str(run)) == checkpoint.path


def test_a_run_without_a_finished_draft_says_what_to_do(finished_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run / "draft")
    with pytest.raises(UserError, match="draft/: finish the run"):
        find_checkpoint(str(run))


def test_a_folder_without_safetensors_names_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin .* convert it to safetensors"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "latest").write_text("global_step1")  # as DeepSpeed writes it beside its shards
    with pytest.raises(UserError, match=r"zero_to_fp32\.py"):
        find_checkpoint(str(tmp_path))
