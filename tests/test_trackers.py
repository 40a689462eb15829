"""Trackers show what metrics.jsonl and the results say, keep the identity of a run, and never stop or delay it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import wandb
from test_bad_steps import Damage
from test_training import InterruptAfter, log_lines
from tiny import config_for, conversations, experiment, with_settings
from transformers import TrainerCallback
from wandb_log import Run, offline_runs

from pard_train.config import Config, EvaluateConfig, LoggerConfig, MonitorConfig, check_ranges
from pard_train.errors import UserError
from pard_train.evaluation.evaluate import evaluate
from pard_train.evaluation.monitor import build_monitor
from pard_train.fingerprints import model_fingerprint
from pard_train.publishing.export import export
from pard_train.publishing.verification import verify
from pard_train.training import background
from pard_train.training.background import Background
from pard_train.training.trainer import train
from recipes.compare import run as compare

ROOT = Path(__file__).parents[1]
OFFLINE = LoggerConfig(trackers=["wandb"], wandb_mode="offline", page_minutes=0)
SECRETS = {name: f"{name.lower()}-planted-0123456789abcdef0123456789" for name in ("HF_TOKEN", "OPENAI_API_KEY")}
SECRETS["WANDB_API_KEY"] = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def own_home(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """W&B without the settings, login and caches of this user."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "XDG_CACHE_HOME"):
            patch.setenv(name, str(folder / name.lower()))
        wandb.teardown()
        yield patch
        wandb.teardown()


@pytest.fixture(autouse=True)
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every test has such a home."""
    with own_home(tmp_path_factory.mktemp("home")):
        yield


def run_file(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def metrics(config: Config) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, without the summary at the end."""
    lines = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train_runtime" not in line]


def runs_in(folder: Path) -> list[Run]:
    """Offline runs of a folder by their names, once W&B's service has written their last bytes."""
    wandb.teardown()
    return sorted(offline_runs(folder), key=lambda run: run.opened.display_name)


def experiment_in(folder: Path, base: Path, chats: Path) -> Config:
    """Six steps with a measurement every second one."""
    folder.mkdir(exist_ok=True)
    questions = folder / "easy.jsonl"
    questions.write_text("".join(json.dumps({"prompt": c[0]["content"]}) + "\n" for c in conversations(5, seed=21)))
    return replace(
        experiment(base, chats, folder / "mine", max_steps=6, num_train_epochs=4, save_steps=2),
        targets=[str(base)],
        evaluate=EvaluateConfig(benchmarks=[str(questions)], num_draft_tokens=[1, 4], max_new_tokens=20),
        monitor=MonitorConfig(every_steps=2, max_prompts=0, max_new_tokens=20),
        logger=replace(OFFLINE, tags=["tiny"]),
    )


@pytest.fixture
def config(base_folder: Path, chats_file: Path, tmp_path: Path) -> Config:
    """Six steps without a monitor."""
    return replace(experiment_in(tmp_path, base_folder, chats_file), monitor=MonitorConfig())


