"""What the page of a result shows: the words, panels and tables of each of its sections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pard_train.reports.charts import (
    Axes,
    Point,
    Series,
    bar_chart,
    interval_chart,
    line_chart,
    nice_top,
    swatch,
    thinned,
)
from pard_train.reports.records import (
    Record,
    Result,
    at_largest_k,
    distinct,
    groups_of,
    label_of,
    labels_of,
    live,
    measured,
    of_all_benchmarks,
    pooled_tau,
    with_interval,
)
from pard_train.reports.tables import Table, comparison_table, speed_table

GROUPS = {
    "category": "category of the prompt",
    "turn": "turn of the conversation",
    "prompt_length": "length of the prompt in tokens",
    "position": "position in the answer in tokens",
}
SPEEDUPS = ("speedup", "speedup_low", "speedup_high")  # older results have the first alone
Slots = dict[str, int]


@dataclass(frozen=True)
class Figure:
    """One panel with its caption, and a line of small print below."""

    caption: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: its name in links.
        link: its name in the list of sections; empty keeps it out.
        title, words: heading, and what is to be seen.
        labels: drafts that its legend names.
        slots: their colours and markers.
    """

    anchor: str
    link: str
    title: str
    words: str
    labels: Sequence[str]
    slots: Slots
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()

    @property
    def legend(self) -> list[tuple[str, Markup]]:
        """(name, mark) of every draft."""
        return [(label, swatch(self.slots[label])) for label in self.labels]


def build_sections(document: Result, predictions: list[dict[str, Any]]) -> list[Section]:
    """Every section that has something to show.

    Args:
        document: acceptance.json.
        predictions: predictions.json; may be empty.
    """
    records = measured(document)
    predictions = [p for p in predictions if p["rows"]]
    slots = assign_slots(document, predictions)
    sections = [_comparison(records, slots)]
    sections += [_tau_by_k(records, slots)] if len(distinct(r["num_draft_tokens"] for r in records)) > 1 else []
    sections += [_survival(at_largest_k(records), slots), _histogram(at_largest_k(records), slots)]
    sections += [_speed(live(document), slots)] if live(document) else []
    sections += [_predicted(predictions, slots)] if predictions else []
    sections += [_breakdown(at_largest_k(records), by, slots) for by in GROUPS]
    return [s for s in sections if s.figures]


def assign_slots(document: Result, predictions: list[dict[str, Any]]) -> Slots:
    """Colour and marker of every draft, the same on the whole page."""
    labels = labels_of(measured(document)) + [p["draft"] for p in predictions] + labels_of(live(document))
    return {label: slot for slot, label in enumerate(distinct(labels))}


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance
# ---------------------------------------------------------------------------------------------------------------------


def _comparison(records: list[Record], slots: Slots) -> Section:
    """Every draft on every benchmark, and over all of them, at the largest K."""
    figures, tables = [], []
    largest, labels = at_largest_k(records), labels_of(records)
    for target in distinct(r["target"] for r in largest):
        mine = [r for r in largest if r["target"] == target]
        rows = distinct(r["benchmark"] for r in mine)
        rows += ["all"] if len(rows) > 1 else []
        series = [Series(label, slots[label], _points_by_row(mine, label, rows)) for label in labels]
        chart = interval_chart(f"tau of every draft on {target}", rows, series, tau_scale(largest))
        figures.append(Figure(target, chart))
        tables.append(comparison_table(target, mine))
    words = "Mean accepted length tau at the largest K. Lines are 95% intervals; 1 is what a target does alone."
    return Section("drafts", "Drafts", "Drafts compared", words, labels, slots, figures, tables)


def tau_scale(records: Sequence[Record]) -> Axes:
    """The scale on which these records, or groups, are compared."""
    return Axes("", "tau", 1.0, max(1.1, *(r["tau_high"] for r in records)) * 1.01, baseline=1.0)


