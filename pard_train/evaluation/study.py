"""A study: several training runs that differ in a few settings, each with every seed, compared on the same prompts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np

from pard_train.bootstrap import ratio_interval
from pard_train.commands import HOME, PROGRAMS
from pard_train.config import Config, StudyConfig, decisive
from pard_train.errors import RESUMABLE, Interrupted, UserError
from pard_train.reports.charts import Chart, write_png
from pard_train.reports.records import Record, Result, at_largest_k, distinct, grouped
from pard_train.reports.sections import interval_charts
from pard_train.reports.tables import NONE, Table
from pard_train.runs import CONFIG_FILE, SETTINGS_VERSION, read_json, require_same
from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER

RUNS_FOLDER = "runs"
BEFORE = "before"  # name of the untrained draft
REPORT_FILE, CHART_FILE = "study.md", "study.png"
OWN = ("study", "output_dir", "seed", "resume")  # settings that every run has its own of


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of its settings in the study.
        settings: in which it differs, as on the command line.
        overrides: the whole command line.
    """

    name: str
    seed: int
    folder: Path
    settings: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def draft(self) -> str:
        """Name of its draft in the evaluation."""
        return f"{self.name}-{self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its trained draft exists."""
        return (self.folder / DRAFT_FOLDER).exists()


def plan_runs(study: StudyConfig, overrides: Sequence[str], folder: Path) -> list[Run]:
    """The runs of a study, seed by seed.

    Args:
        study: names, settings and seeds.
        overrides: of the study's own command line.
        folder: output folder of the study.
    """
    if BEFORE in study.runs:
        raise UserError(f"study.runs.{BEFORE} is the name of the untrained draft: choose another one")
    shared = [f"logger.group={folder.absolute().name}"]  # unless the study's own command names another
    shared += [line for line in overrides if line.lstrip("+~").split("=")[0].split(".")[0] not in OWN]
    runs = []
    for seed in study.seeds:
        for name, settings in study.runs.items():
            place = folder / RUNS_FOLDER / f"{name}-{seed}"
            own = [f"output_dir={place}", f"seed={seed}", f"resume={str((place / CONFIG_FILE).exists()).lower()}"]
            runs.append(Run(name, seed, place, tuple(settings), (*shared, *settings, *own)))
    return runs


def check_finished(runs: Sequence[Run], trainings: Sequence[Config]) -> None:
    """Check that finished runs have the settings that a study gives them now; any number of processes trained them."""
    for run, training in zip(runs, trainings, strict=True):
        if run.is_finished:
            old = read_json(file) if (file := run.folder / CONFIG_FILE).exists() else {}
            new = {"settings_version": SETTINGS_VERSION, **decisive(training), "world_size": old.get("world_size")}
            require_same(old, new, what=f"{run.folder} holds a run with other settings")


def train_run(run: Run, launcher: Sequence[str]) -> str | None:
    """Train in a process of its own. Returns why it failed, or None.

    Args:
        run: skipped if it is finished.
        launcher: command before recipes/train.py; empty: this Python.

    Raises:
        Interrupted: if a signal came. The run has a checkpoint, or ended before it could save one.
    """
    if run.is_finished:
        return None
    program = HOME / PROGRAMS["train"].folder / "train.py"
    stops: list[int] = []
    with subprocess.Popen([*(launcher or [sys.executable]), str(program), *run.overrides]) as process:

        def stop(number: int, _: object) -> None:
            stops.append(number)
            process.terminate()  # training then saves a checkpoint

        before = signal.signal(signal.SIGTERM, stop)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it got the signal too, and saves a checkpoint
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if status == RESUMABLE:
        raise Interrupted(f"{run.draft} stopped with a checkpoint")
    if stops:
        raise Interrupted(f"stopped after {run.draft}")
    return f"{run.draft} ended with status {status}" if status else None


def drafts_of(runs: Sequence[Run], evaluation: Path) -> dict[str, str]:
    """Folders of the drafts to evaluate, by name: the untrained one first, which stays that of a begun evaluation."""
    begun = read_json(file).get("drafts", {}) if (file := evaluation / CONFIG_FILE).exists() else {}
    before = begun.get(BEFORE, str(runs[0].folder / INITIAL_FOLDER))
    return {BEFORE: before} | {run.draft: str(run.folder / DRAFT_FOLDER) for run in runs}


