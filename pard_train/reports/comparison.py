"""Comparison of several results: every later one against the first, row by row.

Rows are compared only if target weights, prompts, limits, precision and template are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pard_train.bootstrap import ratio_interval
from pard_train.errors import UserError
from pard_train.reports.curves import best_line, best_taus, read_runs, run_charts, runs_table
from pard_train.reports.records import (
    Record,
    Result,
    case_of,
    distinct,
    failure_line,
    grouped,
    label_of,
    read_predictions,
    read_result,
    speedup_text,
    with_interval,
)
from pard_train.reports.sections import Section, interval_charts, tau_cell
from pard_train.reports.tables import NONE, Table, as_markdown, prediction_table
from pard_train.reports.webpage import fill
from pard_train.runs import METRICS_FILE, flatten, run_of

COMPARISON_FILE = "compare.md"
COMPARISON_PAGE = "compare.html"
MEANING = (
    "tau [95% interval] of each result. The ratio is tau of the later result divided by tau of the first. Its interval "
    "is paired by prompt: the later draft accepts more if it lies above 1, and less if it lies below."
)
RUNS_MEANING = "Training runs over supervised tokens. The table names the settings in which they differ."
MEASURED = ("monitor.max_prompts", "monitor.max_new_tokens", "evaluate.benchmarks", "evaluate.system_prompt", "targets")
# Rows with an equal KEY measure the same thing; they are comparable if the fields of SAME are equal, too.
KEY = ("target", "benchmark", "num_draft_tokens", "mode", "estimator", "temperature", "method", "batch_size")
SAME = (
    *("target_fingerprint", "benchmark_fingerprint", "num_prompts", "max_new_tokens", "dtype", "top_p"),
    *("system_prompt", "template_kwargs", "prompt_template", "answer_dtype", "chat_template"),
)


@dataclass(frozen=True)
class Pair:
    """A row of a later result, which is named, and the row of the first result that measures the same."""

    name: str
    first: Record
    later: Record

    @property
    def ratio(self) -> float:
        """tau of the later result divided by tau of the first."""
        return self.later["tau"] / self.first["tau"]

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the ratio, paired by prompt; None where a result has no counts by prompt, or one."""
        counts = [np.array(record.get("prompt_counts") or ()) for record in (self.first, self.later)]
        return ratio_interval(*counts) if all(len(own) > 1 for own in counts) else None


@dataclass(frozen=True)
class Comparison:
    """The comparison of every later result with the first.

    Attributes:
        first: name of the first result.
        pairs: comparable rows.
        notes: rows that cannot be compared and why, one line each.
        missing: rows of the first result that a later one lacks, several in a line.
        predictions: of predictions.json; each draft with the name of its result.
    """

    first: str
    pairs: list[Pair]
    notes: list[str]
    missing: list[str]
    predictions: Sequence[dict[str, Any]] = ()

    @property
    def results(self) -> list[tuple[str, Record]]:
        """(name of the result, row) of all compared rows, those of the first result before the others."""
        named = [(self.first, p.first) for p in self.pairs] + [(p.name, p.later) for p in self.pairs]
        return list({(name, id(row)): (name, row) for name, row in named}.values())

    def name_of(self, pair: Pair) -> str:
        """Name of the later result, with the draft if the result has several."""
        drafts = distinct(p.later["draft"] for p in self.pairs if p.name == pair.name)
        return f"{pair.name}/{pair.later['draft']}" if len(drafts) > 1 else pair.name


@dataclass(frozen=True)
class Compared:
    """What recipes/compare.py prints and returns.

    Attributes:
        text: tables as Markdown.
        values: ratios to the first result by name.
        misses: one line for every ratio below min_ratio.
    """

    text: str
    values: dict[str, float]
    misses: list[str]


def compare(results: Mapping[str, str], folder: Path, *, min_ratio: float | None = None) -> Compared:
    """Compare every later result with the first; write compare.md and compare.html, which lists ratios below min_ratio.

    Args:
        results: by name, evaluation folders or acceptance.json files, or folders of training runs.
        folder: output folder.

    Raises:
        UserError: if a result cannot be read, or if no rows are comparable.
    """
    if any((Path(path) / METRICS_FILE).is_file() for path in results.values()):
        compared, page = _compare_runs(results, min_ratio)
    else:
        comparison = compare_results({name: read_result(Path(path)) for name, path in results.items()})
        if not comparison.pairs:
            raise UserError(f"nothing to compare: {'; '.join(comparison.notes)}")
        found = [(name, p) for name, path in results.items() for p in read_predictions(Path(path)) if p["rows"]]
        comparison = replace(comparison, predictions=[{**p, "draft": f"{name}: {p['draft']}"} for name, p in found])
        misses = ratios_below(comparison, min_ratio)
        compared = Compared(render_comparison(comparison), ratios(comparison), misses)
        page = render_comparison_page(comparison, misses)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPARISON_FILE).write_text(compared.text)
    (folder / COMPARISON_PAGE).write_text(page)
    return compared


