"""Acceptance inside training: an evaluation's figures, the best draft kept, and a training that is not disturbed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_training import InterruptAfter, log_lines, weights
from tiny import build_model, conversations, experiment, replay
from transformers import PreTrainedTokenizerBase

from pard_train.acceptance.counting import pool, walk
from pard_train.config import Config, MonitorConfig
from pard_train.errors import UserError
from pard_train.evaluation.monitor import AcceptanceMonitor, BestDraft, Measurement, build_monitor, copy_model
from pard_train.generation.proposers import Drafter
from pard_train.training.trainer import train

ROOT = Path(__file__).parents[1]
SPEED = "supervised_slots_per_second"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small benchmarks."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for name, seed in (("easy", 21), ("hard", 22)):
        rows = [{"prompt": chat[0]["content"]} for chat in conversations(5, seed=seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def other_target(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A second target of the family."""
    folder = tmp_path_factory.mktemp("targets") / "other"
    build_model("qwen2", seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(
    base_folder: Path,
    other_target: Path,
    chats_file: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Config:
    """Six steps with a measurement every second one, on two targets and two benchmarks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = experiment(base_folder, chats_file, tmp_path / "run", max_steps=6, learning_rate=3e-3, num_train_epochs=4)
    evaluate = replace(
        plain.evaluate,
        benchmarks=[str(questions / "easy.jsonl"), str(questions / "hard.jsonl")],
    )
    monitor = MonitorConfig(every_steps=2, max_prompts=4, max_new_tokens=20)
    targets = [str(base_folder), str(other_target)]
    return replace(plain, targets=targets, evaluate=evaluate, monitor=monitor)


def measurements(config: Config) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are measurements."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "eval/tau/mean" in row]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what a clock says."""
    clocks = (SPEED, "eval/seconds", "throughput/")
    return [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in rows]


def test_the_figures_are_those_of_an_evaluation_of_the_same_draft(config: Config) -> None:
    (monitor,) = build_monitor(config)
    draft = train(config, [monitor])
    rows = measurements(config)
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for folder, row in ((draft, rows[-1]), (draft.parent / "init", rows[0])):
        drafter = Drafter.load(str(folder), dtype=torch.float32, device=torch.device("cpu"))
        taus = {}
        for number, name in enumerate(monitor.names):
            turns = [turn for case, turn in monitor.turns if case == number]
            matches = [replay(drafter, turn.prompt_ids, turn.answer.ids, 4).tolist() for turn in turns]
            taus[name] = pool([walk(m, 4) for m in matches], 4).tau
        assert {f"eval/tau/{name}": tau for name, tau in taus.items()}.items() <= row.items()
        of_targets = [sum(v for k, v in taus.items() if k.startswith(t)) / 2 for t in ("base/", "other/")]
        assert row["eval/tau/mean"] == pytest.approx(sum(of_targets) / 2)
        assert row["eval/tau/worst"] == pytest.approx(min(of_targets))
    assert set(monitor.names) == {"base/easy", "base/hard", "other/easy", "other/hard"}


def test_training_with_a_monitor_is_training_without_one_bit_for_bit(config: Config, tmp_path: Path) -> None:
    plain = replace(config, monitor=MonitorConfig(), output_dir=str(tmp_path / "plain"))
    assert build_monitor(plain) == []
    for each in (plain, config):
        train(each, build_monitor(each))
    assert without_time(log_lines(plain)) == without_time(log_lines(config))
    assert len(log_lines(plain)) == 6
    expected = weights(tmp_path / "plain" / "draft")
    for name, value in weights(Path(config.output_dir) / "draft").items():
        assert torch.equal(value, expected[name]), name


def test_targets_write_once_for_all_runs(config: Config, tmp_path: Path) -> None:
    build_monitor(config)
    texts = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.jsonl")}
    assert len(texts) == 4
    build_monitor(replace(config, output_dir=str(tmp_path / "second")))
    assert texts == {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.jsonl")}


def test_the_best_draft_is_kept_with_its_figures(config: Config) -> None:
    draft = train(config, build_monitor(config))
    rows = [row for row in measurements(config) if row["step"] > 0]
    best = json.loads((draft.parent / "best" / "best.json").read_text())
    first_best = max(rows, key=lambda row: row["eval/tau/mean"])
    assert (best["step"], best["tau"]) == (first_best["step"], first_best["eval/tau/mean"])
    assert best["rows"] == {
        n.removeprefix("eval/tau/"): first_best[n] for n in first_best if re.match("eval/tau/.*/", n)
    }
    drafter = Drafter.load(str(draft.parent / "best"), dtype=torch.float32, device=torch.device("cpu"))
    (monitor,) = build_monitor(replace(config, resume=True))
    turns = [turn for case, turn in monitor.turns if monitor.names[case] == "other/hard"]
    matches = [replay(drafter, turn.prompt_ids, turn.answer.ids, 4).tolist() for turn in turns]
    assert pool([walk(m, 4) for m in matches], 4).tau == best["rows"]["other/hard"]


class FakeTrainer:
    """What the keeper asks of a trainer: to write the draft, here a file with the step in it."""

    class args:
        should_save = True

    def __init__(self) -> None:
        self.step = 0

    def write_draft(self, folder: Path) -> None:
        """Write."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "draft").write_text(str(self.step))


def best_step(folder: Path, criterion: str) -> int:
    """Which of three measurements is kept: 1 helps one target only, 2 both a little, 3 neither."""
    keeper, trainer = BestDraft(folder, criterion, ["a/x", "b/x"], "texts"), FakeTrainer()
    keeper.open(is_first=True)
    for trainer.step, rows in enumerate(
        [{"a/x": 9.0, "b/x": 1.0}, {"a/x": 3.0, "b/x": 2.0}, {"a/x": 2.0, "b/x": 2.0}], 1
    ):
        keeper.offer(Measurement(trainer.step, rows), trainer)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == ["best"]
    return int((folder / "best" / "draft").read_text())


def test_the_mean_and_the_worst_target_may_choose_different_drafts(tmp_path: Path) -> None:
    for name in ("mean", "worst"):
        (tmp_path / name).mkdir()
    assert best_step(tmp_path / "mean", "mean") == 1
    assert best_step(tmp_path / "worst", "worst") == 2
    none = BestDraft(tmp_path / "none", "none", ["a/x"], "texts")
    assert not none.offer(Measurement(1, {"a/x": 9.0}), FakeTrainer())  # type: ignore[arg-type]
    assert not (tmp_path / "none").exists()


def test_a_target_counts_once_however_many_benchmarks_it_answered() -> None:
    measurement = Measurement(1, {"a/x": 1.0, "a/y": 2.0, "a/z": 3.0, "b/x": 4.0})
    assert (measurement.tau("mean"), measurement.tau("worst")) == (3.0, 2.0)


def test_a_run_that_is_continued_goes_on_with_the_best_it_had(tmp_path: Path) -> None:
    best_step(tmp_path, "mean")
    trainer = FakeTrainer()
    keeper = BestDraft(tmp_path, "mean", ["a/x", "b/x"], "texts")
    (tmp_path / "best").rename(tmp_path / "best.previous")  # killed between two renames
    (tmp_path / "best.new").mkdir()  # and another time while writing
    keeper.open(is_first=True)
    assert not keeper.offer(Measurement(7, {"a/x": 4.0, "b/x": 6.0}), trainer)  # type: ignore[arg-type]
    trainer.step = 8
    assert keeper.offer(Measurement(8, {"a/x": 4.0, "b/x": 6.5}), trainer)  # type: ignore[arg-type]
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 8
    assert (tmp_path / "best" / "draft").read_text() == "8"
    for criterion, names in (("worst", ["a/x", "b/x"]), ("mean", ["a/x"])):
        with pytest.raises(UserError, match=r"keep_best: mean -> worst|measured: "):
            BestDraft(tmp_path, criterion, names, "texts").open(is_first=True)
    with pytest.raises(UserError, match=r"answers: texts -> fewer texts"):
        BestDraft(tmp_path, "mean", ["a/x", "b/x"], "fewer texts").open(is_first=True)


def test_a_resumed_run_measures_and_keeps_what_an_uninterrupted_one_does(config: Config, tmp_path: Path) -> None:
    whole = replace(config, trainer=replace(config.trainer, save_steps=3))
    train(whole, build_monitor(whole))
    cut = replace(whole, output_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, [*build_monitor(cut), InterruptAfter(5)])
    again = replace(cut, resume=True)
    train(again, build_monitor(again))
    assert without_time(measurements(cut)) == without_time(measurements(whole))
    folders = [Path(c.output_dir) / "best" for c in (cut, whole)]
    assert len({(folder / "best.json").read_text() for folder in folders}) == 1
    assert all(torch.equal(value, weights(folders[1])[name]) for name, value in weights(folders[0]).items())


def test_what_cannot_be_measured_is_refused_before_a_target_writes(
    config: Config, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = tmp_path / "stranger"
    build_model("qwen2", seed=1).save_pretrained(other)
    grown = type(tokenizer).from_pretrained(config.model.path)
    grown.add_tokens(["<other>"])
    grown.save_pretrained(other)
    bad = replace(config, targets=[config.targets[0], str(other)])
    with pytest.raises(UserError, match="different tokenizers"):
        build_monitor(bad)
    monitor = replace(config.monitor, max_new_tokens=10_000)
    with pytest.raises(UserError, match=r"positions, but prompt, answer and draft tokens need up to 10,?\d+"):
        build_monitor(replace(config, monitor=monitor))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        build_monitor(config)
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


@pytest.mark.parametrize("tied", [True, False])
def test_a_copy_has_every_weight_and_its_own_attention(family: str, tied: bool) -> None:
    model = build_model(family, seed=3, tied=tied)
    before = torch.get_rng_state()
    copy = copy_model(model.train(), torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not copy.training
    copy.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(copy(ids).logits, model(ids).logits)
        assert copy_model(model, torch.bfloat16, torch.device("cpu"))(ids).logits.dtype == torch.bfloat16


def run_on_two(config: Config, output_dir: Path, deepspeed: str) -> list[dict[str, Any]]:
    """recipes/train.py on two processes; its measurements."""
    settings = [
        f"model.path={config.model.path}",
        f"data.source={config.data.source}",
        f"data.cache_dir={config.data.cache_dir}",
        *("draft.num_draft_tokens=4", "data.max_length=256", "data.slot_budget=768"),
        *("trainer.max_steps=4", "trainer.learning_rate=3e-3", "trainer.bf16=false", "trainer.logging_steps=1"),
        *("trainer.save_steps=0", "trainer.dataloader_num_workers=0", "trainer.num_train_epochs=4"),
        *("monitor.every_steps=2", "monitor.max_prompts=4", "monitor.max_new_tokens=20"),
        f"targets=[{','.join(config.targets)}]",
        f"evaluate.benchmarks=[{','.join(config.evaluate.benchmarks)}]",
        f"deepspeed={deepspeed}",
        f"output_dir={output_dir}",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, "recipes/train.py", *settings],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert "acceptance measured in" in result.stdout
    return measurements(replace(config, output_dir=str(output_dir)))


@pytest.mark.parametrize("deepspeed", ["none", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does(config: Config, tmp_path: Path, deepspeed: str) -> None:
    """At step 0 both have the same weights; later they agree with an evaluation of the draft that they kept."""
    alone = replace(config, trainer=replace(config.trainer, max_steps=1))
    (monitor,) = build_monitor(alone)
    train(alone, [monitor])
    rows = run_on_two(config, tmp_path / "two", deepspeed)
    assert without_time(rows)[0] == {**without_time(measurements(alone))[0], "epoch": rows[0]["epoch"]}
    best = json.loads((tmp_path / "two" / "best" / "best.json").read_text())
    drafter = Drafter.load(str(tmp_path / "two" / "best"), dtype=torch.float32, device=torch.device("cpu"))
    assert isinstance(monitor, AcceptanceMonitor)
    for number, name in enumerate(monitor.names):
        turns = [turn for case, turn in monitor.turns if case == number]
        matches = [replay(drafter, turn.prompt_ids, turn.answer.ids, 4).tolist() for turn in turns]
        assert pool([walk(m, 4) for m in matches], 4).tau == pytest.approx(best["rows"][name])
    assert "lm_head.weight" not in load_file(tmp_path / "two" / "best" / "model.safetensors")


def test_a_draft_with_a_nan_weight_is_not_measured(config: Config, base_folder: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(base_folder, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    config.model.path, config.trainer.max_bad_steps = str(damaged), 4
    with pytest.raises(UserError, match="the draft's logits are NaN"):  # else token 0 everywhere
        train(config, build_monitor(config))
    assert not (Path(config.output_dir) / "best").exists()


def test_the_logged_speed_is_that_of_training_alone(config: Config) -> None:
    config.monitor.every_steps, pause = 6, 3.0  # more than a step takes on a busy machine
    (monitor,) = build_monitor(config)
    right = monitor._replay
    monitor._replay = lambda: (time.sleep(pause), right())[1]
    train(config, [monitor])
    assert all(row["supervised_slots"] / row["supervised_slots_per_second"] < pause for row in log_lines(config))
