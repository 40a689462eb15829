"""The sections of the page: which charts and tables of a result it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pard_train.reports.charts import Chart, Point
from pard_train.reports.records import (
    SLOW_BASELINE,
    Record,
    Result,
    acceptance_records,
    at_largest_k,
    case_of,
    distinct,
    grouped,
    groups_of,
    has_slow_baseline,
    label_of,
    pooled_by_label,
    pooled_interval,
    pooled_tau,
    timed_records,
)
from pard_train.reports.tables import Table, prediction_table, speed_tables, tau_tables

GROUPS = {
    "category": "prompt category",
    "turn": "conversation turn",
    "prompt_length": "prompt length in tokens",
    "position": "position in the answer in tokens",
    "context": "place in the context in tokens",
}
TAU = ("tau", "tau_low", "tau_high")
SPEEDUP = ("speedup", "speedup_low", "speedup_high")  # early results have the first alone
Cell = tuple[str, str, list[Any]]  # row, series, and the value with the ends of its interval, which may be None


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        anchor: its id in links.
        link: its name in the navigation; may be empty.
        text: how to read the charts.
    """

    anchor: str
    link: str
    title: str
    text: str
    charts: Sequence[Chart]
    tables: Sequence[Table] = ()


def build_sections(result: Result, predictions: Sequence[dict[str, Any]] = ()) -> list[Section]:
    """Every section of acceptance.json and predictions.json that has a chart."""
    records = acceptance_records(result)
    largest = at_largest_k(records)
    sections = [_tau(records, largest), _tau_by_k(records), *_per_step(largest)]
    sections += [_speed(timed_records(result)), _predicted([p for p in predictions if p["rows"]])]
    sections += [_breakdown(largest, by) for by in GROUPS]
    return [section for section in sections if section.charts]


def interval_charts(cells: Mapping[str, Sequence[Cell]], *, y_label: str = "tau") -> list[Chart]:
    """Charts of intervals by title, on a common scale with a baseline at 1."""
    values = [value for mine in cells.values() for _, _, found in mine for value in found if value is not None]
    low, high = min([1.0, *values]), max([1.1, *values])
    margin = 0.03 * (high - low)
    limits = (low - margin if low < 1 else low, high + margin)
    return [_interval_chart(title, mine, limits, y_label) for title, mine in cells.items()]


def _interval_chart(title: str, cells: Sequence[Cell], limits: tuple[float, float], y_label: str) -> Chart:
    rows = distinct(row for row, _, _ in cells)
    by_name = grouped(cells, lambda cell: cell[1])
    series = {name: [Point(rows.index(row), *v) for row, _, v in mine] for name, mine in by_name.items()}
    return Chart(title, "interval", series, limits, y_label, baseline=1.0, rows=rows)


def tau_cell(row: str, label: str, record: dict[str, Any]) -> Cell:
    """tau of a record or group."""
    return row, label, [record[name] for name in TAU]


def _charts(
    records: Sequence[Record],
    points: Callable[[Record], list[Point]],
    *,
    low: float = 0.0,
    title: Callable[[Record], str] = case_of,
    name: Callable[[Record], str] = label_of,
    **axes: Any,
) -> list[Chart]:
    """One chart per title with one series per name, all on a common scale that starts at low."""
    everything = [p for r in records for p in points(r)]
    ticks = sorted({p.x for p in everything})
    limits = (low, low + (1.05 * (max((p.high or p.y for p in everything), default=low) - low) or 1.0))
    charts = []
    for case, mine in grouped(records, title).items():
        found = {label: [p for r in several for p in points(r)] for label, several in grouped(mine, name).items()}
        series = {label: sorted(several, key=lambda p: p.x) for label, several in found.items()}
        charts.append(Chart(title=case, series=series, limits=limits, ticks=ticks, **axes))
    return charts