@pytest.fixture(scope="module")
def job(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Training with all trackers, evaluation, export, verification and comparison, with keys in the environment."""
    root = tmp_path_factory.mktemp("job")
    with own_home(tmp_path_factory.mktemp("home")) as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        config = experiment_in(root, base_folder, chats_file)
        training = replace(config, logger=replace(config.logger, trackers=["wandb", "tensorboard"], page_minutes=9))
        train(training, build_monitor(training))
        run = root / "mine"
        drafts = {"before": str(run / "init"), "after": str(run / "draft")}
        for _ in range(2):  # the second time continues the runs of the first
            evaluate(with_settings(config, "evaluate", drafts=drafts, output_dir=str(run / "evaluation")))
        (folder,) = export(
            with_settings(config, "export", checkpoint=str(run / "draft"), output_dir=str(run / "export"))
        )
        checking = config_for("verify", engine="transformers", benchmarks=config.evaluate.benchmarks, max_new_tokens=8)
        checking = with_settings(checking, "verify", draft=folder, target=config.targets[0], logger=config.logger)
        verify(replace(checking, output_dir=str(run / "verification")))
        evaluate(with_settings(config, "evaluate", draft=folder, output_dir=str(root / "exported")))
        results = {"exported": str(root / "exported"), "again": str(root / "exported")}
        compare(with_settings(config, "compare", results=results, output_dir=str(run / "comparison")))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_a_training_run_has_its_identity_config_series_summaries_and_artifacts(job: Config) -> None:
    config, folder = job, Path(job.output_dir)
    (run,) = [run for run in runs_in(folder) if run.opened.job_type == "train"]
    stored = run_file(folder)
    opened = run.opened
    assert (opened.run_id, opened.project, opened.job_type) == (stored["run_id"], "pard_train", "train")
    assert (opened.run_group, opened.display_name, list(opened.tags)) == ("mine", "mine", ["tiny"])
    assert run.config["trainer"]["num_train_epochs"] == 4  # not the 1 of Trainer
    assert run.config["targets"] == config.targets
    assert run.config["data_manifest"]["counts"]["documents"] == 40
    assert run.config["device"] == stored["device"]
    for name in ("versions", "git", "machine"):
        assert run.config["provenance"][name] == stored[name]
    assert "learning_rate" not in run.config  # TrainingArguments are not mixed in

    lines = metrics(config)
    *history, _, page = run.history  # the summary of Trainer, and the page
    assert "report/path" in page
    assert len(history) == len(lines) == 6 + 4
    for row, line in zip(history, lines, strict=True):
        own = {re.sub("^train/", "", name): value for name, value in row.items() if not name.startswith("_")}
        assert own.pop("global_step") == line.pop("step")
        assert own == pytest.approx(line)
    best = max(line["eval/tau/mean"] for line in lines if "eval/tau/mean" in line)
    assert run.summary["eval/tau/mean"] == {"max": pytest.approx(best)}
    assert run.summary["eval/tau/base/easy"] == {"max": pytest.approx(best)}

    for artifact, name in zip(run.artifacts, ("draft", "best"), strict=True):
        assert artifact.name == f"draft-{opened.run_id}-{'last' if name == 'draft' else name}"
        assert json.loads(artifact.metadata)["fingerprint"] == model_fingerprint(str(folder / name))
        references = {entry.ref for entry in artifact.manifest.contents} - {""}
        assert references == {path.as_uri() for path in (folder / name).iterdir()}  # not copies


def test_a_resumed_run_continues_its_wandb_run_and_keeps_its_best_tau(config: Config, tmp_path: Path) -> None:
    config.monitor.every_steps, config.trainer.learning_rate = 2, 0.1  # tau is best before training
    config.monitor.max_new_tokens = 20
    with pytest.raises(KeyboardInterrupt):
        train(config, [*build_monitor(config), InterruptAfter(3)])
    config = replace(config, resume=True)
    train(config, build_monitor(config))
    runs = runs_in(tmp_path / "mine")
    assert {run.opened.run_id for run in runs} == {run_file(tmp_path / "mine")["run_id"]}
    assert [run.series("train/global_step") for run in runs] == [[0, 1, 2, 2], [3, 4, 4, 5, 6, 6, 6]]
    first, *_, last = [line["eval/tau/mean"] for line in metrics(config) if "eval/tau/mean" in line]
    assert runs[1].summary["eval/tau/mean"] == {"max": pytest.approx(first)}
    assert first > last


def test_progress_is_the_same_whether_a_run_was_interrupted_or_not(config: Config, tmp_path: Path) -> None:
    plain = replace(config, logger=LoggerConfig(page_minutes=0), output_dir=str(tmp_path / "plain"))
    train(plain)
    lines = log_lines(plain)
    tokens = [line["throughput/supervised_tokens_per_second"] * line["throughput/seconds_per_step"] for line in lines]
    flops = [line["throughput/model_flops_per_second"] * line["throughput/seconds_per_step"] for line in lines]
    for number, line in enumerate(lines, start=1):
        assert line["progress/supervised_tokens"] == pytest.approx(sum(tokens[:number]))
        assert line["progress/model_flops"] == pytest.approx(sum(flops[:number]))
        assert 0.5 < line["throughput/packing_fill"] <= 1
    cut = replace(plain, output_dir=str(tmp_path / "cut"), trainer=replace(plain.trainer, logging_steps=3))
    with pytest.raises(KeyboardInterrupt):  # the checkpoint of step 2 is between two lines of the log
        train(cut, callbacks=[InterruptAfter(3)])
    train(replace(cut, resume=True))
    last = log_lines(cut)[-1]
    assert last["progress/supervised_tokens"] == lines[-1]["progress/supervised_tokens"]
    assert last["progress/model_flops"] == lines[-1]["progress/model_flops"]


def test_wandb_variables_of_the_user_win(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"PROJECT": "ours", "ENTITY": "team", "NAME": "my name", "RUN_GROUP": "my group", "NOTES": "why"}
    for name, value in chosen.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen1")
    train(config)
    (run,) = runs_in(tmp_path / "mine")
    opened = run.opened
    assert (opened.project, opened.entity, opened.display_name) == ("ours", "team", "my name")
    assert (opened.run_group, opened.notes, list(opened.tags)) == ("my group", "why", ["a", "b"])
    assert opened.run_id == run_file(tmp_path / "mine")["run_id"] == "chosen1"


def test_a_run_says_to_wandb_that_steps_were_bad_and_that_it_failed(config: Config, tmp_path: Path) -> None:
    config = replace(config, trainer=replace(config.trainer, max_bad_steps=2))
    with pytest.raises(UserError):
        train(config, [Damage(2, 4, 5)])
    (run,) = runs_in(tmp_path / "mine")
    expected = [("Bad steps", "WARN"), ("Bad steps", "WARN"), ("Run failed", "ERROR")]
    assert [(alert.title, alert.level) for alert in run.alerts] == expected
    assert run.alerts[0].text == "1 steps before step 2 had a NaN or infinite loss or gradient"
    assert "2 times in a row" in run.alerts[2].text


def test_tensorboard_shows_depths_in_one_chart_and_tau_with_its_interval(job: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = EventAccumulator(str(Path(job.output_dir) / "tensorboard")).Reload()
    last = [line for line in metrics(job) if "eval/tau/mean" in line][-1]
    assert events.Scalars("eval/tau/mean")[-1].value == pytest.approx(last["eval/tau/mean"])
    (layout,) = events.Tensors("custom_scalars__config__")
    shown = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: chart for category in shown.category for chart in category.chart}
    tags = events.Tags()["scalars"]
    for title, number in (("accuracy", 4), ("loss", 4), ("all", 3)):
        (pattern,) = charts[title].multiline.tag
        assert len([tag for tag in tags if re.fullmatch(pattern, tag)]) == number
    (series,) = charts["base/easy"].margin.series
    assert [series.value, series.lower, series.upper] == [
        f"eval/{name}/base/easy" for name in ("tau", "tau_low", "tau_high")
    ]
    assert {series.value, series.lower, series.upper} <= set(tags)


def test_mlflow_keeps_a_run_in_the_output_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    train(replace(config, logger=LoggerConfig(trackers=["mlflow"], page_minutes=0)))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mine' / 'mlflow.db'}")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.run_name == "mine"
    losses = [entry.value for entry in client.get_metric_history(run.info.run_id, "loss")]
    assert losses == pytest.approx([line["loss"] for line in metrics(config)])


def test_trackio_keeps_a_run_on_this_machine(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"  # which trackio reads when it is imported
    command = [
        sys.executable,
        "recipes/train.py",
        f"model.path={config.model.path}",
        f"data.source={config.data.source}",
    ]
    command += ["draft.num_draft_tokens=4", "data.slot_budget=2048", "trainer.max_steps=2", "trainer.logging_steps=1"]
    command += ["logger.trackers=[trackio]", f"output_dir={config.output_dir}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "TRACKIO_DIR": str(folder)}, check=True, timeout=120)
    with sqlite3.connect(folder / "pard_train.db") as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _ in rows} == {"mine"}
    losses = [row["train/loss"] for row in (json.loads(text) for _, text in rows) if "train/loss" in row]
    assert losses == pytest.approx([line["loss"] for line in metrics(config)])


@pytest.mark.skipif(importlib.util.find_spec("trackio") is not None, reason="trackio is installed")
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger\.trackers=\[trackio\]: trackio is not installed: pip install trackio"):
        train(replace(config, logger=LoggerConfig(trackers=["trackio"])))
    assert not (tmp_path / "mine").exists()


def test_wandb_is_not_imported_unless_it_is_chosen(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails from here on
    config = replace(config, logger=LoggerConfig(page_minutes=0))
    draft = train(config)
    evaluate(with_settings(config, "evaluate", draft=draft, output_dir=str(tmp_path / "evaluation")))
    assert not list(tmp_path.rglob("wandb"))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input and bad networks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_login_is_found_before_anything_is_loaded_or_written(config: Config, tmp_path: Path) -> None:
    online, draft = LoggerConfig(trackers=["wandb"]), str(tmp_path / "no-such-draft")
    before = sorted(tmp_path.iterdir())
    training = replace(config, logger=online, targets=["no/such-target"], monitor=MonitorConfig(every_steps=2))
    others = with_settings(replace(training, output_dir=str(tmp_path / "other")), "evaluate", draft=draft)
    starts: list[Any] = [lambda: build_monitor(training), lambda: train(training)]
    starts += [lambda: evaluate(others), lambda: export(others), lambda: verify(others)]
    for start in starts:
        with pytest.raises(UserError, match=r"not logged in: run `wandb login`, set WANDB_API_KEY, or .*offline"):
            start()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_an_unreachable_server_costs_the_online_view_and_nothing_else(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: connections are refused
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    monkeypatch.setattr("pard_train.training.trackers.INIT_SECONDS", 2.0)
    wandb.teardown()
    config = replace(config, logger=LoggerConfig(trackers=["wandb"], page_minutes=0))
    draft = train(config)
    assert draft.is_dir()
    assert "kept offline" in caplog.text
    (run,) = runs_in(tmp_path / "mine")  # `wandb sync` finds it
    assert run.series("train/loss") == pytest.approx([line["loss"] for line in metrics(config)])


class Recorder(TrainerCallback):
    """A tracker that takes its time, or fails."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None):
        self.seconds, self.error = seconds, error
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.stalls: list[float] = []
        self.outcome: dict[str, Any] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the line."""
        time.sleep(self.seconds)
        self.lines.append((state.global_step, logs))
        if self.error is not None:
            raise self.error

    def stalled(self, seconds: float) -> None:
        """Note it."""
        self.stalls.append(seconds)

    def end(self, **outcome: Any) -> None:
        """Note it."""
        self.outcome = outcome


def test_a_hanging_tracker_delays_no_step_and_receives_every_line_later(config: Config) -> None:
    is_over = Event()

    class Hanging(Recorder):
        def on_log(self, *args: Any, **kwargs: Any) -> None:
            is_over.wait(60)
            super().on_log(*args, **kwargs)

    slow = Hanging()
    tracker = Background("slow", slow)
    train(replace(config, logger=LoggerConfig(page_minutes=0)), [tracker])
    assert slow.lines == []  # training is over, and it still hangs at the first line
    is_over.set()
    tracker.end(error=None)
    assert [step for step, logs in slow.lines if "loss" in logs] == [1, 2, 3, 4, 5, 6]
    assert slow.outcome == {"error": None}


def test_a_tracker_that_fails_in_the_middle_stops_nothing(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Recorder(error=ConnectionError("gone"))
    tracker = Background("failing", failing)
    monkeypatch.setattr(background, "MAX_FAILURES", 3)
    assert train(replace(config, logger=LoggerConfig(page_minutes=0)), [tracker]).is_dir()
    tracker.end()
    assert len(failing.lines) == 3
    messages = [record.message for record in caplog.records if record.name == background.logger.name]
    first, last = "training continues", "it receives nothing more"
    assert messages == [f"failing failed: ConnectionError: gone; {what}" for what in (first, last)]

    hanging = Background("hanging", Recorder(seconds=3))
    hanging.on_log(None, None, None, logs={})  # type: ignore[arg-type]
    monkeypatch.setattr(background, "END_SECONDS", 0.1)
    hanging.end()
    assert "hanging has not received everything after 0 s" in caplog.text


def test_a_stall_is_reported_once_until_training_goes_on() -> None:
    watcher, nothing = Recorder(), (None, None, None)
    tracker: Any = Background("watcher", watcher, stall_seconds=0.4)
    time.sleep(1.0)  # before training
    assert watcher.stalls == []
    tracker.on_train_begin(*nothing)
    time.sleep(1.0)
    assert len(watcher.stalls) == 1
    tracker.on_step_end()
    time.sleep(1.0)
    assert len(watcher.stalls) == 2
    tracker.on_step_end()
    tracker.on_train_end(*nothing)
    time.sleep(1.0)
    tracker.end()
    assert len(watcher.stalls) == 2
    assert all(0.4 < seconds < 1.0 for seconds in watcher.stalls)


@pytest.mark.parametrize(
    "change",
    [
        {"trainer.extra": {"hub_token": "hf_abcdefgh"}},
        {"data.template_kwargs": {"api_key": "sk-abcdefgh"}},
        {"inference.servers": ["http://me:abcdefgh@host:8000/v1"]},
        {"data.source": "https://me:abcdefgh@host/chats.jsonl"},
        {"verify.engine_arguments": {"hf_token": "hf_abcdefgh"}},
        {"verify.engine_arguments": {"hf_overrides": {"api_key": "abcdefgh"}}},
        {"load.server_arguments": ["--api-key=abcdefgh"]},
        {"load.server_arguments": ["--api-key", "abcdefgh"]},
    ],
)
def test_a_secret_among_the_settings_is_refused_without_repeating_it(config: Config, change: dict[str, Any]) -> None:
    ((name, value),) = change.items()
    section, field = name.split(".")
    setattr(getattr(config, section), field, value)
    with pytest.raises(UserError, match=f"{name}.* holds a secret") as refused:
        check_ranges(config)
    assert "abcdefgh" not in str(refused.value)


def test_no_file_holds_a_key_of_the_environment(job: Config) -> None:
    files = [path for path in Path(job.output_dir).parent.rglob("*") if path.is_file()]
    assert {"run.json", "metrics.jsonl", "report.html", "README.md"} <= {path.name for path in files}
    assert len([path for path in files if path.suffix == ".wandb"]) == 9
    for path in files:
        content = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in content], path


# ---------------------------------------------------------------------------------------------------------------------
# The other programs
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluations_of_drafts_have_equal_columns_and_name_their_training_run(job: Config) -> None:
    run = Path(job.output_dir)
    records = json.loads((run / "evaluation" / "acceptance.json").read_text())["records"]
    after, same_after, before, same_before = runs_in(run / "evaluation")  # evaluated twice
    assert (after.opened.run_id, before.opened.run_id) == (same_after.opened.run_id, same_before.opened.run_id)
    for name, drafted, shown in (("before", "init", before), ("after", "draft", after)):
        opened = shown.opened
        assert (opened.job_type, opened.run_group) == ("evaluate", "mine")
        assert opened.display_name == f"mine/evaluation/{name}"
        assert shown.config["training_run"] == run_file(run)["run_id"]
        assert shown.config["fingerprints"]["draft"] == {name: model_fingerprint(str(run / drafted))}
        assert shown.config["fingerprints"]["target"] == {"base": model_fingerprint(job.targets[0])}
        assert shown.config["evaluate"]["num_draft_tokens"] == [1, 4]
        assert shown.config["dtypes"] == ["float32"]
        assert shown.config["provenance"]["git"] == run_file(run)["git"]
        own = [record for record in records if record["draft"] == name]
        (row,) = shown.history
        for record in own:
            k = record["num_draft_tokens"]
            assert row[f"eval/tau_by_k/base/easy/k_{k}"] == row[f"eval/tau_by_k/base/all/k_{k}"]
            assert row[f"eval/tau_by_k/base/easy/k_{k}"] == pytest.approx(record["tau"])
        assert [row[f"eval/survival/base/easy/position_{i}"] for i in (1, 2, 3, 4)] == pytest.approx(
            own[-1]["survival"]
        )
        tables = sorted((run / "evaluation").glob(f"wandb/*{opened.run_id}/files/{row['eval/records/path']}"))
        saved = json.loads(tables[0].read_text())
        taus = [line[saved["columns"].index("tau")] for line in saved["data"]]
        assert taus == [record["tau"] for record in own]
        page, _ = (run / "evaluation").glob(f"wandb/*{opened.run_id}/files/{row['eval/samples/path']}")
        assert page.read_text() == (run / "evaluation" / "samples.html").read_text()
        assert "<mark>" in page.read_text()
    assert set(before.history[0]) == set(after.history[0])


def test_names_and_figures_of_an_evaluation_are_those_of_the_monitor(job: Config) -> None:
    run = Path(job.output_dir)
    (trained,) = [run for run in runs_in(run) if run.opened.job_type == "train"]
    last = [row for row in trained.history if "eval/tau/mean" in row][-1]
    row = runs_in(run / "evaluation")[0].history[0]
    shared = {name for name in row if name.startswith("eval/") and name in last}
    by_position = {f"eval/survival/base/easy/position_{i}" for i in (1, 2, 3, 4)}
    assert shared == {"eval/tau_by_k/base/easy/k_1", "eval/tau_by_k/base/easy/k_4", *by_position}
    assert {name: row[name] for name in shared} == pytest.approx({name: last[name] for name in shared})
    record = json.loads((run / "evaluation" / "acceptance.json").read_text())["records"][-1]
    interval = [last["eval/tau_low/base/easy"], last["eval/tau_high/base/easy"]]
    assert interval == pytest.approx([record["tau_low"], record["tau_high"]])


def test_export_verification_and_comparison_are_runs_of_the_same_group(job: Config) -> None:
    run = Path(job.output_dir)
    training = run_file(run)["run_id"]
    (exported,) = [each for each in runs_in(run) if each.opened.job_type == "export"]
    (verified,), (compared,) = runs_in(run / "verification"), runs_in(run / "comparison")
    assert [each.opened.job_type for each in (verified, compared)] == ["verify", "compare"]
    assert {each.opened.run_group for each in (exported, verified, compared)} == {"mine"}
    assert exported.config["training_run"] == verified.config["training_run"] == training
    (artifact,) = exported.artifacts
    assert artifact.name == f"export-{training}-320"
    files = [path for path in (run / "export").rglob("*") if path.is_file()]
    assert {entry.ref for entry in artifact.manifest.contents} == {"", *(path.as_uri() for path in files)}
    assert not {"wandb", "facts.json"} & {path.name for path in (run / "export").iterdir()}
    report = json.loads((run / "verification" / "verification.json").read_text())
    assert verified.history[0]["verify/agrees"] == 1
    for who in ("expected", "observed"):
        number = verified.history[0][f"verify/{who}/num_accepted_tokens"]
        assert number == report[who]["num_accepted_tokens"]
    ratios = {name: value for name, value in compared.history[0].items() if name.startswith("compare/again/")}
    assert list(ratios.values()) == [1, 1]


def test_drafts_are_uploaded_on_request(config: Config, tmp_path: Path) -> None:
    train(replace(config, logger=replace(config.logger, upload=True)))
    (run,) = runs_in(tmp_path / "mine")
    (artifact,) = run.artifacts
    contents = {entry.path: entry for entry in artifact.manifest.contents}
    assert contents["model.safetensors"].size == (tmp_path / "mine" / "draft" / "model.safetensors").stat().st_size
    assert not [entry for entry in contents.values() if entry.ref]


# ---------------------------------------------------------------------------------------------------------------------
# The saved dashboard
# ---------------------------------------------------------------------------------------------------------------------


def flat_names(values: Mapping[str, Any], prefix: str = "") -> set[str]:
    """Names of all leaves, parts separated by dots."""
    nested = [flat_names(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}"} for k, v in values.items()]
    return set().union(*nested)


def test_no_panel_of_the_dashboard_is_empty(job: Config) -> None:
    pytest.importorskip("wandb_workspaces")
    from pard_train.reports.dashboard import build_workspace, spec_of

    folder = Path(job.output_dir)
    (trained,) = [run for run in runs_in(folder) if run.opened.job_type == "train"]
    evaluated = runs_in(folder / "evaluation")[0]
    known = {kind: flat_names(getattr(trained, kind)) for kind in ("summary", "config")}
    settings = config_for("dashboard", num_draft_tokens=[1, 4], trained_with=4).dashboard
    section = spec_of(build_workspace(settings, "pard_train"))["spec"]["section"]

    def check_accessor(accessor: str) -> None:
        kind, _, name = accessor.partition(":")
        if kind == "config":  # W&B keeps every top-level entry in a `value`
            name, found = re.subn(r"^(\w+)\.value\b", r"\1", name)
            assert found, accessor
        assert name in known[kind], accessor

    kinds = []
    for panel in (p for s in section["panelBankConfig"]["sections"] for p in s["panels"]):
        shown = panel["config"]
        kinds.append(panel["viewType"])
        if kinds[-1] == "Run History Line Plot":
            pattern = shown.get("metricRegex") or "|".join(f"^{re.escape(name)}$" for name in shown["metrics"])
            drawn = [row for row in trained.history if any(re.search(pattern, name) for name in row)]
            assert any(shown["xAxis"] in row for row in drawn), shown  # a point needs both in one row
        elif kinds[-1] == "Bar Chart":
            assert set(shown["metrics"]) <= set(evaluated.summary)
        elif kinds[-1] == "Scatter Plot":
            check_accessor(shown["xAxis"])
            check_accessor(shown["yAxis"])
        elif kinds[-1] == "Parallel Coordinates Plot":
            for column in shown["columns"]:
                check_accessor(column["accessor"])
        elif kinds[-1] == "Media Browser":
            assert {f"{name}/_type" for name in shown["mediaKeys"]} <= set(evaluated.history[0])
    assert set(kinds) == {
        *("Run History Line Plot", "Bar Chart", "Scatter Plot", "Parallel Coordinates Plot"),
        *("Run Comparer", "Media Browser"),
    }
    (runset,) = section["runSets"]
    for column in set(runset["runFeed"]["columnPinned"]) - {"run:displayName"}:
        check_accessor(column)
    assert (
        trained.config["trained_with"] == evaluated.config["trained_with"] == runset["filters"]["filters"][0]["value"]
    )
    assert runset["filters"]["filters"][0]["key"]["name"] == "trained_with"
    assert runset["grouping"][0]["name"].removesuffix(".value") == "objective_name"
    assert trained.config["objective_name"] == evaluated.config["objective_name"] == "1 ce"
    assert runset["sort"]["keys"][0]["key"]["name"] in known["summary"]


def test_the_program_prints_the_dashboard_without_a_network_and_needs_a_login_to_save_it() -> None:
    pytest.importorskip("wandb_workspaces")
    command = [sys.executable, "recipes/dashboard.py", "logger.wandb_project=mine"]
    printed = subprocess.run([*command, "print=true"], capture_output=True, text=True, check=True)
    assert json.loads(printed.stdout)["project"] == "mine"
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("dashboard.py: error: logger.trackers=[wandb]: not logged in")
