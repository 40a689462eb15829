"""Comparison: two or more results side by side, and whether the newer ones hold.

Only like is compared with like: same target weights, prompts, limits, precision and template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pard_train.errors import UserError
from pard_train.reports.charts import Point, Series, interval_chart
from pard_train.reports.records import Record, Result, distinct, flatten, read_result, with_interval
from pard_train.reports.report import failure_line
from pard_train.reports.sections import Figure, Section, tau_point, tau_scale
from pard_train.reports.tables import NONE, Table, to_markdown
from pard_train.reports.webpage import fill

COMPARISON_FILE = "compare.md"
COMPARISON_PAGE = "compare.html"
MEANING = "tau [95% interval] of each result; ratio is the later one's tau over the first one's."
# What names a measurement, and what must be equal besides for two of them to be comparable.
KEY = ("target", "benchmark", "num_draft_tokens", "mode", "estimator", "temperature", "method", "batch_size")
SAME = (
    *("target_fingerprint", "benchmark_fingerprint", "num_prompts", "max_new_tokens", "dtype", "top_p"),
    *("system_prompt", "template_kwargs", "prompt_template"),
)


@dataclass(frozen=True)
class Pair:
    """A measurement of a later result beside that of the first one."""

    name: str
    first: Record
    later: Record

    @property
    def ratio(self) -> float:
        """tau of the later result over that of the first."""
        return self.later["tau"] / self.first["tau"]

    @property
    def is_apart(self) -> bool:
        """Whether the two intervals have nothing in common."""
        return self.first["tau_high"] < self.later["tau_low"] or self.later["tau_high"] < self.first["tau_low"]


@dataclass(frozen=True)
class Comparison:
    """What came of comparing every later result with the first one.

    Attributes:
        first: name of the first result.
        pairs: what could be compared.
        notes: what could not and why, one line each.
        missing: rows of the first result that have no pair in a later one, which is named; several in a line.
    """

    first: str
    pairs: list[Pair]
    notes: list[str]
    missing: list[str]


def compare(results: Mapping[str, str], folder: Path, *, min_ratio: float | None = None) -> Comparison:
    """Compare every later result with the first; write compare.md and compare.html.

    Args:
        results: evaluation folder or acceptance.json by name.
        folder: output folder.
        min_ratio: a page names the pairs whose tau ratio is below it.

    Raises:
        UserError: if a result cannot be read, or nothing in them is comparable.
    """
    comparison = compare_documents({name: read_result(Path(path)) for name, path in results.items()})
    if not comparison.pairs:
        raise UserError(f"nothing to compare: {'; '.join(comparison.notes)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPARISON_FILE).write_text(render_comparison(comparison))
    (folder / COMPARISON_PAGE).write_text(render_comparison_page(comparison, ratios_below(comparison, min_ratio)))
    return comparison


def compare_documents(documents: dict[str, Result]) -> Comparison:
    """Pair the rows of every later result with those of the first.

    Args:
        documents: acceptance.json by name, oldest first.
    """
    first, *later = documents
    old = documents[first]["records"]
    pairs: list[Pair] = []
    missing: list[str] = []
    notes = [f"{name}: not measured: {failure_line(f)}" for name, d in documents.items() for f in d["failures"]]
    for name in later:
        found, reasons = _pair_up(old, documents[name]["records"])
        pairs += [Pair(name, record, new) for record, new in found]
        notes += [f"{name}: not compared: {reason}" for reason in distinct(reasons)]
        missing += [f"{name}: {rows}" for rows in _in_short(_without(old, [record for record, _ in found]), old)]
    return Comparison(first, pairs, notes, missing)


def _case(record: Record) -> tuple[str, str]:
    return record["target"], record["benchmark"]


def _pair_up(old: list[Record], new: list[Record]) -> tuple[list[tuple[Record, Record]], list[str]]:
    """(pairs, why the rest has none)."""
    pairs, reasons = [], []
    beside: list[Record] = []  # what the rows of `new` could stand beside
    for record in new:
        same_key = [r for r in old if all(r.get(name) == record.get(name) for name in KEY)]
        candidates = [r for r in same_key if r["draft"] == record["draft"]] or same_key
        beside += candidates
        where = f"{record['benchmark']} on {record['target']}"
        if not candidates:
            reasons.append(f"{where}, {record['mode']}: the first result has no such row")
        elif len(candidates) > 1:
            names = ", ".join(r["draft"] for r in candidates)
            reasons.append(f"{where}: draft {record['draft']} could stand beside any of {names}")
        elif different := list(_differences(candidates[0], record)):
            reasons.append(f"{where}: {', '.join(different)}")
        else:
            pairs.append((candidates[0], record))
    return pairs, reasons + [f"{rows}: this result has no such row" for rows in _in_short(_without(old, beside), old)]


def _without(records: list[Record], others: list[Record]) -> list[Record]:
    names = set(map(id, others))
    return [record for record in records if id(record) not in names]


def _in_short(some: list[Record], of: list[Record]) -> list[str]:
    """Some rows of a result in few lines: a benchmark of which they are all, else a draft and where it has which K."""
    mine, number = Counter(map(_case, some)), Counter(map(_case, of))
    lines = [
        f"{benchmark} on {target}" for target, benchmark in mine if mine[target, benchmark] == number[target, benchmark]
    ]
    ks: dict[tuple[str, str], list[str]] = {}
    for r in some:
        if mine[_case(r)] < number[_case(r)]:
            row = f"draft {r['draft']}, {_how(r)}", f"{r['benchmark']} on {r['target']}"
            ks.setdefault(row, []).append(str(r["num_draft_tokens"]))
    places: dict[str, list[str]] = {}
    for (draft, place), values in ks.items():
        places.setdefault(f"{draft}, K={', '.join(values)}", []).append(place)
    return lines + [f"{draft}: {', '.join(found)}" for draft, found in places.items()]


def _differences(old: Record, new: Record) -> Iterator[str]:
    for name in SAME:
        if old[name] != new[name]:
            yield f"{name} is {new[name]!r}, not {old[name]!r}"


def ratios_below(comparison: Comparison, min_ratio: float | None) -> list[str]:
    """One line for every pair below min_ratio, and for what the first result measured and a later one did not."""
    if min_ratio is None:
        return []
    misses = [
        f"{pair.name}: {_row_name(pair.later)}: tau {pair.later['tau']:.2f} is {pair.ratio:.3f} of "
        f"{pair.first['tau']:.2f}, below {min_ratio:.3f}"
        for pair in comparison.pairs
        if pair.ratio < min_ratio
    ]
    return misses + [f"{rows}: not compared" for rows in comparison.missing]


def _row_name(record: Record) -> str:
    return f"{record['benchmark']} on {record['target']}, {_how(record)}, K={record['num_draft_tokens']}"


def _how(record: Record) -> str:
    """Mode, and what differs from greedy PARD decoding one answer at a time."""
    parts = [record["mode"], record.get("estimator", ""), record["method"] if record["method"] != "pard" else ""]
    parts += [f"T={record['temperature']:g}" if record["temperature"] else ""]
    parts += [f"batch {record['batch_size']}" if (record["batch_size"] or 1) > 1 else ""]
    return ", ".join(part for part in parts if part)


# ---------------------------------------------------------------------------------------------------------------------
# As people read it
# ---------------------------------------------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table for every later result and target."""
    tables = []
    for name, target in distinct((pair.name, pair.later["target"]) for pair in comparison.pairs):
        mine = [p for p in comparison.pairs if (p.name, p.later["target"]) == (name, target)]
        has_several = len(distinct(p.later["draft"] for p in mine)) > 1
        rows = [_pair_row(pair, with_draft=has_several) for pair in mine]
        header = ["benchmark", "how", "K", "ratio", comparison.first, name, "intervals", "speed-up"]
        tables.append(Table(header, rows, num_names=2, caption=f"{name} beside {comparison.first}, target {target}"))
    return tables


