"""The page of a training run and the comparison of runs show what metrics.jsonl says, in every folder, anywhere."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import document
from test_bad_steps import Damage
from test_training import InterruptAfter
from test_webpage import CHROMIUM, Outline
from tiny import experiment
from transformers import TrainerCallback

from pard_train.config import Config, LoggerConfig
from pard_train.errors import UserError
from pard_train.reports.comparison import compare
from pard_train.reports.curves import MAX_POINTS, Curves, best_line, read_runs, render_run, write_run_page
from pard_train.training.trainer import train

CASES = ("Qwen2.5-7B/humaneval", "Qwen2.5-7B/gsm8k", "Qwen2.5-1.5B/humaneval")
EVIL = "<script>alert(1)</script> & </style>"


def write_run(folder: Path, *, num_steps: int = 200, gain: float = 1.0, **config: Any) -> list[dict[str, Any]]:
    """A training run's log and run.json, with a measurement every 20 steps whose mean is best before the end."""
    lines: list[dict[str, Any]] = []
    for step in range(num_steps + 1):
        progress = {"progress/supervised_tokens": 1000 * step, "progress/model_flops": 1e12 * step, "epoch": step / 100}
        if step % 20 == 0:
            taus = {case: 1.5 + gain * (1 - (step / num_steps - 0.8) ** 2) + i / 10 for i, case in enumerate(CASES)}
            line = {f"eval/tau/{case}": tau for case, tau in taus.items()}
            for case, tau in taus.items():
                line |= {f"eval/tau_low/{case}": tau - 0.1, f"eval/tau_high/{case}": tau + 0.2}
                line |= {f"eval/tau_by_k/{case}/k_{k}": 1 + (tau - 1) * k / 4 for k in (1, 2, 3, 4)}
                line |= {f"eval/survival/{case}/position_{i}": 0.9**i for i in (1, 2, 3, 4)}
            mean = {"eval/tau/mean": float(np.mean(list(taus.values()))), "eval/tau/worst": min(taus.values())}
            lines.append({"step": step, **line, **mean, **progress})
        if step:
            depths = {f"accuracy/depth_{d}": 0.8 / (d + 1) for d in range(4)} | {
                f"loss/depth_{d}": 1.0 + d for d in range(4)
            }
            rates = {"throughput/supervised_tokens_per_second": 5e4, "throughput/packing_fill": 0.97}
            loss = {"loss": 3 / step, "accepted_length": 2.0, "learning_rate": 3e-5, "grad_norm": 1.0}
            lines.append({"step": step, **loss, **depths, **rates, **progress})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = {"run_id": folder.name, "command": ["train.py", EVIL], "time": "now", "git": {"commit": "0123456789abcdef"}}
    (folder / "run.json").write_text(json.dumps({**run, "config": {"trainer": config, "model": {"path": EVIL}}}))
    return lines


def test_a_curve_has_every_value_or_means_of_equal_groups_and_a_ring_at_the_best(tmp_path: Path) -> None:
    lines = write_run(tmp_path / "run")
    curves = Curves({"": lines})
    (tau,) = curves.chart("tau", "tau", {"humaneval": ("", f"eval/tau/{CASES[0]}")})
    measured = [line for line in lines if "eval/tau/mean" in line]
    points = tau.series["humaneval"]
    assert [p.x for p in points] == [line["progress/supervised_tokens"] / 1e3 for line in measured]
    assert [p.y for p in points] == [line[f"eval/tau/{CASES[0]}"] for line in measured]
    assert [(p.low, p.high) for p in points] == [(pytest.approx(p.y - 0.1), pytest.approx(p.y + 0.2)) for p in points]
    best = max(measured[1:], key=lambda line: line["eval/tau/mean"])
    assert best_line(lines) is best
    assert [p.x for p in points if p.is_marked] == [best["progress/supervised_tokens"] / 1e3]
    assert tau.x_label == "thousand supervised tokens"

    longer = Curves({"": write_run(tmp_path / "longer", num_steps=20 * (MAX_POINTS + 9))})
    (tau,) = longer.chart("tau", "tau", {"humaneval": ("", f"eval/tau/{CASES[0]}")})
    assert len(tau.series["humaneval"]) == MAX_POINTS + 10  # each with its own interval
    assert all(p.low < p.y < p.high for p in tau.series["humaneval"])

    (loss,) = curves.chart("loss", "", {"loss": ("", "loss")})
    points = loss.series["loss"]
    assert len(points) == MAX_POINTS
    groups = np.array_split([3 / step for step in range(1, 201)], MAX_POINTS)
    assert [p.y for p in points] == pytest.approx([group.mean() for group in groups])
    assert (points[0].x, points[-1].x) == (4.0, 200.0)
    assert curves.chart("absent", "", {"absent": ("", "throughput/mfu")}) == []


