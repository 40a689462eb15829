"""Studies: planned command lines, resumption, and tables against sums over the records."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import initialize_config_dir
from records import document

from pard_train.bootstrap import ratio_interval
from pard_train.config import StudyConfig, decisive
from pard_train.errors import RESUMABLE, Interrupted, UserError
from pard_train.evaluation.study import Run, check_finished, compared, drafts_of, plan_runs, train_run, write_study
from pard_train.program import compose_config, register_schema
from pard_train.runs import SETTINGS_VERSION
from pard_train.validation import validate_train

ROOT = Path(__file__).parents[1]


def test_every_run_has_the_studys_settings_then_its_own_and_a_folder_and_seed(tmp_path: Path) -> None:
    study = StudyConfig(runs={"slow": ["trainer.learning_rate=1e-5"], "fast": []}, seeds=[1, 2])
    given = [
        "experiment=quickstart",
        "study=rates",
        "study.seeds=[1,2]",
        "seed=5",
        "+trainer.extra.a=1",
        "output_dir=o",
    ]
    runs = plan_runs(study, given, tmp_path)
    assert [run.draft for run in runs] == ["slow-1", "fast-1", "slow-2", "fast-2"]
    own = [f"output_dir={tmp_path}/runs/slow-1", "seed=1", "resume=false"]
    shared = (f"logger.group={tmp_path.name}", "experiment=quickstart", "+trainer.extra.a=1")
    assert runs[0].overrides == (*shared, "trainer.learning_rate=1e-5", *own)
    (tmp_path / "runs" / "slow-1").mkdir(parents=True)
    (tmp_path / "runs" / "slow-1" / "config.json").touch()
    assert plan_runs(study, given, tmp_path)[0].overrides[-1] == "resume=true"


def test_the_untrained_draft_of_a_begun_evaluation_stays_when_another_run_is_first(tmp_path: Path) -> None:
    failed, trained = (Run(name, 1, tmp_path / "runs" / name, (), ()) for name in ("failed", "trained"))
    place = tmp_path / "evaluation"
    begun = drafts_of([trained], place)
    assert begun == {"before": f"{trained.folder}/init", "trained-1": f"{trained.folder}/draft"}
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"drafts": begun}))
    assert drafts_of([failed, trained], place) == {**begun, "failed-1": f"{failed.folder}/draft"}


def test_a_finished_run_of_other_settings_is_named_and_so_is_a_run_called_before(tmp_path: Path) -> None:
    register_schema()
    (run,) = plan_runs(StudyConfig(runs={"slow": []}, seeds=[1]), ["experiment=quickstart"], tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        training, other = (compose_config([*run.overrides, f"trainer.learning_rate={rate}"]) for rate in (1e-4, 1e-2))
    (run.folder / "draft").mkdir(parents=True)
    settings = {"settings_version": SETTINGS_VERSION, **decisive(training), "world_size": 8}
    (run.folder / "config.json").write_text(json.dumps(settings))
    check_finished([run], [training])
    with pytest.raises(
        UserError, match=r"slow-1 holds a run with other settings \(trainer.learning_rate: 0.0001 -> 0.01"
    ):
        check_finished([run], [other])
    with pytest.raises(UserError, match=r"study.runs.before is the name of the untrained draft"):
        plan_runs(StudyConfig(runs={"before": []}, seeds=[1]), [], tmp_path)


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")])
def test_every_run_of_a_study_that_we_ship_fits_the_quickstart(name: str, tmp_path: Path) -> None:
    register_schema()
    given = ["experiment=quickstart", f"study={name}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        runs = plan_runs(compose_config(given).study, given[:1], tmp_path)
        for run in runs:
            validate_train(compose_config(run.overrides))
    assert len(runs) > 1


def test_runs_of_a_study_with_a_launcher_may_use_deepspeed() -> None:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose_config(["experiment=quickstart", "deepspeed=zero1"])
    with pytest.raises(UserError, match="needs a launcher"):
        validate_train(config)
    validate_train(replace(config, study=StudyConfig(launcher=["torchrun", "--nproc_per_node", "8"])))


@pytest.mark.parametrize(
    ("status", "reason"), [(RESUMABLE, "slow-1 stopped with a checkpoint"), (0, "stopped after slow-1")]
)
def test_a_termination_reaches_the_run_and_ends_the_study(tmp_path: Path, status: int, reason: str) -> None:
    stand_in = [
        "bash",
        "-c",
        f"trap 'exit {status}' TERM; sleep 1; kill -TERM $PPID; for i in {{1..300}}; do sleep 0.1; done",
    ]
    with pytest.raises(Interrupted, match=reason):
        train_run(Run("slow", 1, tmp_path, (), ()), stand_in)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_interval_of_a_ratio_is_paired_by_prompt() -> None:
    draw = np.random.default_rng(0)
    first = np.stack([draw.integers(20, 90, 50), draw.integers(5, 40, 50)], axis=1)  # prompts differ much
    later = first.copy()
    later[:, 1] *= 2  # and the later draft needs twice the steps on each
    assert compared(first, later) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_interval(first, first) == (1.0, 1.0)
    low, high = ratio_interval(first, later[::-1])
    assert high - low > 0.05  # without pairs nothing cancels


def test_the_table_pools_prompts_and_seeds_and_compares_with_the_first_run(tmp_path: Path) -> None:
    result = document(targets=["Qwen2.5-7B-Instruct"])
    names = {"untrained": "before", "pard-0.5b": "plain-1", "pard-0.5b-dpace": "dpace-1"}
    records = [{**r, "draft": names[r["draft"]]} for r in result["records"] if r["mode"] == "replay"]
    runs = [Run(name, 1, tmp_path / name, settings, ()) for name, settings in (("plain", ()), ("dpace", ("a=1",)))]
    text = write_study({**result, "records": records}, runs, tmp_path)

    def tau(draft: str, k: int) -> float:
        mine = [r for r in records if r["draft"] == draft and r["num_draft_tokens"] == k]
        return sum(r["num_tokens"] for r in mine) / sum(r["num_steps"] for r in mine)

    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {line[0]: line for line in lines}
    assert rows["plain"][-2] == "-" and rows["plain"][-1] == f"{tau('plain-1', 1):.3f}"
    assert rows["dpace"][1:2] + rows["dpace"][5:6] == ["a=1", f"{tau('dpace-1', 16):.2f}"]
    assert rows["dpace"][-2].startswith(f"{tau('dpace-1', 16) / tau('plain-1', 16):.3f} [")
    assert (tmp_path / "study.png").stat().st_size > 0
    assert text in (tmp_path / "study.md").read_text()


def test_the_table_leaves_out_samples_and_benchmarks_that_a_draft_was_not_measured_on(tmp_path: Path) -> None:
    names = {"untrained": "before", "pard-0.5b": "plain-1", "pard-0.5b-dpace": "dpace-1"}
    result = document(targets=["Qwen2.5-7B-Instruct"])
    records = [{**r, "draft": names[r["draft"]]} for r in result["records"] if r["mode"] == "replay"]
    runs = [Run(name, 1, tmp_path / name, (), ()) for name in ("plain", "dpace")]
    first = records[0]["benchmark"]
    here = [r for r in records if r["benchmark"] == first]
    expected = write_study({**result, "records": here}, runs, tmp_path)
    sampled = [{**r, "mode": "estimate", "temperature": 0.7, "prompt_counts": [[9, 9]]} for r in here]
    failed = [r for r in records if r["benchmark"] != first and r["draft"] != "dpace-1"]
    assert write_study({**result, "records": [*here, *sampled, *failed]}, runs, tmp_path) == expected
    with pytest.raises(UserError, match="no benchmark was measured with every draft"):
        write_study({**result, "records": failed}, runs, tmp_path)


@pytest.mark.slow
def test_a_study_trains_compares_and_skips_what_is_finished(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"why the {word}?"}) + "\n" for word in ("cat", "dog", "sun")))
    settings = [
        *(
            f"model.path={base_folder}",
            f"data.source={chats_file}",
            f"targets=[{base_folder}]",
            f"output_dir={tmp_path}/s",
        ),
        *(
            "draft.num_draft_tokens=4",
            "data.slot_budget=768",
            "data.max_length=256",
            f"data.cache_dir={tmp_path}/tokens",
        ),
        *("trainer.max_steps=2", "trainer.bf16=false", "trainer.save_steps=0", "trainer.dataloader_num_workers=0"),
        *(f"evaluate.benchmarks=[{prompts}]", "evaluate.max_new_tokens=8", "evaluate.num_draft_tokens=[1,4]"),
        *("runs.slow=[]", 'runs.fast=["trainer.learning_rate=0.01"]'),
    ]
    (tmp_path / "s" / "runs" / "slow-42" / "draft").mkdir(parents=True)  # of somebody else

    def study(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "recipes" / "study.py"), *settings, *more]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)

    assert "error: " in (refused := study('runs.fast=["trainer.lr=1"]')).stderr and refused.returncode == 2
    assert "use trainer.learning_rate" in refused.stderr
    assert "is not empty" in (refused := study()).stderr and refused.returncode == 2
    (tmp_path / "s" / "runs" / "slow-42" / "draft").rmdir()
    first = study()
    assert first.returncode == 0, first.stderr[-2000:]
    drafts = [tmp_path / "s" / "runs" / name / "draft" / "model.safetensors" for name in ("slow-42", "fast-42")]
    assert drafts[0].read_bytes() != drafts[1].read_bytes()
    again = study()
    assert again.returncode == 0 and "supervised" not in again.stdout  # nothing was trained
    assert again.stdout.partition("tau at")[2] == first.stdout.partition("tau at")[2] != ""
    late = f'runs.late=["data.source={tmp_path}/late.jsonl"]'
    failed = study(late)
    assert failed.returncode == 1 and "late-42 ended with status 2" in failed.stderr
    shutil.copy(chats_file, tmp_path / "late.jsonl")
    joined = study(late)
    assert joined.returncode == 0 and "late" in joined.stdout.partition("tau at")[2]
