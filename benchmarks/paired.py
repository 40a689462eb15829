"""Compares the drafts of one evaluation, paired by prompt: tau over all benchmarks, and its ratio to the first draft.

    python recipes/evaluate.py ... drafts.reference=... drafts.mine=... output_dir=outputs/evaluation
    python benchmarks/paired.py outputs/evaluation reference mine --k 1 8 --record benchmarks/results/NAME.json
    python benchmarks/paired.py outputs/evaluation default --k 1 8 --picture NAME.png \\
        --chart "learning rate=half_rate:1.5e-4,double_rate:6e-4"

A name stands for its seeds, too: `slow` is slow-1 and slow-2 together. Intervals are 95%, by bootstrap over prompts.
They say nothing about seeds. The record has tau by benchmark, too.
"""

from __future__ import annotations

import argparse
import json
import re
from operator import itemgetter
from pathlib import Path
from typing import Any

from pard_train.evaluation.study import compared, pooled_counts, tau_of
from pard_train.reports.charts import write_png
from pard_train.reports.records import grouped
from pard_train.reports.sections import interval_charts


def main() -> None:
    """Print the table; write the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="output folder of recipes/evaluate.py")
    parser.add_argument("drafts", nargs="+", help="names of drafts; the others are compared with the first")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--record", type=Path, help="JSON file for the table and the evaluation's settings")
    parser.add_argument("--chart", nargs="+", default=[], metavar="TITLE=DRAFT:LABEL,...", help="of the picture")
    parser.add_argument("--picture", type=Path, help="PNG file for the charts: ratios to the first draft")
    arguments = parser.parse_args()
    charts = {title: labels_of(drawn) for title, drawn in (chart.split("=", 1) for chart in arguments.chart)}
    drafts = list(dict.fromkeys([*arguments.drafts, *(name for labels in charts.values() for name in labels)]))
    rows = compare(arguments.evaluation, drafts, arguments.k)
    print("| target | K | draft | seeds | tau | ratio |\n| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["interval"]
        ratio = "" if row["draft"] == drafts[0] else f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {row['target']} | {row['k']} | {row['draft']} | {row['seeds']} | {row['tau']:.2f} | {ratio} |")
    if arguments.record:
        settings = json.loads((arguments.evaluation / "config.json").read_text())
        kept = {name: settings[name] for name in ("drafts", "targets", "benchmarks", "max_new_tokens", "dtype")}
        arguments.record.write_text(json.dumps({"evaluation": kept, "rows": rows}, indent=1) + "\n")
    if arguments.picture:
        cells = {
            title: [
                (label, f"K = {row['k']}", [row["ratio"], *row["interval"]])
                for name, label in labels.items()
                for row in rows
                if row["draft"] == name
            ]
            for title, labels in charts.items()
        }
        write_png([interval_charts(cells, y_label=f"ratio of tau to {drafts[0]}")], arguments.picture)


def labels_of(drawn: str) -> dict[str, str]:
    """Labels by name of draft.

    >>> labels_of("k4:K 4,k3")
    {'k4': 'K 4', 'k3': 'k3'}
    """
    return {name: label or name for name, _, label in (draft.partition(":") for draft in drawn.split(","))}


def compare(evaluation: Path, drafts: list[str], ks: list[int]) -> list[dict[str, Any]]:
    """Rows of the table: tau of every draft, and its ratio to the first one, by target and K."""
    result = json.loads((evaluation / "acceptance.json").read_text())
    records = [r for r in result["records"] if r["mode"] == "replay" and not r["temperature"]]
    evaluated = dict.fromkeys(r["draft"] for r in records)
    seeds = {name: [d for d in evaluated if re.fullmatch(rf"{re.escape(name)}(-\d+)?", d)] for name in drafts}
    if unknown := [name for name, found in seeds.items() if not found]:
        raise SystemExit(f"{evaluation} has no draft {', '.join(unknown)}: it has {', '.join(evaluated)}")
    rows = []
    for target in dict.fromkeys(r["target"] for r in records):
        for k in ks:
            mine = [r for r in records if (r["target"], r["num_draft_tokens"]) == (target, k)]
            counts = {name: pooled_counts(mine, names) for name, names in seeds.items()}
            for name, own in counts.items():
                ratio, low, high = compared(counts[drafts[0]], own)
                row = {"target": target, "k": k, "draft": name, "seeds": len(seeds[name]), "prompts": len(own)}
                numbers = {"tau": round(tau_of(own), 3), "ratio": round(ratio, 3)}
                numbers["interval"] = [round(low, 3), round(high, 3)]
                numbers["by_benchmark"] = {
                    benchmark: round(tau_of(pooled_counts(same, seeds[name])), 3)
                    for benchmark, same in grouped(mine, itemgetter("benchmark")).items()
                }
                rows.append(row | numbers)
    return rows


if __name__ == "__main__":
    main()
