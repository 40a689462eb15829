"""The learning curve of a run: tau on held-out prompts by supervised tokens, and what more tokens would bring.

    python recipes/train.py ... monitor.every_steps=100 monitor.max_prompts=0 output_dir=RUN
    python benchmarks/learning_curve.py RUN

Reads the measurements of the monitor in RUN/metrics.jsonl. Writes benchmarks/results/DATE-learning-curve-NAME.md, .png
and .json (the measurements). The law tau(D) = T - c D^-a, with D supervised tokens, is fitted to the
measurements after the warm-up at the full learning rate: those at the end gain from the decay, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from pages import RESULTS, command, markdown, origin, write_page

from pard_train.reports.charts import Chart, Point, write_png
from pard_train.runs import read_json, write_json

VALUES_OF_K = (1, 2, 4, 8)
POWERS = np.linspace(0.05, 2.0, 196)  # candidates for a
FACTOR = 10  # more tokens


def main() -> None:
    """Read, fit, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of recipes/train.py with a monitor")
    parser.add_argument("--name", default="cpu", help="end of the page's name")
    arguments = parser.parse_args()
    name = f"learning-curve-{arguments.name}"
    measured = measurements(arguments.run)
    curves = {by: curve(measured, by) for by in measured[0]["tau"]}
    page = render(arguments.run, measured, curves)
    RESULTS.mkdir(exist_ok=True)
    write_page(name, page)
    path = max(RESULTS.glob(f"*-{name}.md"))
    write_png([[chart(by, points) for by, points in curves.items()]], path.with_suffix(".png"))
    write_json(path.with_suffix(".json"), measured)


def measurements(run: Path) -> list[dict[str, Any]]:
    """Steps, supervised tokens, learning rate, and tau by benchmark and K of every measurement of a run."""
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
    return list(found.values())


def curve(measured: list[dict[str, Any]], benchmark: str) -> dict[int, list[tuple[float, float]]]:
    """(supervised tokens, tau) of a benchmark by K."""
    return {k: [(m["tokens"], m["tau"][benchmark][str(k)]) for m in measured] for k in VALUES_OF_K}


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """T, c and a of tau = T - c D^-a by least squares, a on a grid; and the largest error."""
    tokens, tau = np.array(points).T
    best: tuple[float, ...] = (np.inf,)
    for a in POWERS:
        columns = np.stack([np.ones_like(tokens), -(tokens**-a)], axis=1)
        solution, *_ = np.linalg.lstsq(columns, tau, rcond=None)
        errors = np.abs(columns @ solution - tau)
        if (squares := float((errors**2).sum())) < best[0]:
            best = (squares, *solution.tolist(), float(a), float(errors.max()))
    return best[1], best[2], best[3], best[4]


def chart(benchmark: str, points: dict[int, list[tuple[float, float]]]) -> Chart:
    """tau of one benchmark by thousand supervised tokens."""
    series = {f"K = {k}": [Point(tokens / 1000, tau) for tokens, tau in own] for k, own in points.items()}
    values = [point.y for own in series.values() for point in own]
    ticks = [point.x for point in series["K = 1"]]
    limits = (np.floor(min(values) * 10) / 10, np.ceil(max(values) * 10) / 10)
    return Chart(benchmark, "line", series, limits, "tau", "thousand supervised tokens", [round(t) for t in ticks])


def render(run: Path, measured: list[dict[str, Any]], curves: dict[str, dict[int, list[tuple[float, float]]]]) -> str:
    """The page."""
    trained = read_json(run / "run.json")
    table = [["supervised tokens", "step", "learning rate", *(f"{by}, K {k}" for by in curves for k in VALUES_OF_K)]]
    for number, m in enumerate(measured):
        taus = [f"{points[k][number][1]:.3f}" for points in curves.values() for k in VALUES_OF_K]
        table.append([f"{m['tokens']:,}", str(m["step"]), f"{m['learning_rate']:.2g}", *taus])
    full = max(m["learning_rate"] for m in measured)
    steady = [number for number, m in enumerate(measured) if m["step"] and m["learning_rate"] == full]
    law = [["prompts", "K", "T", "c", "a", "largest error", "at the end", f"law at {FACTOR} times more tokens"]]
    for by, points in curves.items():
        for k in VALUES_OF_K:
            limit, scale, power, error = fit([points[k][number] for number in steady])
            tokens, tau = points[k][-1]
            law.append([by, str(k), f"{limit:.2f}", f"{scale:.3g}", f"{power:.2f}", f"{error:.3f}", f"{tau:.3f}"])
            law[-1].append(f"{limit - scale * (FACTOR * tokens) ** -power:.2f}")
    return "\n".join(
        [
            f"# Learning curve: {trained['command'][0]}",
            "",
            f"    {' '.join(trained['command'])}",
            f"    {command()}",
            "",
            f"{origin()}.",
            "",
            "tau on held-out prompts by supervised tokens seen:",
            "",
            markdown(table),
            "",
            f"The law tau(D) = T - c D^-a, fitted to {len(steady)} measurements at the full learning rate:",
            "",
            markdown(law),
            "",
        ]
    )


if __name__ == "__main__":
    main()