def _points_by_row(records: list[Record], label: str, rows: Sequence[str]) -> list[Point]:
    mine = {r["benchmark"]: r for r in records if label_of(r) == label}
    points = [tau_point(r, rows.index(name)) for name, r in mine.items()]
    if rows[-1] == "all" and (everywhere := of_all_benchmarks(records, label)):
        tau = pooled_tau(everywhere)
        points.append(Point(len(rows) - 1, tau, note=f"{tau:.2f} over all benchmarks"))
    return points


def tau_point(record: Record, x: float) -> Point:
    """tau with its interval at a place."""
    note = f"{with_interval(record)} at K={record['num_draft_tokens']}"
    return Point(x, record["tau"], record["tau_low"], record["tau_high"], note)


def _cells(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """(caption, records) of every benchmark and target."""
    cells: dict[str, list[Record]] = {}
    for r in records:
        cells.setdefault(f"{r['benchmark']} on {r['target']}", []).append(r)
    return list(cells.items())


def _panels(
    draw: Callable[[str, Sequence[Series], Axes], Markup],
    what: str,
    records: list[Record],
    slots: Slots,
    axes: Axes,
    points: Callable[[Record], list[Point]],
) -> list[Figure]:
    """One panel for every benchmark and target, with one series for every draft."""
    figures = []
    for name, mine in _cells(records):
        by_draft: dict[str, list[Point]] = {}
        for r in sorted(mine, key=lambda r: r["num_draft_tokens"]):
            by_draft.setdefault(label_of(r), []).extend(points(r))
        series = [Series(label, slots[label], by_draft[label]) for label in labels_of(mine)]
        figures.append(Figure(name, draw(f"{what}, {name}", series, axes)))
    return figures


def _tau_by_k(records: list[Record], slots: Slots) -> Section:
    title = "tau by number of draft tokens"
    ks = sorted(distinct(r["num_draft_tokens"] for r in records))
    axes = Axes("draft tokens K", "tau", 1.0, nice_top(max(r["tau_high"] for r in records), 1.0), thinned(ks))
    figures = _panels(line_chart, title, records, slots, axes, lambda r: [tau_point(r, r["num_draft_tokens"])])
    words = "How tau grows with the number of draft tokens. Bands are 95% intervals."
    return Section("k", "K", title, words, labels_of(records), slots, figures)


def _survival(records: list[Record], slots: Slots) -> Section:
    positions = range(1, max(r["num_draft_tokens"] for r in records) + 1)
    axes = Axes("draft position", "share of steps accepted", 0.0, 1.0, thinned(positions))

    def points(r: Record) -> list[Point]:
        rates = enumerate(r["survival"], start=1)
        return [Point(i, rate, note=f"position {i} accepted in {rate:.1%} of steps") for i, rate in rates]

    figures = _panels(line_chart, "acceptance by position", records, slots, axes, points)
    words = "Share of steps in which the draft token at each position is accepted, and so all before it."
    return Section("positions", "Positions", "Survival by position", words, labels_of(records), slots, figures)


def _histogram(records: list[Record], slots: Slots) -> Section:
    top = nice_top(max(max(r["histogram"]) / r["num_steps"] for r in records), 0.0)
    counts = range(max(r["num_draft_tokens"] for r in records) + 1)
    axes = Axes("accepted draft tokens", "share of steps", 0.0, top, thinned(counts))

    def points(r: Record) -> list[Point]:
        shares = enumerate(count / r["num_steps"] for count in r["histogram"])
        return [Point(a, share, note=f"{a} accepted in {share:.1%} of steps") for a, share in shares]

    figures = _panels(bar_chart, "histogram of accepted draft tokens", records, slots, axes, points)
    words = "How many draft tokens a step accepts. Bars stand in the order of the legend."
    return Section("histogram", "Per step", "Accepted per step", words, labels_of(records), slots, figures)


def _breakdown(records: list[Record], by: str, slots: Slots) -> Section:
    """tau of each group of one kind; no panel where a single group would be the whole again."""
    figures = []
    groups = [g for r in records for g in groups_of(r, by)]
    for name, mine in _cells(records):
        found = {label_of(r): groups_of(r, by) for r in mine}
        rows = distinct(g["name"] for several in found.values() for g in several)
        if len(rows) > 1:
            series = [
                Series(label, slots[label], [_group_point(g, rows.index(g["name"])) for g in several])
                for label, several in found.items()
            ]
            chart = interval_chart(f"tau by {GROUPS[by]}, {name}", rows, series, tau_scale(groups))
            figures.append(Figure(name, chart))
    return Section(by, "", f"By {GROUPS[by]}", "", labels_of(records), slots, figures)


def _group_point(group: dict[str, Any], row: int) -> Point:
    note = f"{with_interval(group)} over {group['num_tokens']} tokens"
    return Point(row, group["tau"], group["tau_low"], group["tau_high"], note)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def _speed(records: list[Record], slots: Slots) -> Section:
    """Measured speed, method beside method."""
    speedups = [r["speed"][name] for r in records for name in SPEEDUPS if name in r["speed"]]
    axes = Axes("", "speed-up", min(0.9, *speedups) * 0.98, max(1.1, *speedups) * 1.02, baseline=1.0)
    figures = []
    for name, found in _cells(records):
        mine = list({(label_of(r), r["batch_size"]): r for r in found}.values())
        rows = distinct(_batch_of(r) for r in mine)
        series = [
            Series(label, slots[label], [_speed_point(r, rows) for r in mine if label_of(r) == label])
            for label in labels_of(mine)
        ]
        figures.append(Figure(name, interval_chart(f"speed-up, {name}", rows, series, axes)))
    words = "Tokens per second over those of the target alone, on the same prompts. Lines span the rounds."
    targets = distinct(r["target"] for r in records)
    tables = [speed_table(f"target {t}", [r for r in records if r["target"] == t]) for t in targets]
    return Section("speed", "Speed", "Measured speed-up", words, labels_of(records), slots, figures, tables)


def _batch_of(record: Record) -> str:
    size = record["batch_size"] or 1
    return "one answer at a time" if size == 1 else f"{size} answers side by side"


def _speed_point(record: Record, rows: list[str]) -> Point:
    speed = record["speed"]
    note = f"{speed['tokens_per_second']:.1f} tokens/s, {speed['ar_tokens_per_second']:.1f} without draft"
    speedup, low, high = map(speed.get, SPEEDUPS)
    return Point(rows.index(_batch_of(record)), speedup, low, high, note)


def _predicted(predictions: list[dict[str, Any]], slots: Slots) -> Section:
    """Speed-up by K as latencies and acceptance foretell it."""
    ks = sorted(distinct(row["num_draft_tokens"] for p in predictions for row in p["rows"]))
    top = nice_top(max(row["speedup"] for p in predictions for row in p["rows"]), 0.0)
    axes = Axes("draft tokens K", "speed-up", 0.0, top, thinned(ks), baseline=1.0)
    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in predictions:
        panels.setdefault((p["target"], p["batch_size"], p["context_length"], p["device"]), []).append(p)
    figures = []
    for (target, batch_size, context, device), mine in panels.items():
        name = f"{target}, batch {batch_size}"
        series = [Series(p["draft"], slots[p["draft"]], _predicted_points(p)) for p in mine]
        best = ", ".join(f"{p['recommended_num_draft_tokens'] or 'none'} for {p['draft']}" for p in mine)
        note = f"Best K: {best}. {context} tokens of context on {device}."
        figures.append(Figure(name, line_chart(f"predicted speed-up, {name}", series, axes), note))
    words = (
        "From tau and the measured time of each forward pass. The ring marks the best K; none is not to draft at all."
    )
    labels = distinct(p["draft"] for p in predictions)
    return Section("prediction", "Prediction", "Predicted speed-up by K", words, labels, slots, figures)


def _predicted_points(prediction: dict[str, Any]) -> list[Point]:
    return [
        Point(
            row["num_draft_tokens"],
            row["speedup"],
            note=f"{row['speedup']:.2f}x at K={row['num_draft_tokens']}, tau {row['tau']:.2f}",
            is_marked=row["num_draft_tokens"] == prediction["recommended_num_draft_tokens"],
        )
        for row in prediction["rows"]
    ]
