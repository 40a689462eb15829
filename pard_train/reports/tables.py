"""Tables of a result, for the page, the report and the terminal alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pard_train.reports.records import (
    Record,
    at_largest_k,
    distinct,
    groups_of,
    label_of,
    labels_of,
    of_all_benchmarks,
    pooled_tau,
    pooled_vllm_tau,
    with_interval,
)

NONE = "-"  # in a cell without a number
KINDS = ("draft", "target", "benchmark")


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        header, rows: of equal length.
        num_names: columns that hold names; the others hold numbers and stand to the right.
        caption: what it is about.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1
    caption: str = ""


def to_markdown(table: Table) -> str:
    """A Markdown table whose columns line up as plain text, too."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (table.header, *table.rows)]
    widths = [max(3, *(len(cell) for cell in column)) for column in zip(*lines, strict=True)]

    def join(cells: Sequence[str]) -> str:
        both = list(zip(cells, widths, strict=True))
        names, numbers = both[: table.num_names], both[table.num_names :]
        return "| " + " | ".join([*(c.ljust(w) for c, w in names), *(c.rjust(w) for c, w in numbers)]) + " |"

    rule = ["-" * w if i < table.num_names else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    text = "\n".join([join(lines[0]), join(rule), *(join(line) for line in lines[1:])])
    return f"{table.caption}\n\n{text}" if table.caption else text


def comparison_table(target: str, records: list[Record]) -> Table:
    """tau of every draft, side by side, on every benchmark and over all of them.

    Args:
        target: whose records these are.
        records: one for every draft and benchmark.
    """
    labels = labels_of(records)
    body = []
    for benchmark in distinct(r["benchmark"] for r in records):
        mine = {label_of(r): with_interval(r) for r in records if r["benchmark"] == benchmark}
        body.append([benchmark, *(mine.get(label, NONE) for label in labels)])
    if len(body) > 1:
        body.append(["all", *(_pooled(of_all_benchmarks(records, label)) for label in labels)])
    return Table(["benchmark", *labels], body, caption=f"tau on {target}")


def _pooled(records: list[Record]) -> str:
    return f"{pooled_tau(records):.2f}" if records else NONE


def tau_table(target: str, records: list[Record], *, most_k: int = 6) -> Table:
    """tau by K as a terminal shows it, with vLLM's figure at the largest K.

    Args:
        target: whose records these are.
        records: of every draft, benchmark and K.
        most_k: columns of K; the smallest and the largest K are among them.
    """
    ks = sorted(distinct(r["num_draft_tokens"] for r in records))
    if len(ks) > most_k:
        ks = [ks[round(i * (len(ks) - 1) / (most_k - 1))] for i in range(most_k)]
    rows = []
    for benchmark in distinct(r["benchmark"] for r in records):
        mine = [r for r in records if r["benchmark"] == benchmark]
        rows += [_tau_row(benchmark, mine, ks, label) for label in labels_of(mine)]
    if len(distinct(r["benchmark"] for r in records)) > 1:
        rows += [_tau_row("all", records, ks, label) for label in labels_of(records)]
    header = ["benchmark", "draft", *(f"K={k}" for k in ks), "95% interval", "vLLM", "answers"]
    return Table(header, rows, num_names=2, caption=f"target {target}")


def _tau_row(benchmark: str, records: list[Record], ks: list[int], label: str) -> list[str]:
    """Interval, vLLM's figure and the number of answers belong to the largest K."""
    by_k = [of_all_benchmarks([r for r in records if r["num_draft_tokens"] == k], label) for k in ks]
    largest = of_all_benchmarks(at_largest_k(records), label)
    vllm = pooled_vllm_tau(largest)
    interval = f"[{largest[0]['tau_low']:.2f}, {largest[0]['tau_high']:.2f}]" if len(largest) == 1 else ""
    num_turns = sum(r["num_turns"] for r in largest)
    return [benchmark, label, *map(_pooled, by_k), interval, f"{vllm:.2f}" if vllm else NONE, str(num_turns)]


def speed_table(caption: str, records: list[Record]) -> Table:
    """Speed and losslessness of live decoding."""
    header = ["draft", "benchmark", "speed-up", "tokens/s", "alone", "tau", "K", "batch", "same text"]
    return Table(header, [_speed_row(r) for r in records], num_names=2, caption=caption)


def _speed_row(record: Record) -> list[str]:
    speed = record["speed"]
    equal = speed["num_identical_answers"]
    return [
        *(label_of(record), record["benchmark"], f"{speed['speedup']:.2f}x"),
        *(f"{speed['tokens_per_second']:.1f}", f"{speed['ar_tokens_per_second']:.1f}", f"{record['tau']:.2f}"),
        *(str(record["num_draft_tokens"]), str(record["batch_size"] or 1)),
        "sampled" if equal is None else f"{equal} of {record['num_turns']}",
    ]


def record_table(records: list[Record]) -> Table:
    """Every record, with both conventions side by side."""
    header = ["target", "benchmark", "draft", "mode", "K", "tau [low, high]", "vLLM tau", "mean per prompt"]
    header += ["prompts", "turns", "tokens", "passes", "vLLM drafts", "vLLM accepted"]
    return Table(header, [_record_row(r) for r in records], num_names=4)


def _record_row(record: Record) -> list[str]:
    vllm, per_prompt = record.get("vllm_tau"), record.get("mean_prompt_tau")
    counts = [record[name] for name in ("num_prompts", "num_turns", "num_tokens", "num_steps")]
    counts += [record.get("vllm_drafts"), record.get("vllm_accepted")]
    return [
        *(record["target"], record["benchmark"], label_of(record), record["mode"], str(record["num_draft_tokens"])),
        *(with_interval(record), *(f"{tau:.2f}" if tau else NONE for tau in (vllm, per_prompt))),
        *(NONE if count is None else f"{count:,.0f}" for count in counts),
    ]


def group_table(records: list[Record]) -> Table:
    """The breakdown of every record."""
    rows = [
        [r["target"], r["benchmark"], label_of(r), g["by"], g["name"], with_interval(g), f"{g['num_tokens']:,}"]
        for r in records
        for g in groups_of(r)
    ]
    return Table(["target", "benchmark", "draft", "by", "group", "tau [low, high]", "tokens"], rows, num_names=5)


def model_table(records: list[dict[str, Any]]) -> Table:
    """Everything measured, with the fingerprint of its content."""
    names = distinct((kind, r[kind], r[f"{kind}_fingerprint"]) for kind in KINDS for r in records if r[kind] != NONE)
    return Table(["what", "name", "fingerprint"], names, num_names=3)
