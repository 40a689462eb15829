"""Tables and a chart of load.json: measured and predicted speed by concurrency and K, and K for the load."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pard_train.reports.charts import Chart, Point, write_png
from pard_train.reports.records import SLOW_BASELINE, grouped
from pard_train.reports.tables import NONE, Table

LOAD_PAGE, LOAD_PICTURE = "load.md", "load.png"
WIDTH = 120


def measured_cells(result: Mapping[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """Medians over rounds by (concurrency, K); the speed-up is the ratio within a round."""
    runs = grouped(result["runs"], lambda run: (run["concurrency"], run["num_draft_tokens"]))
    plain = {
        (r["concurrency"], r["round"]): r["tokens_per_second"] for r in result["runs"] if not r["num_draft_tokens"]
    }
    cells = {}
    for key, mine in runs.items():
        ratios = [run["tokens_per_second"] / plain[key[0], run["round"]] for run in mine]
        names = ("tokens_per_second", "first_token_seconds", "token_seconds", "vllm_tau")
        cells[key] = {name: statistics.median(run[name] for run in mine) for name in names} | {
            "speedup": statistics.median(ratios),
            "speedup_low": min(ratios),
            "speedup_high": max(ratios),
            "num_identical": sum(run["num_identical"] for run in mine),
            "num_texts": sum(run["num_texts"] for run in mine),
        }
    return dict(sorted(cells.items()))


def load_tables(result: Mapping[str, Any]) -> list[Table]:
    """Measurement, prediction against measurement, and the best K by concurrency."""
    return [_measured(result), _predicted(result), _best(result)]


def _measured(result: Mapping[str, Any]) -> Table:
    header = ["clients", "K", "tokens/s", "speed-up", "range", "first token", "between tokens", "vLLM tau", "identical"]
    rows = []
    for (concurrency, k), cell in measured_cells(result).items():
        flag = " (!)" * (k > 0 and cell["speedup"] > cell["vllm_tau"])
        rows.append(
            [
                *(str(concurrency), str(k or "none"), f"{cell['tokens_per_second']:.1f}"),
                *(f"{cell['speedup']:.2f}x{flag}", f"{cell['speedup_low']:.2f} to {cell['speedup_high']:.2f}"),
                *(f"{cell['first_token_seconds']:.2f} s", f"{1000 * cell['token_seconds']:.0f} ms"),
                *(f"{cell['vllm_tau']:.2f}", f"{cell['num_identical']} of {cell['num_texts']}"),
            ]
        )
    return Table(header, rows, num_names=2, caption="measured")


def _predicted(result: Mapping[str, Any]) -> Table:
    header = ["clients", "K", "vLLM tau", "step", "tokens/s", "measured", "error", "speed-up", "measured", "error"]
    cells, rows = measured_cells(result), []
    for row in result["predictions"]:
        cell = cells.get((row["concurrency"], row["num_draft_tokens"]))
        rows.append([str(row["concurrency"]), str(row["num_draft_tokens"] or "none"), f"{row['vllm_tau']:.2f}"])
        rows[-1].append(f"{1000 * row['step_seconds']:.0f} ms{' (between)' * row['is_interpolated']}")
        for name, form in (("tokens_per_second", "{:.1f}"), ("speedup", "{:.2f}x")):
            rows[-1].append(form.format(row[name]))
            rows[-1] += [form.format(cell[name]), f"{row[name] / cell[name] - 1:+.0%}"] if cell else [NONE, NONE]
    return Table(header, rows, num_names=2, caption="predicted from replay and the time of a step, and measured")


def _best(result: Mapping[str, Any]) -> Table:
    best = [row for row in result["predictions"] if row["is_best"]]
    rows = [[str(r["concurrency"]), str(r["num_draft_tokens"] or "no draft"), f"{r['speedup']:.2f}x"] for r in best]
    return Table(["clients", "best K", "predicted speed-up"], rows, num_names=2, caption="K for the load")


def load_charts(result: Mapping[str, Any]) -> list[Chart]:
    """Speed-up by K, one chart per concurrency, predicted and measured."""
    cells = measured_cells(result)
    charts = []
    highest = max([*(row["speedup"] for row in result["predictions"]), *(c["speedup_high"] for c in cells.values())])
    for concurrency, mine in grouped(result["predictions"], lambda row: row["concurrency"]).items():
        predicted = [
            Point(r["num_draft_tokens"], r["speedup"], is_marked=r["is_best"]) for r in mine if r["num_draft_tokens"]
        ]
        measured = [
            Point(k, cell["speedup"], cell["speedup_low"], cell["speedup_high"])
            for (b, k), cell in cells.items()
            if b == concurrency and k
        ]
        charts.append(
            Chart(
                title=f"{concurrency} clients",
                kind="line",
                series={"predicted": predicted, "measured": measured},
                limits=(0, 1.05 * highest),
                x_label="draft tokens K",
                y_label="speed-up",
                ticks=[point.x for point in predicted],
                baseline=1.0,
            )
        )
    return charts


def render_load(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    draft, target = (Path(result[name]).name for name in ("draft", "target"))
    head = f"# {draft} for {target} under load in vLLM {result['engine_version']}, {result['dtype']}"
    tables = [table.markdown() for table in load_tables(result)]
    is_slow = any(c["speedup"] > c["vllm_tau"] for (_, k), c in measured_cells(result).items() if k)
    parts = [head, *tables, *[textwrap.fill(SLOW_BASELINE, WIDTH)] * is_slow]
    for name, schedule in result["schedules"].items():
        values = {key: value for key, value in schedule.items() if key != "warning"}
        parts += [f"{name}: `{json.dumps(values)}`", *filter(None, [schedule.get("warning")])]
    return "\n\n".join(parts) + "\n"


def write_load(result: Mapping[str, Any], folder: Path) -> None:
    """Write load.md and load.png."""
    (folder / LOAD_PAGE).write_text(f"{render_load(result)}\n![speed-up by K]({LOAD_PICTURE})\n")
    write_png([load_charts(result)], folder / LOAD_PICTURE)