def test_a_log_of_before_progress_was_logged_is_drawn_over_steps(tmp_path: Path) -> None:
    lines = [{name: v for name, v in line.items() if "progress" not in name} for line in write_run(tmp_path / "run")]
    (loss,) = Curves({"": lines}).chart("loss", "", {"loss": ("", "loss")})
    assert (loss.x_label, loss.series["loss"][-1].x) == ("optimizer steps", 200)


def test_the_page_fetches_nothing_runs_nothing_and_shows_best_settings_and_every_section(tmp_path: Path) -> None:
    lines = write_run(tmp_path / "run", learning_rate=3e-5)
    write_run_page(tmp_path / "run", "finished")
    page = (tmp_path / "run" / "report.html").read_text()
    outline = Outline(page)
    assert outline.open == []
    assert outline.ids() == ["tau", "last", "depth", "loss", "speed", "optimization", "origin", "settings"]
    assert {(a["href"] or "")[1:] for tag, a in outline.tags if tag == "a"} == set(outline.ids())
    assert not re.search(r"<script|<img|<link|url\((?!#)|@import|https?://", page)
    assert "<script>alert(1)</script>" in "".join(outline.texts["pre"])
    best = best_line(lines)
    assert best is not None
    assert f"{best['eval/tau/mean']:.2f}" in outline.texts["b"]
    assert f"mean over targets at step {best['step']}, {lines[0]['eval/tau/mean']:.2f} before training" in page
    assert {"trainer.learning_rate", "3e-05", "model.path", EVIL} <= {*outline.texts["dt"], *outline.texts["dd"]}
    assert outline.texts["td"].count("best") == 1
    assert "This run is finished" in page


def test_a_run_without_measurements_or_log_has_a_page_too(tmp_path: Path) -> None:
    lines = [line for line in write_run(tmp_path / "run") if "loss" in line]
    assert Outline(render_run(lines, {}, "running")).ids() == [
        "depth",
        "loss",
        "speed",
        "optimization",
        "origin",
        "settings",
    ]
    assert Outline(render_run([], {}, "running")).ids() == ["origin", "settings"]


@pytest.fixture
def config(base_folder: Path, chats_file: Path, tmp_path: Path) -> Config:
    """Four steps with a page."""
    plain = experiment(base_folder, chats_file, tmp_path / "run", max_steps=4, save_steps=2, num_train_epochs=4)
    return replace(plain, logger=LoggerConfig(page_minutes=60))


def test_every_run_leaves_a_page_also_one_that_fails(config: Config, tmp_path: Path) -> None:
    page = tmp_path / "run" / "report.html"
    with pytest.raises(UserError):
        train(replace(config, trainer=replace(config.trainer, max_bad_steps=1)), [Damage(3)])
    assert "1 times in a row (trainer.max_bad_steps=1)" in page.read_text()
    train(replace(config, resume=True))
    text = page.read_text()
    assert "This run is finished" in text
    last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"<b>{last['progress/supervised_tokens']:,}</b>" in text
    assert "trainer.max_steps" in text


