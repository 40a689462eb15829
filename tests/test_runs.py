"""An output folder belongs to one run, and a checkpoint counts only if it is whole."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from pard_train.config import Config, DataConfig, ModelConfig, decisive
from pard_train.errors import UserError
from pard_train.runs import (
    SEAL_FILE,
    check_run,
    check_sealed,
    claim_run,
    new_file,
    new_folder,
    newest_checkpoint,
    prune_checkpoints,
    seal_folder,
    unfinished,
    write_json,
)

ROOT = Path(__file__).parents[1]


def open_run(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """What a training run does to its output folder before it starts."""
    check_run(folder, config, resume=resume)
    claim_run(folder, config)


def settings_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """The settings of a run that decide its result; names of changes may be dotted."""
    config = Config(model=ModelConfig(path="base"), data=DataConfig(source="a.jsonl"), output_dir=str(folder))
    for name, value in changes.items():
        *groups, key = name.split(".")
        setattr(reduce(getattr, groups, config), key, value)
    return decisive(config)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def build_checkpoint(folder: Path, step: int, *, is_sealed: bool = True) -> Path:
    """A checkpoint of two files, one of them in a subfolder."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "global_step").mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(bytes(1000))
    (checkpoint / "global_step" / "states.pt").write_bytes(bytes(50))
    if is_sealed:
        seal_folder(checkpoint)
    return checkpoint


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_claimed_with_settings_and_provenance(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    open_run(folder, settings_of(folder), resume=False)
    assert json.loads((folder / "config.json").read_text()) == {"settings_version": 2, **settings_of(folder)}
    record = json.loads((folder / "run.json").read_text())
    assert record["versions"]["torch"]
    assert record["versions"]["pard_train"]
    assert record["command"]
    is_checkout = (Path(__file__).parents[1] / ".git").exists()
    assert (record["git"] is not None) == is_checkout
    assert not is_checkout or (len(record["git"]["commit"]) == 40 and record["git"]["is_dirty"] in (True, False))


def test_resuming_where_nothing_stands_starts_a_run(tmp_path: Path) -> None:
    open_run(tmp_path / "run", settings_of(tmp_path, resume=True), resume=True)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    open_run(tmp_path, settings_of(tmp_path), resume=False)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run .*resume=true, or choose another output_dir"):
        open_run(tmp_path, settings_of(tmp_path), resume=False)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_files_that_are_not_ours_is_refused_and_left_as_it_was(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=f"output_dir={tmp_path} is not empty and holds no run"):
        open_run(tmp_path, settings_of(tmp_path), resume=resume)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_run_that_was_killed_before_its_config_was_named_starts_again(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"config.json.partial-{platform.node()}-{dead.pid}-12345678").write_text('{"settings_ver')
    open_run(tmp_path, settings_of(tmp_path), resume=False)
    assert (tmp_path / "config.json").exists() and not list(tmp_path.glob("*.partial*"))


def test_an_output_folder_that_is_a_file_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    taken = tmp_path / "run"
    taken.write_text("a file")
    with pytest.raises(UserError, match="output_dir"):
        open_run(taken, settings_of(taken), resume=False)
    assert taken.read_text() == "a file"


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("trainer.learning_rate", 1e-4, "trainer.learning_rate: 3e-05 -> 0.0001"),
        ("seed", 1, "seed: 42 -> 1"),
        ("data.source", "b.jsonl", r"data.source: a\.jsonl -> b\.jsonl"),
        ("deepspeed", {"zero_optimization": {"stage": 1}}, "deepspeed.zero_optimization.stage: None -> 1"),
        ("trainer.extra", {"adam_beta2": 0.9}, "trainer.extra.adam_beta2: None -> 0.9"),
        ("draft.mask_token", "x", "draft.mask_token: None -> x"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(tmp_path: Path, name: str, value: Any, shown: str) -> None:
    open_run(tmp_path, settings_of(tmp_path), resume=False)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"holds a run with other settings \({shown}\)"):
        open_run(tmp_path, settings_of(tmp_path, **{name: value}), resume=True)
    assert contents(tmp_path) == before


def test_settings_that_decide_no_result_may_change_and_the_first_ones_stay_on_record(tmp_path: Path) -> None:
    open_run(tmp_path, settings_of(tmp_path), resume=False)
    before = contents(tmp_path)["config.json"]
    free = {"resume": True, "logger.trackers": ["wandb"], "evaluate.max_prompts": 3, "inference.batch_size": 2}
    free |= {"trainer.logging_steps": 1, "trainer.save_steps": 7}
    open_run(tmp_path, settings_of(tmp_path, **free), resume=True)
    assert contents(tmp_path)["config.json"] == before


def test_a_run_of_version_0_1_is_refused_in_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model": {"path": "base"}, "regenerate": {}, "seed": 42})
    with pytest.raises(UserError, match=f"output_dir={tmp_path}.*another version.*choose another output_dir"):
        check_run(tmp_path, settings_of(tmp_path), resume=True)


def test_what_a_killed_process_left_is_in_nobodys_way_not_even_of_one_with_its_id(tmp_path: Path) -> None:
    left = unfinished(tmp_path / "data")
    left.mkdir()
    with new_folder(tmp_path / "data") as partial:
        (partial / "rows").write_text("all")
    assert {path.name for path in tmp_path.iterdir()} == {"data", left.name}
    assert (tmp_path / "data" / "rows").read_text() == "all"


def test_json_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"}


@pytest.mark.parametrize("name", ["model.safetensors", "global_step/states.pt"])
@pytest.mark.parametrize("size", [None, 0, 20])
def test_a_truncated_or_missing_file_of_a_checkpoint_is_named(tmp_path: Path, name: str, size: int | None) -> None:
    build_checkpoint(tmp_path, 10)
    damaged = build_checkpoint(tmp_path, 20)
    whole = (damaged / name).stat().st_size
    (damaged / name).unlink() if size is None else (damaged / name).write_bytes(bytes(size))
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=f"{damaged / name} is truncated: {size or 0} bytes of {whole}; delete {damaged}"
    ):
        newest_checkpoint(tmp_path)
    assert contents(tmp_path) == before