def _pair_row(pair: Pair, *, with_draft: bool) -> list[str]:
    draft = f"{pair.later['draft']}, " if with_draft else ""
    speeds = [record.get("speed") for record in (pair.first, pair.later)]
    return [
        *(pair.later["benchmark"], draft + _how(pair.later), str(pair.later["num_draft_tokens"])),
        *(f"{pair.ratio:.3f}", with_interval(pair.first), with_interval(pair.later)),
        "apart" if pair.is_apart else "overlap",
        " to ".join(f"{speed['speedup']:.2f}x" if speed else NONE for speed in speeds) if any(speeds) else NONE,
    ]


def render_comparison(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    parts = ["# Comparison", MEANING, *(to_markdown(table) for table in comparison_tables(comparison))]
    if comparison.notes:
        parts += ["\n".join(f"- {note}" for note in comparison.notes)]
    return "\n\n".join(parts) + "\n"


def render_comparison_page(comparison: Comparison, misses: list[str]) -> str:
    """The comparison as a page of its own, the misses of min_ratio at its top."""
    return fill(
        "compare.html",
        meaning=MEANING,
        misses=misses,
        notes=comparison.notes,
        section=_section(comparison),
        origins=_origins(comparison),
    )


def _section(comparison: Comparison) -> Section:
    """tau of every result at the largest K, one panel for every target, then the tables."""
    pairs = [p for p in comparison.pairs if p.later["mode"] != "live"] or comparison.pairs
    k = max(p.later["num_draft_tokens"] for p in pairs)
    shown = [p for p in pairs if p.later["num_draft_tokens"] == k]
    results = [(comparison.first, p.first) for p in shown] + [(p.name, p.later) for p in shown]
    has_several = len(distinct((name, r["draft"]) for name, r in results)) > len(distinct(name for name, _ in results))
    by_label: dict[str, list[Record]] = {}
    for name, r in results:
        by_label.setdefault(f"{name}, {r['draft']}" if has_several else name, []).append(r)
    slots = {label: slot for slot, label in enumerate(by_label)}
    figures = []
    for target in distinct(r["target"] for _, r in results):
        rows = distinct(r["benchmark"] for _, r in results if r["target"] == target)
        series = [Series(label, slots[label], _points(mine, target, rows)) for label, mine in by_label.items()]
        axes = tau_scale([r for _, r in results])
        figures.append(Figure(target, interval_chart(f"tau of every result on {target}", rows, series, axes)))
    words = f"Mean accepted length tau at K={k}, with 95% intervals."
    return Section("results", "", "Results", words, list(slots), slots, figures, comparison_tables(comparison))


def _points(records: list[Record], target: str, rows: list[str]) -> list[Point]:
    by_row = {rows.index(r["benchmark"]): r for r in records if r["target"] == target}
    return [tau_point(r, row) for row, r in by_row.items()]


def _origins(comparison: Comparison) -> Table:
    """What every result was made of and by."""
    results = [(comparison.first, p.first) for p in comparison.pairs] + [(p.name, p.later) for p in comparison.pairs]
    rows = []
    for name, r in results:
        made_by = flatten(r["provenance"])
        commit = str(made_by.get("git.commit") or NONE)[:12]
        rows.append((name, r["draft"], r["draft_fingerprint"], made_by["time"], commit, made_by["command"]))
    return Table(["result", "draft", "fingerprint", "made", "commit", "command"], distinct(rows), num_names=6)