def test_the_page_is_written_again_while_training_goes_on(config: Config, tmp_path: Path) -> None:
    class Wait(TrainerCallback):
        """Gives the thread time after the first steps."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Until the page is there."""
            deadline = time.monotonic() + 60
            while state.global_step == 3 and not (tmp_path / "run" / "report.html").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        train(replace(config, logger=LoggerConfig(page_minutes=1e-9)), [Wait(), InterruptAfter(3)])
    assert "KeyboardInterrupt" in (tmp_path / "run" / "report.html").read_text()


def test_no_page_is_drawn_where_none_is_wanted(config: Config, tmp_path: Path) -> None:
    train(replace(config, logger=LoggerConfig(page_minutes=0)))
    assert not (tmp_path / "run" / "report.html").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------------------


def test_training_runs_are_laid_over_each_other_with_the_settings_in_which_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path / "a", gain=1.0, learning_rate=1e-5, seed=1)
    write_run(tmp_path / "b", gain=0.5, learning_rate=2e-5, seed=1)
    write_run(tmp_path / "c", gain=1.2, learning_rate=1e-5, seed=1)
    results = {name: str(tmp_path / name) for name in "abc"}
    compared = compare(results, tmp_path / "out", min_ratio=0.95)
    best = {name: best_line(lines) for name, lines in read_runs(results).items()}
    taus = {name: line["eval/tau/mean"] for name, line in best.items() if line}
    ratios = {f"compare/{name}/best_tau": taus[name] / taus["a"] for name in "bc"}
    assert compared.values == pytest.approx(ratios)
    (miss,) = compared.misses
    assert miss.startswith(
        f"b: best tau {taus['b']:.3f} is {taus['b'] / taus['a']:.3f} of {taus['a']:.3f}, below 0.950"
    )
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "trainer.learning_rate" in table
    assert "seed" not in table  # equal in all
    assert [line.split("|")[1].strip() for line in table.splitlines()[-3:]] == ["a", "b", "c"]
    outline = Outline((tmp_path / "out" / "compare.html").read_text())
    assert outline.open == []
    assert outline.ids() == ["runs", "tau", "loss", "depth", "speed", "origin"]
    titles = outline.texts["figcaption"]
    assert titles[:5] == ["mean", "worst", *CASES]
    assert compare(results, tmp_path / "again").misses == []
    log = tmp_path / "b" / "metrics.jsonl"
    log.write_text(log.read_text().replace("eval/tau/", "eval/tau/other-").replace('other-mean"', 'mean"'))
    other = compare({name: str(tmp_path / name) for name in "ab"}, tmp_path / "other", min_ratio=0.1)
    assert (other.values, other.misses) == ({}, ["b: tau is of other targets, prompts, limits or K than a's"])
    run = json.loads((tmp_path / "c" / "run.json").read_text())
    run["config"]["monitor"] = {"max_prompts": 64}
    (tmp_path / "c" / "run.json").write_text(json.dumps(run))
    other = compare({name: str(tmp_path / name) for name in "ac"}, tmp_path / "prompts")
    assert other.values == {}


def test_a_training_run_and_an_evaluation_cannot_be_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "acceptance.json").write_text(json.dumps(document()))
    results = {"run": str(tmp_path / "run"), "measured": str(tmp_path / "evaluation")}
    with pytest.raises(
        UserError, match=r"results\.measured=.* has no metrics\.jsonl: give training runs or evaluations"
    ):
        compare(results, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_lays_the_page_out_within_a_phones_width(tmp_path: Path) -> None:
    write_run(tmp_path / "run", learning_rate=3e-5)
    write_run_page(tmp_path / "run", "finished")
    page, file = (tmp_path / "run" / "report.html").read_text(), tmp_path / "phone.html"
    frame = f'<iframe id="phone" style="width: 360px; border: 0" srcdoc="{escape(page)}"></iframe>'
    measure = "const page = phone.contentDocument.documentElement; document.title = page.scrollWidth - page.clientWidth"
    file.write_text(f"<!doctype html><title></title>{frame}<script>onload = () => {{ {measure} }}</script>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [str(CHROMIUM), *options, "--dump-dom", f"file://{file}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(-?\d+)</title>", result.stdout)
    assert found is not None, result.stderr[-500:]
    assert found.group(1) == "0"
