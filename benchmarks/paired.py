"""Compares the drafts of one evaluation, paired by prompt: tau over all benchmarks, and its ratio to the first draft.

    python recipes/evaluate.py ... drafts.reference=... drafts.mine=... output_dir=outputs/evaluation
    python benchmarks/paired.py outputs/evaluation reference mine --k 1 8 --record benchmarks/results/NAME.json

A name stands for its seeds, too: `slow` is slow-1 and slow-2 together. Intervals are 95%, by bootstrap over prompts.
They say nothing about seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from pard_train.bootstrap import ratio_interval


def counts(records: list[dict[str, Any]], target: str, draft: str, k: int) -> np.ndarray:
    """Tokens and target passes of every prompt of all benchmarks, summed over the draft's seeds: [P, 2]."""
    found: dict[str, list[Any]] = {}
    for r in records:
        if (r["target"], r["num_draft_tokens"]) == (target, k) and re.fullmatch(
            rf"{re.escape(draft)}(-\d+)?", r["draft"]
        ):
            found.setdefault(r["benchmark"], []).append(r["prompt_counts"])
    return np.concatenate([np.sum(found[benchmark], axis=0) for benchmark in sorted(found)])


def tau(pairs: np.ndarray) -> float:
    """Tokens by target passes, pooled over prompts."""
    tokens, passes = pairs.sum(axis=0)
    return float(tokens / passes)


def main() -> None:
    """Print the table, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="output folder of recipes/evaluate.py")
    parser.add_argument("drafts", nargs="+", help="names of drafts; the others are compared with the first")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--record", type=Path, help="JSON file for the table and the evaluation's settings")
    arguments = parser.parse_args()
    result = json.loads((arguments.evaluation / "acceptance.json").read_text())
    records = [r for r in result["records"] if r["mode"] == "replay" and not r["temperature"]]
    rows = []
    for target in dict.fromkeys(r["target"] for r in records):
        for k in arguments.k:
            first = counts(records, target, arguments.drafts[0], k)
            for draft in arguments.drafts:
                own = counts(records, target, draft, k)
                low, high = ratio_interval(first, own)
                row = {"target": target, "k": k, "draft": draft, "prompts": len(own), "tau": round(tau(own), 3)}
                rows.append(
                    row | {"ratio": round(tau(own) / tau(first), 3), "interval": [round(low, 3), round(high, 3)]}
                )
    print("| target | K | draft | tau | ratio |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["interval"]
        ratio = "" if row["draft"] == arguments.drafts[0] else f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        print(f"| {row['target']} | {row['k']} | {row['draft']} | {row['tau']:.2f} | {ratio} |")
    if arguments.record:
        settings = json.loads((arguments.evaluation / "config.json").read_text())
        kept = {name: settings[name] for name in ("drafts", "targets", "benchmarks", "max_new_tokens", "dtype")}
        arguments.record.write_text(json.dumps({"evaluation": kept, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