def test_the_newest_whole_checkpoint_is_taken_by_its_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        build_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    check_sealed(tmp_path / "checkpoint-100")


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build_checkpoint(tmp_path, 10)
    unfinished = build_checkpoint(tmp_path, 20, is_sealed=False)
    assert newest_checkpoint(tmp_path) == whole
    assert f"{unfinished} is incomplete" in caplog.text
    assert unfinished.exists()
    (whole / SEAL_FILE).unlink()
    assert newest_checkpoint(tmp_path) is None


def test_sealing_again_covers_what_came_since(tmp_path: Path) -> None:
    checkpoint = build_checkpoint(tmp_path, 10)
    (checkpoint / "late.pt").write_bytes(bytes(7))
    seal_folder(checkpoint)
    check_sealed(checkpoint)
    (checkpoint / "late.pt").write_bytes(bytes(6))
    with pytest.raises(UserError, match=r"late\.pt is truncated: 6 bytes of 7"):
        check_sealed(checkpoint)


@pytest.mark.parametrize("byte", [0, -1])
def test_one_flipped_bit_of_a_checkpoint_is_found(tmp_path: Path, byte: int) -> None:
    checkpoint = build_checkpoint(tmp_path, 10)
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[byte] ^= 1
    (checkpoint / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=f"model.safetensors has changed since it was written: delete {checkpoint}"):
        newest_checkpoint(tmp_path)


def test_pruning_keeps_the_newest_complete_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        build_checkpoint(tmp_path, step)
    build_checkpoint(tmp_path, 40, is_sealed=False)  # a save that was killed
    (build_checkpoint(tmp_path, 5) / "model.safetensors").unlink()  # a delete that was killed
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-30"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-30"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_damaged_json_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged .*: restore it"):
        check_run(tmp_path, {}, resume=True)


def test_what_a_killed_process_left_is_deleted_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "tokens[1]"
    program = "import os, sys; from pathlib import Path; from pard_train.runs import new_file, new_folder\n"
    program += "with new_folder(Path(sys.argv[1])) as a, new_file(Path(sys.argv[1] + '.json')) as b:\n"
    program += "    b.touch(); print('writing', flush=True); input()"
    command = [sys.executable, "-c", program, str(target)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first, second = (subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) for _ in range(2))
    for process in (first, second):
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(list(tmp_path.iterdir())) == 4
    second.kill()
    second.wait()
    with new_folder(target), new_file(tmp_path / "tokens[1].json") as partial:
        partial.touch()
        assert len(list(tmp_path.iterdir())) == 4  # those of the first process, and these
    first.kill()
    first.wait()
    with new_file(tmp_path / "tokens[1].json") as partial:
        partial.touch()
    assert len(list(tmp_path.glob("*.json*"))) == 1