def write_study(result: Result, runs: Sequence[Run], folder: Path) -> str:
    """Write study.md and study.png.

    Args:
        result: evaluation of `drafts_of`.
        runs: those that were evaluated.
        folder: output folder.

    Returns:
        The tables as Markdown, of the benchmarks that were measured with every draft. If there is none: UserError.
    """
    replayed = [record for record in result["records"] if record["mode"] == "replay"]
    cells, drafts = grouped(replayed, itemgetter("target", "benchmark")), {BEFORE, *(run.draft for run in runs)}
    complete = [record for cell in cells.values() if drafts <= {r["draft"] for r in cell} for record in cell]
    if not complete:
        raise UserError(f"{folder}: no benchmark was measured with every draft: the same command retries what failed")
    by_target = grouped(complete, itemgetter("target"))
    text = "\n\n".join(_table(target, records, runs).markdown() for target, records in by_target.items())
    meaning = "tau at the largest K, over all seeds. Ratios are to the first run, with intervals paired by prompt."
    (folder / REPORT_FILE).write_text(f"# Study\n\n{meaning}\n\n{text}\n\n![ratios]({CHART_FILE})\n")
    write_png([_charts(by_target, runs)], folder / CHART_FILE)
    return text


def pooled_counts(records: Sequence[Record], drafts: Sequence[str]) -> np.ndarray:
    """Tokens and steps of every prompt of all benchmarks, summed over drafts (one per seed): [P, 2].

    Args:
        records: of replay, of one target and one K.
        drafts: names, of which records without a draft are ignored.
    """
    mine = grouped([r for r in records if r["draft"] in drafts], itemgetter("benchmark"))
    return np.concatenate([np.sum([r["prompt_counts"] for r in same], axis=0) for same in mine.values()])


def compared(first: np.ndarray, later: np.ndarray) -> tuple[float, float, float]:
    """Ratio of the tau of later to that of first, and its 95% interval paired by prompt; both [P, 2]."""
    return tau_of(later) / tau_of(first), *ratio_interval(first, later)


def tau_of(counts: np.ndarray) -> float:
    """Tokens by steps, pooled over prompts: [P, 2] -> tau."""
    tokens, steps = counts.sum(axis=0)
    return float(tokens / steps)


def _drafts_by_name(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Names of drafts by name of their settings."""
    return {BEFORE: [BEFORE]} | {
        name: [r.draft for r in same] for name, same in grouped(runs, lambda r: r.name).items()
    }


def _table(target: str, records: list[Record], runs: Sequence[Run]) -> Table:
    """Per run tau by benchmark and over all, by seed, the ratio to the first run, and tau at the smallest K."""
    largest, benchmarks = at_largest_k(records), distinct(r["benchmark"] for r in records)
    ks = sorted(distinct(r["num_draft_tokens"] for r in records))
    smallest = [r for r in records if r["num_draft_tokens"] == ks[0]]
    settings = {run.name: " ".join(run.settings) or NONE for run in runs} | {BEFORE: "untrained"}
    drafts = _drafts_by_name(runs)
    first = pooled_counts(largest, drafts[runs[0].name])
    rows = []
    for name, mine in drafts.items():
        counts = pooled_counts(largest, mine)
        taus = [tau_of(pooled_counts([r for r in largest if r["benchmark"] == b], mine)) for b in benchmarks]
        by_seed = ", ".join(f"{tau_of(pooled_counts(largest, [draft])):.3f}" for draft in mine)
        ratio = NONE if name == runs[0].name else "{:.3f} [{:.3f}, {:.3f}]".format(*compared(first, counts))
        numbers = [f"{tau:.2f}" for tau in (*taus, tau_of(counts))]
        rows.append([name, settings[name], *numbers, by_seed, ratio, f"{tau_of(pooled_counts(smallest, mine)):.3f}"])
    header = ["run", "settings", *benchmarks, "all", "by seed", f"ratio to {runs[0].name}", f"K={ks[0]}"]
    return Table(header, rows, num_names=2, caption=f"tau at K={ks[-1]} on target {target}")


def _charts(by_target: dict[str, list[Record]], runs: Sequence[Run]) -> list[Chart]:
    """The ratio of tau to the first run, of every other run at the smallest and largest K; one chart per target."""
    drafts = _drafts_by_name(runs)
    first = drafts[runs[0].name]
    cells = {}
    for target, records in by_target.items():
        by_k = dict(sorted(grouped(records, itemgetter("num_draft_tokens")).items()))
        cells[f"{target}, paired by prompt"] = [
            (name, f"K = {k}", list(compared(pooled_counts(by_k[k], first), pooled_counts(by_k[k], mine))))
            for name, mine in drafts.items()
            if mine != first
            for k in dict.fromkeys((min(by_k), max(by_k)))
        ]
    return interval_charts(cells, y_label=f"ratio of tau to {runs[0].name}")