def _compare_runs(results: Mapping[str, str], min_ratio: float | None) -> tuple[Compared, str]:
    """Training runs by their best mean tau, and a page with their curves."""
    runs = read_runs(results)
    first, *later = runs
    taus, origins = best_taus(runs), {name: run_of(Path(path)) for name, path in results.items()}
    asked = {n: flatten(run.get("config") or {}) for n, run in origins.items()}
    measured = {
        n: ({k for k in best_line(lines) or () if k.startswith("eval/tau")}, [asked[n].get(k) for k in MEASURED])
        for n, lines in runs.items()
    }
    known = [name for name in later if {first, name} <= taus.keys()]
    others = [n for n in known if measured[n] != measured[first]]
    notes = [f"{n}: tau is of other targets, prompts, limits or K than {first}'s" for n in others]
    values = {f"compare/{n}/best_tau": taus[n] / taus[first] for n in known if n not in others}
    least = min_ratio or 0.0
    misses = [
        f"{name}: best tau {taus[name]:.3f} is {value:.3f} of {taus[first]:.3f}, below {least:.3f}"
        for name in later
        if (value := values.get(f"compare/{name}/best_tau", least)) < least
    ]
    if min_ratio is not None:
        misses += [f"{name}: no measurement of tau" for name in runs if name not in taus] + notes
    table = runs_table(runs, asked)
    rows = [
        (name, run["run_id"], run["time"], str((run["git"] or {}).get("commit") or NONE)[:12], " ".join(run["command"]))
        for name, run in origins.items()
    ]
    made = Table(["run", "id", "time", "commit", "command"], rows, num_names=5)
    sections = [Section("runs", "", "Runs", "", [], [table]), *run_charts(runs)]
    page = fill("compare.html", sections, meaning=RUNS_MEANING, misses=misses, notes=notes, origins=made)
    return Compared(f"# Comparison\n\n{RUNS_MEANING}\n\n{table.markdown()}\n", values, misses), page


def compare_results(results: Mapping[str, Result]) -> Comparison:
    """Pair the rows of every later result with those of the first; results by name."""
    first, *later = results
    old = results[first]["records"]
    pairs: list[Pair] = []
    missing: list[str] = []
    notes = [f"{name}: not measured: {failure_line(f)}" for name, r in results.items() for f in r["failures"]]
    for name in later:
        found, reasons = _pair_up(name, old, results[name]["records"])
        pairs += found
        notes += [f"{name}: not compared: {reason}" for reason in distinct(reasons)]
        missing += [f"{name}: {rows}" for rows in _summarize(old, paired=[pair.first for pair in found])]
    return Comparison(first, pairs, notes, missing)


def _pair_up(name: str, old: list[Record], new: list[Record]) -> tuple[list[Pair], list[str]]:
    """Comparable rows, and why the others are not."""
    pairs, reasons = [], []
    seen: list[Record] = []
    for record in new:
        same_key = [r for r in old if all(r.get(field) == record.get(field) for field in KEY)]
        candidates = [r for r in same_key if r["draft"] == record["draft"]] or same_key
        seen += candidates
        if not candidates:
            reasons.append(f"{case_of(record)}, {record['mode']}: the first result has no such row")
        elif len(candidates) > 1:
            names = ", ".join(r["draft"] for r in candidates)
            reasons.append(f"{case_of(record)}: draft {record['draft']} could be compared with any of {names}")
        elif different := [field for field in SAME if _differs(field, candidates[0], record)]:
            found = [f"{field} is {record[field]!r}, not {candidates[0][field]!r}" for field in different]
            reasons.append(f"{case_of(record)}: {', '.join(found)}")
        else:
            pairs.append(Pair(name, candidates[0], record))
    return pairs, [*reasons, *(f"{rows}: this result has no such row" for rows in _summarize(old, paired=seen))]


def _differs(field: str, first: Record, later: Record) -> bool:
    """Whether two records have other values; a field that an older version did not write tells nothing."""
    return field in first and field in later and first[field] != later[field]


def _summarize(records: list[Record], *, paired: Sequence[Record]) -> list[str]:
    """The rows of a result that are not paired, in few lines: whole benchmarks, else draft, mode, K and benchmarks."""
    ids = set(map(id, paired))
    sizes, lost = (grouped(rows, case_of) for rows in (records, [r for r in records if id(r) not in ids]))
    whole = [case for case, mine in lost.items() if len(mine) == len(sizes[case])]
    rest = [r for case, mine in lost.items() if case not in whole for r in mine]
    lines: dict[str, list[str]] = {}
    for (rows, case), mine in grouped(rest, lambda r: (f"draft {r['draft']}, {_how(r)}", case_of(r))).items():
        ks = ", ".join(str(r["num_draft_tokens"]) for r in mine)
        lines.setdefault(f"{rows}, K={ks}", []).append(case)
    return [*whole, *(f"{rows}: {', '.join(cases)}" for rows, cases in lines.items())]


