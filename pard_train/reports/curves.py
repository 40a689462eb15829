"""Curves of training runs from metrics.jsonl: the page of one run, and several runs laid over each other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pard_train.errors import UserError
from pard_train.reports.charts import Chart, Point
from pard_train.reports.records import distinct, grouped
from pard_train.reports.sections import Section
from pard_train.reports.tables import NONE, Table
from pard_train.reports.webpage import PAGE_FILE, fill
from pard_train.runs import METRICS_FILE, PLAN_FILE, flatten, read_json, read_metrics, run_of

MAX_POINTS = 60  # of a curve; more are averaged in groups
MAX_DEPTHS = 8  # curves of a chart by depth
PROGRESS = "progress/supervised_tokens"
TAU, MEAN = "eval/tau/", "eval/tau/mean"
OPTIMIZATION = {"learning_rate": ("learning rate", ""), "grad_norm": ("gradient norm", "")}  # title and unit
LOSS = {"loss": ("loss", ""), "accepted_length": ("expected accepted length", "tokens")}
THROUGHPUT = {
    "throughput/supervised_tokens_per_second": ("supervised tokens per second", "tokens/s"),
    "throughput/seconds_per_step": ("duration of a step", "seconds"),
    "throughput/mfu": ("share of the devices' peak rate", "share"),
    "throughput/peak_memory_gb": ("peak memory", "GB"),
    "throughput/data_wait_share": ("share of time waiting for data", "share"),
    "throughput/packing_fill": ("share of slots without padding", "share"),
}

Line = dict[str, Any]


@dataclass(frozen=True)
class Curves:
    """Draws values of one or several logs over supervised tokens, or over steps where a log has no tokens.

    Attributes:
        runs: lines of metrics.jsonl by the name of the run.
    """

    runs: Mapping[str, Sequence[Line]]

    def charts(self, names: Mapping[str, tuple[str, str]], *, low: float | None = None) -> list[Chart]:
        """One chart per value, with one series per run; titles and units by the name of the value."""
        return [
            chart
            for name, (title, unit) in names.items()
            for chart in self.chart(title, unit, {run: (run, name) for run in self.runs}, low=low)
        ]

    def chart(
        self, title: str, y_label: str, series: Mapping[str, tuple[str, str]], *, low: float | None = None
    ) -> list[Chart]:
        """A chart of series, each a run and the name of a value, from `low` up; none if there are no values."""
        found = {name: self._points(*where) for name, where in series.items()}
        found = {name: points for name, points in found.items() if points}
        if not found:
            return []
        everything = [value for points in found.values() for p in points for value in (p.y, p.low, p.high)]
        values = [value for value in everything if value is not None]
        margin = 0.06 * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
        limits = (min(values) - margin if low is None else low, max(values) + margin)
        ticks = _ticks(max(p.x for points in found.values() for p in points))
        return [Chart(title, "line", found, limits, y_label, x_label=self._x()[2], ticks=ticks)]

    def _points(self, run: str, name: str) -> list[Point]:
        """One curve; of tau with its interval, and a ring at the step with the best mean."""
        x_name, unit, _ = self._x()
        rows = [line for line in self.runs[run] if line.get(name) is not None]
        best = best_line(self.runs[run]) if name.startswith(TAU) else None
        points = []
        most = len(rows) if name.startswith(TAU) else MAX_POINTS  # a mean would leave its interval and its ring
        for group in np.array_split(np.arange(len(rows)), min(most, len(rows)) or 1):
            mine = [rows[i] for i in group]
            if mine:
                low, high = (mine[-1].get(name.replace(TAU, f"eval/tau_{end}/", 1)) for end in ("low", "high"))
                interval = (low, high) if name.startswith(TAU) else (None, None)
                y = float(np.mean([line[name] for line in mine]))
                points.append(Point(mine[-1][x_name] / unit, y, interval[0], interval[1], best in mine))
        return points

    def _x(self) -> tuple[str, float, str]:
        """Name of the horizontal values, their unit, and their label."""
        lines = [line for mine in self.runs.values() for line in mine]
        if not all(PROGRESS in line for line in lines):
            return "step", 1.0, "optimizer steps"
        most = max((line[PROGRESS] for line in lines), default=0)
        unit, word = next(
            (u, w) for u, w in ((1e6, "million "), (1e3, "thousand "), (1.0, "")) if most >= 2 * u or u == 1
        )
        return PROGRESS, unit, f"{word}supervised tokens"


def _ticks(most: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [tick for tick in MaxNLocator(5).tick_values(0, most) if tick <= most]


def best_line(lines: Sequence[Line]) -> Line | None:
    """The measurement with the highest mean tau after a step; None without one."""
    measured = [line for line in lines if line.get(MEAN) is not None and line["step"] > 0]
    return max(measured, key=lambda line: line[MEAN], default=None)


def _names(lines: Iterable[Line], prefix: str) -> list[str]:
    """Names in a log that begin so, in order."""
    return distinct(name for line in lines for name in line if name.startswith(prefix))


# ---- One run --------------------------------------------------------------------------------------------------------


def write_run_page(folder: Path, state: str) -> None:
    """Write report.html of a training run from its metrics.jsonl and run.json.

    Args:
        folder: of the run.
        state: running | finished | why it stopped.
    """
    plan = read_json(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else {}
    (folder / PAGE_FILE).write_text(render_run(read_metrics(folder), run_of(folder) | {"plan": plan}, state))


def render_run(lines: Sequence[Line], run: Mapping[str, Any], state: str) -> str:
    """The page of one run."""
    config = run.get("config") or {}
    manifest = run.get("data_manifest") or {}
    hidden = ("config", "command", "data_manifest", "plan")
    return fill(
        "training.html",
        [section for section in _sections(lines) if section.charts or section.tables],
        state=state,
        tiles=_tiles(lines),
        command=flatten({"command": run.get("command", [])})["command"],
        facts={
            "Plan": _rounded(run.get("plan") or {}),
            "Environment": flatten({name: value for name, value in run.items() if name not in hidden}),
            "Data": flatten(
                {name: manifest[name] for name in ("folder", "counts", "document_length") if name in manifest}
            ),
        },
        settings={name: flatten({name: value}) for name, value in config.items()},
    )


def _rounded(plan: Mapping[str, Any]) -> dict[str, str]:
    """The plan with short numbers."""
    numbers = {name: value for name, value in flatten(dict(plan)).items() if value is not None}
    return {
        n: f"{v:.3g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for n, v in numbers.items()
    }


def _tiles(lines: Sequence[Line]) -> list[tuple[str, str, str]]:
    """(number, unit, subject) of the best tau, the expected accepted length, and the progress."""
    tiles, last, best = [], next((line for line in lines[::-1] if "loss" in line), {}), best_line(lines)
    if best is not None:
        first = next((line[MEAN] for line in lines if line.get(MEAN) and line["step"] == 0), None)
        before = f", {first:.2f} before training" if first else ""
        tiles.append((f"{best[MEAN]:.2f}", "best tau", f"mean over targets at step {best['step']:,}{before}"))
    if last.get("accepted_length"):
        loss = f", loss {last['loss']:.3f}" if last["loss"] is not None else ""
        tiles.append((f"{last['accepted_length']:.2f}", "expected accepted length", f"on training text{loss}"))
    if lines:
        where = f"step {lines[-1]['step']:,}, epoch {lines[-1].get('epoch', 0):.2f}"
        tiles.append((f"{lines[-1].get(PROGRESS, 0):,}", "supervised tokens", where))
    return tiles


def _sections(lines: Sequence[Line]) -> list[Section]:
    curves = Curves({"": lines})
    taus = [name for name in _names(lines, TAU) if name.count("/") > 2]
    by_target = grouped(taus, lambda name: name.removeprefix(TAU).rpartition("/")[0])
    tau = [
        chart
        for target, names in by_target.items()
        for chart in curves.chart(target, "tau", {name.rpartition("/")[2]: ("", name) for name in names})
    ]
    depths = _names(lines, "accuracy/depth_")
    chosen = depths[:: max(1, -(-len(depths) // MAX_DEPTHS))]
    by_depth = {name.removeprefix("accuracy/").replace("_", " "): name for name in chosen}
    depth = curves.chart("accuracy", "share", {label: ("", name) for label, name in by_depth.items()})
    depth += curves.chart(
        "cross entropy in nats", "nats", {label: ("", n.replace("accuracy", "loss")) for label, n in by_depth.items()}
    )
    ring = "Mean accepted length on the targets' own answers, with 95% intervals. A ring marks the best mean."
    loss_text = "The objective, and the accepted length that the accuracies imply on training text. It is not tau."
    return [
        Section("tau", "tau", "tau", ring, tau, _tau_table(lines)),
        Section("last", "K", "Last measurement by K and position", "", _last_measurement(lines, taus)),
        Section("depth", "Depth", "Accuracy and cross entropy by depth", "Depth 0 is the real token.", depth),
        Section("loss", "Loss", "Loss", loss_text, curves.charts(LOSS)),
        Section(
            "speed", "Throughput", "Throughput", "Without the time of measurements.", curves.charts(THROUGHPUT, low=0.0)
        ),
        Section("optimization", "Optimization", "Optimization", "", curves.charts(OPTIMIZATION, low=0.0)),
    ]


def _last_measurement(lines: Sequence[Line], taus: Sequence[str]) -> list[Chart]:
    last = next((line for line in lines[::-1] if MEAN in line), None)
    charts = []
    axes = {"eval/tau_by_k/": ("tau", "draft tokens K", 1.0), "eval/survival/": ("survival", "draft position", 0.0)}
    for prefix, (title, x_label, low) in axes.items() if last else ():
        assert last is not None
        series = {}
        for case in (name.removeprefix(TAU) for name in taus):
            found = [(int(n.rpartition("_")[2]), last[n]) for n in last if n.startswith(f"{prefix}{case}/")]
            series[case] = [Point(x, y) for x, y in sorted(found)]
        values = [p for points in series.values() for p in points]
        if values:
            limits = (low, low + (1.05 * (max(p.y for p in values) - low) or 1.0))
            ticks = sorted({p.x for p in values})
            charts.append(Chart(title, "line", series, limits, title, x_label=x_label, ticks=ticks))
    return charts


def _tau_table(lines: Sequence[Line]) -> list[Table]:
    measured, best = [line for line in lines if MEAN in line], best_line(lines)
    names = distinct((MEAN, f"{TAU}worst", *_names(measured, TAU)))
    header = ["step", "", "supervised tokens", *(name.removeprefix(TAU) for name in names)]
    rows = [
        [
            *(f"{line['step']:,}", "best" if line is best else "", f"{line.get(PROGRESS, 0):,}"),
            *(NONE if line.get(name) is None else f"{line[name]:.3f}" for name in names),
        ]
        for line in measured
    ]
    return [Table(header, rows, num_names=2)] if rows else []


# ---- Several runs ---------------------------------------------------------------------------------------------------


def read_runs(results: Mapping[str, str]) -> dict[str, list[Line]]:
    """Logs of training runs by their names. Raises UserError if one is no training run, or its log is empty."""
    runs = {name: read_metrics(Path(path)) for name, path in results.items()}
    for name, lines in runs.items():
        if not lines:
            raise UserError(f"results.{name}={results[name]} has no {METRICS_FILE}: give training runs or evaluations")
    return runs


def best_taus(runs: Mapping[str, Sequence[Line]]) -> dict[str, float]:
    """The best mean tau of every run that measured one."""
    return {name: line[MEAN] for name, lines in runs.items() if (line := best_line(lines)) is not None}


def runs_table(runs: Mapping[str, Sequence[Line]], settings: Mapping[str, dict[str, Any]]) -> Table:
    """Best tau, last loss and progress of every run, and the settings in which the runs differ."""
    names = distinct(name for mine in settings.values() for name in mine)
    differ = [n for n in names if len({str(mine.get(n)) for mine in settings.values()}) > 1 and n != "output_dir"]
    rows = []
    for run, lines in runs.items():
        best, last = best_line(lines), next((line for line in lines[::-1] if line.get("loss") is not None), {})
        measured = [f"{best[MEAN]:.3f}", f"{best['step']:,}"] if best else [NONE, NONE]
        trained = [f"{last[name]:.3f}" if name in last else NONE for name in ("loss", "accepted_length")]
        changed = [str(settings[run].get(name, NONE)) for name in differ]
        rows.append([run, *measured, *trained, f"{lines[-1].get(PROGRESS, 0):,}", *changed])
    header = ["run", "best tau", "at step", "loss", "expected accepted length", "supervised tokens", *differ]
    return Table(header, rows)


def run_charts(runs: Mapping[str, Sequence[Line]]) -> list[Section]:
    """Sections with one curve per run: tau, depths, loss, throughput."""
    curves, everything = Curves(runs), [line for lines in runs.values() for line in lines]

    measured = distinct((MEAN, f"{TAU}worst", *_names(everything, TAU)))
    taus = {name: (name.removeprefix(TAU), "tau") for name in measured}
    losses = {n: (n.removeprefix("loss/").replace("_", " "), "nats") for n in _names(everything, "loss/depth_")}
    sections = [
        Section("tau", "", "tau", "A ring marks the best mean of a run.", curves.charts(taus)),
        Section("loss", "", "Loss", "", curves.charts(LOSS)),
        Section("depth", "", "Cross entropy by depth", "Comparable for every objective.", curves.charts(losses)),
        Section("speed", "", "Throughput", "", curves.charts(THROUGHPUT, low=0.0)),
    ]
    return [section for section in sections if section.charts]
