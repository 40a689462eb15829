"""The learning curve of a run: tau on held-out prompts by supervised tokens, and what more tokens would bring.

    python recipes/train.py ... monitor.every_steps=100 monitor.max_prompts=0 output_dir=RUN
    python benchmarks/learning_curve.py RUN [RUN-2 ...]     # RUN-2 was trained with model.path=RUN/draft

Reads the measurements of the monitor in RUN/metrics.jsonl. Writes benchmarks/results/DATE-learning-curve-NAME.md, .png
and .json (the measurements). The law tau(D) = u + v log10 D, with D supervised tokens, is fitted to the measurements
at the full learning rate: those before are of few steps, and those after gain from the decay, too. A curve
that bends gives less than its v.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from pages import command, markdown, origin, write_page

from pard_train.reports.charts import Chart, Point, write_png
from pard_train.runs import read_json, write_json

VALUES_OF_K = (1, 2, 4, 8)


def main() -> None:
    """Read, fit, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", help="runs of recipes/train.py with a monitor; each continues one"
    )
    parser.add_argument("--name", default="cpu", help="end of the page's name")
    arguments = parser.parse_args()
    name = f"learning-curve-{arguments.name}"
    measured: list[dict[str, Any]] = []
    for run in arguments.runs:
        measured += measurements(run, after=measured[-1] if measured else None)
    curves = {by: curve(measured, by) for by in measured[0]["tau"]}
    path = write_page(name, render(arguments.runs, measured, curves))
    write_png([[chart(by, points) for by, points in curves.items()]], path.with_suffix(".png"))
    write_json(path.with_suffix(".json"), measured)


def measurements(run: Path, after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Steps, supervised tokens, learning rate, and tau by benchmark and K of every measurement of a run.

    A run that continues another begins after its last measurement, which is its own first one.
    """
    tokens, rate, found = 0, 0.0, {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        tokens = line.get("progress/supervised_tokens", tokens)
        rate = line.get("learning_rate", rate)
        tau: dict[str, dict[str, float]] = {}
        for key, value in line.items():
            if key.startswith("eval/tau_by_k/"):
                *_, benchmark, k = key.split("/")
                tau.setdefault(benchmark, {})[k.removeprefix("k_")] = value
        if tau:
            found[line["step"]] = {"step": line["step"], "tokens": tokens, "learning_rate": rate, "tau": tau}
    if after:
        del found[0]
    before = {key: after[key] if after else 0 for key in ("step", "tokens")}
    return [{**m, **{key: m[key] + before[key] for key in before}} for m in found.values()]


def curve(measured: list[dict[str, Any]], benchmark: str) -> dict[int, list[tuple[float, float]]]:
    """(supervised tokens, tau) of a benchmark by K."""
    known = [k for k in VALUES_OF_K if str(k) in measured[0]["tau"][benchmark]]
    return {k: [(m["tokens"], m["tau"][benchmark][str(k)]) for m in measured] for k in known}


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """v of tau = u + v log10 D by least squares, and its standard error."""
    tokens, tau = np.array(points).T
    columns = np.stack([np.ones_like(tokens), np.log10(tokens)], axis=1)
    solution, *_ = np.linalg.lstsq(columns, tau, rcond=None)
    variance = ((columns @ solution - tau) ** 2).sum() / max(1, len(points) - 2)
    return float(solution[1]), float(np.sqrt(variance * np.linalg.inv(columns.T @ columns)[1, 1]))


def chart(benchmark: str, points: dict[int, list[tuple[float, float]]]) -> Chart:
    """tau of one benchmark by thousand supervised tokens."""
    series = {f"K = {k}": [Point(tokens / 1000, tau) for tokens, tau in own] for k, own in points.items()}
    values = [point.y for own in series.values() for point in own]
    last = series["K = 1"][-1].x
    ticks = [tick for tick in MaxNLocator(6).tick_values(0, last) if tick <= last]
    limits = (np.floor(min(values) * 10) / 10, np.ceil(max(values) * 10) / 10)
    return Chart(benchmark, "line", series, limits, "tau", "thousand supervised tokens", ticks)


def render(
    runs: list[Path], measured: list[dict[str, Any]], curves: dict[str, dict[int, list[tuple[float, float]]]]
) -> str:
    """The page."""
    trained = [" ".join(read_json(run / "run.json")["command"]) for run in runs]
    columns = [f"{by}, K {k}" for by, points in curves.items() for k in points]
    table = [["supervised tokens", "step", "learning rate", *columns]]
    for number, m in enumerate(measured):
        taus = [f"{points[k][number][1]:.3f}" for points in curves.values() for k in points]
        table.append([f"{m['tokens']:,}", str(m["step"]), f"{m['learning_rate']:.2g}", *taus])
    full = max(m["learning_rate"] for m in measured)
    steady = [number for number, m in enumerate(measured) if m["step"] and m["learning_rate"] == full]
    law = [["prompts", "K", "v: tau for ten times more tokens (± standard error)", "tau at the end"]]
    for by, points in curves.items():
        for k in points:
            slope, error = fit([points[k][number] for number in steady])
            law.append([by, str(k), f"{slope:.2f} ± {error:.2f}", f"{points[k][-1][1]:.3f}"])
    return "\n".join(
        [
            f"# Learning curve: {runs[-1].name}",
            "",
            *(f"    {line}" for line in trained),
            f"    {command()}",
            "",
            f"{origin()}.",
            "",
            "tau on held-out prompts by supervised tokens seen:",
            "",
            markdown(table),
            "",
            f"The law tau(D) = u + v log10 D, fitted to {len(steady)} measurements at the full learning rate:",
            "",
            markdown(law),
            "",
        ]
    )


if __name__ == "__main__":
    main()