def _tau(records: list[Record], largest: list[Record]) -> Section:
    cells = {}
    for target, mine in grouped(largest, itemgetter("target")).items():
        cells[target] = [tau_cell(r["benchmark"], label_of(r), r) for r in mine]
        if len(distinct(r["benchmark"] for r in mine)) > 1:
            pooled = pooled_by_label(mine).items()
            cells[target] += [("all", label, [pooled_tau(found), *pooled_interval(found)]) for label, found in pooled]
    text = "Mean accepted length at the largest K, with 95% intervals. Without a draft it is 1."
    return Section("drafts", "tau", "tau by draft and benchmark", text, interval_charts(cells), tau_tables(records))


def _tau_by_k(records: list[Record]) -> Section:
    def _point(r: Record) -> list[Point]:
        return [Point(r["num_draft_tokens"], *(r[name] for name in TAU))]

    shown = records if len(distinct(r["num_draft_tokens"] for r in records)) > 1 else []
    charts = _charts(shown, _point, low=1.0, kind="line", x_label="draft tokens K", y_label="tau")
    return Section("k", "K", "tau by number of draft tokens", "Bands are 95% intervals.", charts)


def _per_step(records: list[Record]) -> list[Section]:
    def _survival(r: Record) -> list[Point]:
        return [Point(position, share) for position, share in enumerate(r["survival"], start=1)]

    def _histogram(r: Record) -> list[Point]:
        return [Point(accepted, count / r["num_steps"]) for accepted, count in enumerate(r["histogram"])]

    text = "Share of steps that accept the draft tokens up to each position."
    charts = _charts(records, _survival, kind="line", x_label="draft position", y_label="survival")
    sections = [Section("positions", "Survival", "Survival by draft position", text, charts)]
    text = "Share of steps by number of accepted draft tokens. Bars follow the order of the legend."
    charts = _charts(records, _histogram, kind="bar", x_label="accepted draft tokens", y_label="share of steps")
    return [*sections, Section("histogram", "Histogram", "Accepted draft tokens per step", text, charts)]


def _breakdown(records: list[Record], by: str) -> Section:
    """tau of each group of one kind; no chart where a single group would repeat the whole."""
    cells = {
        case: [tau_cell(g["name"], label_of(r), g) for r in mine for g in groups_of(r, by)]
        for case, mine in grouped(records, case_of).items()
    }
    cells = {case: mine for case, mine in cells.items() if len(distinct(row for row, _, _ in mine)) > 1}
    return Section(by, "", f"tau by {GROUPS[by]}", "", interval_charts(cells))


def _speed(records: list[Record]) -> Section:
    cells = {}
    for case, mine in grouped(records, case_of).items():
        by_row = {
            (f"batch size {r['batch_size'] or 1}{' (!)' * has_slow_baseline(r)}", label_of(r)): r["speed"] for r in mine
        }
        cells[case] = [(row, label, [*map(speed.get, SPEEDUP)]) for (row, label), speed in by_row.items()]
    text = "Tokens per second relative to the target alone on the same prompts. Lines show the range over rounds."
    text += f" {SLOW_BASELINE}" * any(map(has_slow_baseline, records))
    charts = interval_charts(cells, y_label="speed-up")
    return Section("speed", "Speed", "Measured speed-up", text, charts, speed_tables(records))


def _predicted(predictions: list[dict[str, Any]]) -> Section:
    def _points(p: dict[str, Any]) -> list[Point]:
        best = p["recommended_num_draft_tokens"]
        found = [(row["num_draft_tokens"], row["speedup"]) for row in p["rows"]]
        return [Point(k, speedup, is_marked=k == best) for k, speedup in found]

    def _title(p: dict[str, Any]) -> str:
        return f"{p['target']}, batch size {p['batch_size']}, {p['context_length']} tokens of context, {p['device']}"

    axes: dict[str, Any] = {"kind": "line", "x_label": "draft tokens K", "y_label": "speed-up", "baseline": 1.0}
    charts = _charts(predictions, _points, title=_title, name=itemgetter("draft"), **axes)
    text = "Computed from tau and the measured time of each forward pass. A ring marks the best K."
    tables = [prediction_table(predictions)] if predictions else []
    return Section("prediction", "Prediction", "Predicted speed-up by K", text, charts, tables)
