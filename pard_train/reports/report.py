"""What an evaluation found, as people and programs read it: Markdown, CSV, a picture, and the page of `webpage.py`."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pard_train.reports.records import (
    TERMS,
    Record,
    Result,
    at_largest_k,
    distinct,
    flatten,
    groups_of,
    label_of,
    live,
    measured,
    pooled_tau,
)
from pard_train.reports.tables import Table, group_table, model_table, record_table, speed_table, tau_table, to_markdown
from pard_train.reports.webpage import render_page

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
PICTURE_FILE = "acceptance.png"
TABLE_FILE = "acceptance.csv"
GROUPS_FILE = "groups.csv"
MOST_ROWS = 40  # of the report in the terminal; a longer one shows the pooled rows only
WIDTH = 120  # columns of its text and, as far as names allow, its tables
NAME_FIELDS = ("draft", "target", "benchmark", "mode", "method", "temperature", "batch_size", "num_draft_tokens")


def write_report(
    document: Result,
    folder: Path,
    *,
    predictions: Sequence[dict[str, Any]] = (),
    samples: Sequence[dict[str, Any]] = (),
) -> None:
    """Write report.md, report.html, acceptance.csv, groups.csv and acceptance.png.

    Args:
        document: acceptance.json.
        folder: where they go.
        predictions: predictions.json.
        samples: samples.json.
    """
    picture = f"![acceptance per position]({PICTURE_FILE})\n"
    (folder / REPORT_FILE).write_text(f"{render_report(document)}\n{picture}\n{render_details(document)}")
    (folder / PAGE_FILE).write_text(render_page(document, list(predictions), list(samples)))
    write_csv([{k: v for k, v in r.items() if k != "groups"} for r in document["records"]], folder / TABLE_FILE)
    groups = [{**{k: r[k] for k in NAME_FIELDS}, **g} for r in document["records"] for g in groups_of(r)]
    write_csv(groups, folder / GROUPS_FILE)
    draw_survival(measured(document), folder / PICTURE_FILE)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def render_report(document: Result) -> str:
    """The result in short, as Markdown that fits a terminal of 120 columns."""
    parts = ["# Acceptance length"]
    if document["failures"]:
        parts += ["## Not measured", "\n".join(f"- {failure_line(f)}" for f in document["failures"])]
    meanings = [f"{term}: {TERMS[term]}" for term in ("tau", "vLLM tau")]
    parts += ["## tau by number of draft tokens", *map(_fold, meanings), *tau_tables(document)]
    if live(document):
        parts += ["## Measured speed", _fold(f"speed-up: {TERMS['speed-up']}"), *speed_tables(live(document))]
    return "\n\n".join(parts) + "\n"


def _fold(text: str) -> str:
    return textwrap.fill(text, WIDTH - 2)


def failure_line(failure: dict[str, Any]) -> str:
    """What could not be measured and why, in one line."""
    where = ", ".join(f"{kind} {failure[kind]}" for kind in ("draft", "target", "benchmark") if failure[kind])
    return f"{where}: {failure['reason']}"


def tau_tables(document: Result) -> list[str]:
    """One table for every target; the pooled rows only, if there are too many for a screen."""
    records = measured(document)
    targets = distinct(r["target"] for r in records)
    tables = [_fitting_tau_table(target, [r for r in records if r["target"] == target]) for target in targets]
    if sum(len(table.rows) for table in tables) <= MOST_ROWS:
        return [to_markdown(table) for table in tables]
    pooled = [replace(t, rows=[row for row in t.rows if row[0] == "all"] or t.rows) for t in tables]
    return [*map(to_markdown, pooled), f"Pooled over benchmarks; for each of them see {PAGE_FILE} or {TABLE_FILE}."]


def _fitting_tau_table(target: str, records: list[Record]) -> Table:
    """With as many columns of K as the terminal has room for, two at least."""
    for most_k in range(6, 1, -1):
        table = tau_table(target, records, most_k=most_k)
        if max(len(line) for line in to_markdown(table).splitlines()) <= WIDTH:
            break
    return table


def speed_tables(records: list[Record]) -> list[str]:
    """One table for every target."""
    targets = distinct(r["target"] for r in records)
    return [to_markdown(speed_table(f"target {t}", [r for r in records if r["target"] == t])) for t in targets]


def render_details(document: Result) -> str:
    """Every number in both conventions, the breakdown, and what was measured with what, as Markdown."""
    records = document["records"]
    parts = ["## All numbers", to_markdown(record_table(records))]
    parts += ["## Breakdown at the largest K", to_markdown(group_table(at_largest_k(measured(document))))]
    parts += ["## Fingerprints", to_markdown(model_table(records)), "## Origin"]
    for made_by in distinct(tuple(flatten(r["provenance"]).items()) for r in records):
        parts += [f"```\n{value}\n```" for name, value in made_by if name == "command"]
        parts.append("\n".join(f"- {n}: {value}" for n, value in made_by if n != "command" and value is not None))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# For programs
# ---------------------------------------------------------------------------------------------------------------------


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line per row: nested fields by dotted names, lists as JSON, what is missing left empty."""
    flat = [flatten(row) for row in rows]
    names = distinct(name for row in flat for name in row)
    columns = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # None, or a tree
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


def tau_below(document: Result, thresholds: dict[str, float]) -> list[str]:
    """What keeps a result from passing.

    Args:
        document: acceptance.json.
        thresholds: least tau at the largest K by benchmark; `all` stands for all benchmarks pooled.

    Returns:
        One line for every draft and target below a threshold, and for what should have been measured and was not.
    """
    records = at_largest_k([r for r in measured(document) if not r["temperature"]])
    misses = []
    for name, least in thresholds.items():
        mine = [r for r in records if name in (r["benchmark"], "all")]
        if not mine:
            misses.append(f"{name}: not measured, so tau is not known to be at least {least:.2f}")
        for target, draft in distinct((r["target"], label_of(r)) for r in mine):
            found = [r for r in mine if (r["target"], label_of(r)) == (target, draft)]
            tau, k = pooled_tau(found), found[0]["num_draft_tokens"]
            if tau < least:
                misses.append(f"{name}: draft {draft} on target {target}: tau {tau:.2f} at K={k} is below {least:.2f}")
        failures = [f for f in document["failures"] if name == "all" or f["benchmark"] in (None, name)]
        misses += [f"{name}: not measured: {failure_line(f)}" for f in failures]
    return misses


def draw_survival(records: list[Record], path: Path) -> None:
    """Picture: share of steps in which each draft position is accepted, one panel per target and benchmark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = at_largest_k(records)
    panels = distinct((r["target"], r["benchmark"]) for r in shown)
    num_columns = min(len(panels), 3)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4.2 * num_columns, 3.4 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (target, benchmark) in zip(axes.flat, panels, strict=False):
        for r in shown:
            if (r["target"], r["benchmark"]) == (target, benchmark):
                positions = range(1, len(r["survival"]) + 1)
                axis.plot(positions, r["survival"], marker="o", label=f"{label_of(r)} (tau {r['tau']:.2f})")
        axis.set(title=f"{benchmark}\non {target}", xlabel="draft position", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("share of steps accepted")
    figure.savefig(path, dpi=120)