def _how(record: Record) -> str:
    """Mode, and the differences from greedy PARD decoding of one answer at a time."""
    parts = [record["mode"], record["method"] if record["method"] != "pard" else ""]
    parts += [f"T={record['temperature']:g}" if record["temperature"] else ""]
    parts += [f"batch {record['batch_size']}" if (record["batch_size"] or 1) > 1 else ""]
    return ", ".join(filter(None, parts))


def ratios(comparison: Comparison) -> dict[str, float]:
    """The ratio of every pair, by later result, case and K."""
    return {
        f"compare/{comparison.name_of(p)}/{r['target']}/{r['benchmark']}, {_how(r)}/k_{r['num_draft_tokens']}": p.ratio
        for p, r in ((pair, pair.later) for pair in comparison.pairs)
    }


def ratios_below(comparison: Comparison, min_ratio: float | None) -> list[str]:
    """One line for every pair below min_ratio and for the rows that a later result lacks; none without min_ratio."""
    if min_ratio is None:
        return []
    misses = [
        f"{comparison.name_of(p)}: {case_of(p.later)}, {_how(p.later)}, K={p.later['num_draft_tokens']}: tau "
        f"{p.later['tau']:.2f} is {p.ratio:.3f} of {p.first['tau']:.2f}, below {min_ratio:.3f}"
        for p in comparison.pairs
        if p.ratio < min_ratio
    ]
    return misses + [f"{rows}: not compared" for rows in comparison.missing]


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table for every later result and target."""
    header = ["benchmark", "measurement", "K", "ratio", comparison.first]
    caption = "predicted speed-up by batch size and K: tau and measured forward passes of each draft"
    predicted = [replace(prediction_table(comparison.predictions), caption=caption)] if comparison.predictions else []
    pairs = grouped(comparison.pairs, lambda p: (p.name, p.later["target"]))
    return [
        Table(
            [*header, name, "speed-up"],
            [_pair_row(pair, with_draft=len(distinct(p.later["draft"] for p in mine)) > 1) for pair in mine],
            num_names=2,
            caption=f"{name} compared with {comparison.first} on target {target}",
        )
        for (name, target), mine in pairs.items()
    ] + predicted


def _pair_row(pair: Pair, *, with_draft: bool) -> list[str]:
    draft = f"{pair.later['draft']}, " if with_draft else ""
    speeds = [speedup_text(record) for record in (pair.first, pair.later)]
    return [
        *(pair.later["benchmark"], draft + _how(pair.later), str(pair.later["num_draft_tokens"])),
        f"{pair.ratio:.3f}" + (" [{:.3f}, {:.3f}]".format(*pair.interval) if pair.interval else ""),
        *(with_interval(pair.first), with_interval(pair.later)),
        " to ".join(speeds) if {*speeds} != {NONE} else NONE,
    ]


def render_comparison(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    parts = ["# Comparison", MEANING, *(table.markdown() for table in comparison_tables(comparison))]
    parts += ["\n".join(f"- {as_markdown(note)}" for note in comparison.notes)] if comparison.notes else []
    return "\n\n".join(parts) + "\n"


def render_comparison_page(comparison: Comparison, misses: list[str]) -> str:
    """The comparison as a page; misses are the lines of `ratios_below`."""
    notes, origins = comparison.notes, _origins(comparison)
    return fill("compare.html", [_section(comparison)], meaning=MEANING, misses=misses, notes=notes, origins=origins)


def _section(comparison: Comparison) -> Section:
    """tau of every result at the largest K, one chart per target, and the tables."""
    results = [(name, r) for name, r in comparison.results if r["mode"] != "live"] or comparison.results
    k = max(r["num_draft_tokens"] for _, r in results)
    shown = [(name, r) for name, r in results if r["num_draft_tokens"] == k]
    labels = distinct((name, label_of(r)) for name, r in shown)
    has_several = len(labels) > len(dict(labels))
    cells = {
        target: [tau_cell(r["benchmark"], f"{name}: {label_of(r)}" if has_several else name, r) for name, r in mine]
        for target, mine in grouped(shown, lambda named: named[1]["target"]).items()
    }
    text = f"Mean accepted length tau at K={k}, with 95% intervals."
    return Section("results", "", "tau by result", text, interval_charts(cells), comparison_tables(comparison))


def _origins(comparison: Comparison) -> Table:
    """Draft, fingerprint, time, commit and command of every result."""
    rows = []
    for name, r in comparison.results:
        provenance = flatten(r["provenance"])
        commit = str(provenance.get("git.commit") or NONE)[:12]
        rows.append((name, r["draft"], r["draft_fingerprint"], provenance["time"], commit, provenance["command"]))
    return Table(["result", "draft", "fingerprint", "time", "commit", "command"], distinct(rows), num_names=6)
