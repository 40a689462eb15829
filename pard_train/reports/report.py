"""Files and figures of an evaluation: Markdown, CSV, a picture, the page of `webpage.py`, and thresholds."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from pard_train.reports.charts import write_png
from pard_train.reports.records import (
    KINDS,
    PICTURE_FILE,
    SLOW_BASELINE,
    TERMS,
    Record,
    Result,
    acceptance_records,
    at_largest_k,
    distinct,
    failure_line,
    grouped,
    groups_of,
    has_slow_baseline,
    label_of,
    pooled_tau,
    timed_records,
)
from pard_train.reports.sections import build_sections
from pard_train.reports.tables import NONE, Table, as_markdown, speed_tables, tau_tables
from pard_train.reports.webpage import PAGE_FILE, render_page, render_samples
from pard_train.runs import flatten

REPORT_FILE = "report.md"
SAMPLES_PAGE = "samples.html"
TABLE_FILE = "acceptance.csv"
GROUPS_FILE = "groups.csv"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # first characters of a formula in a spreadsheet
MAX_ROWS = 40  # of tau in the terminal; a longer report shows the pooled rows only
WIDTH = 120  # columns of the terminal
NAME_FIELDS = ("draft", "target", "benchmark", "mode", "method", "temperature", "batch_size", "num_draft_tokens")


def write_report(
    result: Result, folder: Path, *, predictions: Sequence[dict[str, Any]] = (), samples: Sequence[dict[str, Any]] = ()
) -> None:
    """Write report.md, report.html, samples.html, acceptance.png, acceptance.csv and groups.csv.

    Args:
        result: acceptance.json.
        folder: output folder.
        predictions, samples: predictions.json and samples.json.
    """
    picture = f"![tau and survival]({PICTURE_FILE})\n"
    where = f"{PAGE_FILE} and {TABLE_FILE} have every measurement, fingerprints and provenance."
    (folder / REPORT_FILE).write_text(f"{render_report(result)}\n{picture}\n{where}\n")
    (folder / PAGE_FILE).write_text(render_page(result, predictions, samples))
    (folder / SAMPLES_PAGE).write_text(render_samples(samples))
    shown = [section.charts for section in build_sections(result) if section.anchor in ("drafts", "positions")]
    write_png(shown, folder / PICTURE_FILE)
    write_csv([{k: v for k, v in r.items() if k != "groups"} for r in result["records"]], folder / TABLE_FILE)
    groups = [{**{k: r[k] for k in NAME_FIELDS}, **g} for r in result["records"] for g in groups_of(r)]
    write_csv(groups, folder / GROUPS_FILE)


def render_report(result: Result) -> str:
    """The result in short, as Markdown that fits a terminal of 120 columns."""
    parts = ["# Acceptance length"]
    if result["failures"]:
        parts += ["## Failed", "\n".join(f"- {as_markdown(failure_line(f))}" for f in result["failures"])]
    parts += ["## tau by number of draft tokens", *map(_term, ("tau", "vLLM tau")), *_tau_markdown(result)]
    parts += [render_speed(result)] if timed_records(result) else []
    return "\n\n".join(parts) + "\n"


def render_speed(result: Result) -> str:
    """The measured speed as Markdown; it says where the baseline is slow."""
    timed = timed_records(result)
    parts = ["## Measured speed", _term("speed-up"), *(table.markdown() for table in speed_tables(timed))]
    parts += [textwrap.fill(SLOW_BASELINE, WIDTH)] * any(map(has_slow_baseline, timed))
    return "\n\n".join(parts)


def _term(name: str) -> str:
    return textwrap.fill(f"{name}: {TERMS[name]}", WIDTH)


def _tau_markdown(result: Result) -> list[str]:
    """tau of every target; the pooled rows only if there are too many rows for a terminal."""
    tables = [_fitting(mine) for mine in grouped(acceptance_records(result), itemgetter("target")).values()]
    if sum(len(table.rows) for table in tables) <= MAX_ROWS:
        return [table.markdown() for table in tables]
    pooled = [replace(table, rows=[row for row in table.rows if row[0] == "all"] or table.rows) for table in tables]
    where = f"Pooled over benchmarks. {PAGE_FILE} and {TABLE_FILE} have the figures of each benchmark."
    return [*(table.markdown() for table in pooled), where]


def _fitting(records: Sequence[Record]) -> Table:
    """tau on one target, with as many columns of K as the terminal has room for."""
    for max_ks in range(6, 1, -1):
        (table,) = tau_tables(records, max_ks=max_ks)
        if max(map(len, table.markdown().splitlines())) <= WIDTH:
            break
    return table


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line per row: nested fields under dotted names, lists as JSON, missing values empty."""
    flat = [flatten(row) for row in rows]
    names = distinct(name for row in flat for name in row)
    columns = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]  # a tree may be None
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _as_cell(value) for name, value in row.items()} for row in flat)


def _as_cell(value: Any) -> Any:
    """A text that a spreadsheet would run as a formula begins with an apostrophe instead."""
    return f"'{value}" if isinstance(value, str) and value != NONE and value.startswith(FORMULA) else value


def tau_below(result: Result, thresholds: dict[str, float]) -> list[str]:
    """One line for every missed threshold and for every failed or missing measurement.

    Args:
        result: acceptance.json.
        thresholds: minimum tau at the largest K by benchmark, for every draft and target; `all` pools the benchmarks.
    """
    records = at_largest_k([r for r in acceptance_records(result) if not r["temperature"]])
    misses = []
    for name, minimum in thresholds.items():
        mine = [r for r in records if name in (r["benchmark"], "all")]
        if not mine:
            misses.append(f"{name}: not measured, so tau is not known to be at least {minimum:.2f}")
        for (target, draft), found in grouped(mine, lambda r: (r["target"], label_of(r))).items():
            tau, k = pooled_tau(found), found[0]["num_draft_tokens"]
            if tau < minimum:
                misses.append(
                    f"{name}: draft {draft} on target {target}: tau {tau:.2f} at K={k} is below {minimum:.2f}"
                )
        failures = [f for f in result["failures"] if name == "all" or f["benchmark"] in (None, name)]
        failures = [f for f in failures if not any(all(f[kind] in (None, r[kind]) for kind in KINDS) for r in mine)]
        misses += [f"{name}: not measured: {failure_line(f)}" for f in failures]
    return misses
