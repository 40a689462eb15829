"""Tables of a result, shared by page, report and terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pard_train.reports.records import (
    KINDS,
    Record,
    at_largest_k,
    distinct,
    grouped,
    label_of,
    pooled_by_label,
    pooled_interval,
    pooled_tau,
    pooled_vllm_tau,
    speedup_text,
    with_interval,
)

NONE = "-"  # in a cell without a number


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `num_names` columns hold names, aligned left, the others numbers, aligned right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1
    caption: str = ""

    def markdown(self) -> str:
        """The table in Markdown, with columns aligned as plain text."""
        lines = [[as_markdown(cell).replace("|", "\\|") for cell in line] for line in (self.header, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
        is_name = [index < self.num_names for index in range(len(widths))]
        lines.insert(1, ["-" * w if name else "-" * (w - 1) + ":" for w, name in zip(widths, is_name, strict=True)])
        rows = [
            " | ".join(c.ljust(w) if name else c.rjust(w) for c, w, name in zip(line, widths, is_name, strict=True))
            for line in lines
        ]
        return "\n".join(([self.caption, ""] if self.caption else []) + [f"| {row} |" for row in rows])


def as_markdown(text: str) -> str:
    """Text of strangers in one line of Markdown: without control characters, HTML or links.

    >>> as_markdown("a <b> [c](d)\\n\\x1b[31m")
    'a \\\\<b> [c]\\\\(d) [31m'
    """
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
    return plain.replace("<", "\\<").replace("](", "]\\(")


def tau_tables(records: Sequence[Record], *, max_ks: int = 6) -> list[Table]:
    """tau by benchmark, draft and K, one table per target; interval, vLLM tau and answers belong to the largest K.

    At most max_ks columns of K include the smallest and the largest.
    """
    return [_tau_table(target, mine, max_ks) for target, mine in grouped(records, itemgetter("target")).items()]


def _tau_table(target: str, records: list[Record], max_ks: int) -> Table:
    ks = sorted(distinct(r["num_draft_tokens"] for r in records))
    if len(ks) > max_ks:
        ks = [ks[round(i * (len(ks) - 1) / (max_ks - 1))] for i in range(max_ks)]
    by_benchmark = grouped(records, itemgetter("benchmark"))
    parts = by_benchmark | ({"all": records} if len(by_benchmark) > 1 else {})
    rows = [_tau_row(name, mine, ks, label) for name, mine in parts.items() for label in distinct(map(label_of, mine))]
    header = ["benchmark", "draft", *(f"K={k}" for k in ks), "95% interval", "vLLM tau", "answers"]
    return Table(header, rows, num_names=2, caption=f"tau on target {target}")


def _tau_row(benchmark: str, records: list[Record], ks: list[int], label: str) -> list[str]:
    by_k = [pooled_by_label([r for r in records if r["num_draft_tokens"] == k]).get(label, []) for k in ks]
    largest = pooled_by_label(at_largest_k(records)).get(label, [])
    vllm = pooled_vllm_tau(largest)
    low, high = pooled_interval(largest)
    interval = "" if low is None else f"[{low:.2f}, {high:.2f}]"
    taus = [f"{pooled_tau(found):.2f}" if found else NONE for found in by_k]
    return [
        benchmark,
        label,
        *taus,
        interval,
        f"{vllm:.2f}" if vllm else NONE,
        str(sum(r["num_turns"] for r in largest)),
    ]


def speed_tables(records: Sequence[Record]) -> list[Table]:
    """Speed of live decoding and whether the output is unchanged, one table per target."""
    header = ["draft", "benchmark", "speed-up", "tokens/s", "target alone", "tau", "K", "batch", "identical"]
    return [
        Table(header, [_speed_row(r) for r in mine], num_names=2, caption=f"speed on target {target}")
        for target, mine in grouped(records, itemgetter("target")).items()
    ]


def _speed_row(record: Record) -> list[str]:
    speed = record["speed"]
    identical = speed["num_identical_answers"]
    return [
        *(label_of(record), record["benchmark"], speedup_text(record)),
        *(f"{speed['tokens_per_second']:.1f}", f"{speed['ar_tokens_per_second']:.1f}", f"{record['tau']:.2f}"),
        *(str(record["num_draft_tokens"]), str(record["batch_size"] or 1)),
        "sampled" if identical is None else f"{identical} of {record['num_turns']}",
    ]


def prediction_table(predictions: Sequence[dict[str, Any]]) -> Table:
    """Predicted speed-up by K, and the best K; `none` where decoding without a draft is fastest."""
    ks = sorted(distinct(row["num_draft_tokens"] for p in predictions for row in p["rows"]))
    rows = []
    for p in predictions:
        by_k = {row["num_draft_tokens"]: speedup_text({**row, "speed": row}) for row in p["rows"]}
        best = str(p["recommended_num_draft_tokens"] or "none")
        rows.append([p["draft"], p["target"], str(p["batch_size"]), best, *(by_k.get(k, NONE) for k in ks)])
    return Table(["draft", "target", "batch", "best K", *(f"K={k}" for k in ks)], rows, num_names=2)


def record_table(records: Sequence[Record]) -> Table:
    """Every record, with both definitions of tau."""
    header = ["target", "benchmark", "draft", "mode", "K", "tau [low, high]", "vLLM tau", "mean per prompt"]
    header += ["prompts", "answers", "tokens", "passes", "vLLM drafts", "vLLM accepted"]
    return Table(header, [_record_row(r) for r in records], num_names=4)


def _record_row(record: Record) -> list[str]:
    taus = [record.get(name) for name in ("vllm_tau", "mean_prompt_tau")]
    counts = [record[name] for name in ("num_prompts", "num_turns", "num_tokens", "num_steps")]
    counts += [record.get("vllm_drafts"), record.get("vllm_accepted")]
    return [
        *(record["target"], record["benchmark"], label_of(record), record["mode"], str(record["num_draft_tokens"])),
        *(with_interval(record), *(f"{tau:.2f}" if tau else NONE for tau in taus)),
        *(NONE if count is None else f"{count:,.0f}" for count in counts),
    ]


def fingerprint_table(records: Sequence[Record]) -> Table:
    """Every draft, target and benchmark with its fingerprint."""
    names = distinct((kind, r[kind], r[f"{kind}_fingerprint"]) for kind in KINDS for r in records if r[kind] != NONE)
    return Table(["kind", "name", "fingerprint"], names, num_names=3)
