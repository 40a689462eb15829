"""acceptance.json: reading it, and the questions that tables and charts ask of its records."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import numpy as np

from pard_train.bootstrap import tau_interval
from pard_train.commands import command
from pard_train.errors import UserError

ACCEPTANCE_FILE = "acceptance.json"
PREDICTIONS_FILE = "predictions.json"
PICTURE_FILE = "acceptance.png"
SCHEMA_VERSION = 3  # of acceptance.json; adding a field keeps the version, renaming or removing one raises it
READABLE = (2, SCHEMA_VERSION)
REQUIRED = (  # fields without which a record cannot be shown
    *("draft", "target", "benchmark", "mode", "method", "temperature", "num_draft_tokens"),
    *("tau", "tau_low", "tau_high", "num_turns", "num_tokens", "num_steps"),
)
KINDS = ("draft", "target", "benchmark")  # named in every record, each with a fingerprint

Record = dict[str, Any]
Result = dict[str, Any]
Item = TypeVar("Item")
Key = TypeVar("Key")

TAU = (
    "Mean accepted length: tokens emitted per forward pass of the target, pooled over all answers. It is 1 without a "
    "draft and at most K + 1 with K draft tokens."
)
TERMS = {
    "tau": f"{TAU} The prefill also verifies the first draft. The target's own token counts. Tokens past the end of "
    "the turn or the length limit do not.",
    "[low, high]": "Bootstrap 95% interval of tau over prompts.",
    "vLLM tau": "The same answers counted as vLLM does: 1 + accepted / drafts. The first token comes from the prefill, "
    "and every later step drafts exactly K tokens.",
    "K": "Draft tokens per step, proposed in one forward pass of the draft model.",
    "survival": "Share of steps that accept the draft tokens at this position and at all positions before it.",
    "replay": "Exact acceptance under greedy decoding, computed from the target's cached answers.",
    "estimate": "Expected acceptance under sampling, computed from the target's sampled answers.",
    "live": "Draft and target decode together with KV caches. This measures speed and checks that the output is "
    "unchanged.",
    "speed-up": "Tokens per second with the draft, divided by those of the target alone. Both decode the same prompts "
    "in alternation; prefill is included.",
}
SLOW_BASELINE = (
    "(!) marks a speed-up above tau. A draft saves at most tau passes of the target, so there the target alone decodes "
    "more slowly than it must, such as in bfloat16 on a CPU. Measure in float32 before you quote it."
)


def read_result(path: Path) -> Result:
    """Read acceptance.json, given as a file or as the folder of an evaluation.

    Raises:
        UserError: if the file is missing, is not JSON, has an unknown schema version, or a record lacks a field.
    """
    file = path / ACCEPTANCE_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give an output folder of {command('evaluate')}") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is not valid JSON ({error}): evaluate again") from None
    found = result.get("schema_version") if isinstance(result, dict) else None
    if found not in READABLE:
        raise UserError(f"{file} has schema_version={found}, but must have {SCHEMA_VERSION}: evaluate again")
    for name in ("records", "failures"):
        rows = result.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file}: `{name}` must be a list of objects: evaluate again")
    for number, record in enumerate(result["records"]):
        if missing := [field for field in REQUIRED if field not in record]:
            raise UserError(f"{file}: record {number} has no {missing[0]}: evaluate again")
    return result


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """Predictions of an evaluation's folder; none if it has none, or if acceptance.json is given without its folder."""
    file = path / PREDICTIONS_FILE
    return json.loads(file.read_text()) if file.is_file() else []


def distinct(values: Iterable[Item]) -> list[Item]:
    """Every value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by key, in order of first appearance."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def case_of(record: Record) -> str:
    """`humaneval on Qwen2.5-7B-Instruct`"""
    return f"{record['benchmark']} on {record['target']}"


def label_of(record: Record) -> str:
    """Draft and method, as tables and legends name them.

    >>> label_of({"draft": "mine", "method": "draft", "mode": "live", "temperature": 0.7})
    'mine, autoregressive, T=0.7'
    """
    name = "prompt lookup" if record["method"] == "ngram" else record["draft"]
    parts = [name, {"draft": "autoregressive"}.get(record["method"])]
    parts += ["in an engine" if record["mode"] == "engine" else None]
    estimate = " (estimate)" if record["mode"] == "estimate" else ""
    parts += [f"T={record['temperature']:g}{estimate}" if record["temperature"] else None]
    return ", ".join(part for part in parts if part)


def acceptance_records(result: Result) -> list[Record]:
    """The records that cover every prompt at every K (replay, estimate); all records if there are none of them."""
    return [r for r in result["records"] if r["mode"] in ("replay", "estimate")] or result["records"]


def timed_records(result: Result) -> list[Record]:
    """The records with a measured speed."""
    return [r for r in result["records"] if r.get("speed")]


def groups_of(record: Record, by: str | None = None) -> list[dict[str, Any]]:
    """The breakdown of a record, or its groups of one kind."""
    return [g for g in record.get("groups", ()) if by in (None, g["by"])]


def at_largest_k(records: Sequence[Record]) -> list[Record]:
    """The record with the most draft tokens of every target, benchmark and label."""
    by_case = grouped(records, lambda r: (r["target"], r["benchmark"], label_of(r)))
    largest = {id(max(found[::-1], key=lambda r: r["num_draft_tokens"])) for found in by_case.values()}
    return [r for r in records if id(r) in largest]


def pooled_by_label(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by label, without labels that lack a benchmark: only figures on equal prompts can be compared."""
    everywhere = {r["benchmark"] for r in records}
    by_label = grouped(records, label_of)
    return {label: mine for label, mine in by_label.items() if {r["benchmark"] for r in mine} == everywhere}


def pooled_tau(records: Sequence[Record]) -> float:
    """tau over several benchmarks: all tokens divided by all target passes."""
    return sum(r["num_tokens"] for r in records) / sum(r["num_steps"] for r in records)


def pooled_interval(records: Sequence[Record]) -> tuple[float, float] | tuple[None, None]:
    """95% interval of the pooled tau, over the prompts of all records; None where one has no counts by prompt."""
    if len(records) == 1:
        return records[0]["tau_low"], records[0]["tau_high"]
    counts = [r["prompt_counts"] for r in records if r.get("prompt_counts")]
    return tau_interval(np.concatenate(counts)) if records and len(counts) == len(records) else (None, None)


def pooled_vllm_tau(records: Sequence[Record]) -> float | None:
    """The same as vLLM counts; None where a record lacks vLLM's counts."""
    if not records or not all(r.get("vllm_drafts") for r in records):
        return None
    return 1 + sum(r["vllm_accepted"] for r in records) / sum(r["vllm_drafts"] for r in records)


def with_interval(record: Record) -> str:
    """`2.39 [2.28, 2.49]`"""
    return f"{record['tau']:.2f} [{record['tau_low']:.2f}, {record['tau_high']:.2f}]"


def scalars(records: Sequence[Record], everything: Sequence[Record]) -> dict[str, float]:
    """tau by K, survival by position and speed-up of one draft, named without it: equal columns for different drafts.

    The names are those of the monitor in training (docs/reference/metrics.md). `all` pools the benchmarks of a target,
    if the draft was measured on all that `everything`, the records of all drafts, has.
    """
    values: dict[str, float] = {}
    measured = acceptance_records({"records": records})
    for r in measured:
        case = f"{r['target']}/{_with_temperature(r)}"
        values[f"eval/tau_by_k/{case}/k_{r['num_draft_tokens']}"] = r["tau"]
    for r in at_largest_k(measured):
        case = f"{r['target']}/{_with_temperature(r)}"
        values |= {f"eval/survival/{case}/position_{i}": share for i, share in enumerate(r["survival"], start=1)}
    greedy = [r for r in measured if not r["temperature"]]
    if {case_of(r) for r in acceptance_records({"records": everything})} > {case_of(r) for r in measured}:
        greedy = []
    for (target, k), mine in grouped(greedy, lambda r: (r["target"], r["num_draft_tokens"])).items():
        values[f"eval/tau_by_k/{target}/all/k_{k}"] = pooled_tau(mine)
    targets = distinct(r["target"] for r in greedy)
    for k in distinct(r["num_draft_tokens"] for r in greedy):
        values[f"eval/tau_by_k/mean/k_{k}"] = mean(values[f"eval/tau_by_k/{target}/all/k_{k}"] for target in targets)
    for r in timed_records({"records": records}):
        case = f"{r['target']}/{_with_temperature(r)}/{r['method']}_{r['mode']}_batch_{r['batch_size'] or 1}"
        values[f"eval/speedup/{case}"] = r["speed"]["speedup"]
    return values


def _with_temperature(record: Record) -> str:
    return record["benchmark"] + (f", T={record['temperature']:g}" if record["temperature"] else "")


def failure_line(failure: dict[str, Any]) -> str:
    """A failed part of the evaluation and its reason, in one line."""
    where = ", ".join(f"{kind} {failure[kind]}" for kind in KINDS if failure[kind])
    return f"{where}: {failure['reason']}"


def has_slow_baseline(record: Record) -> bool:
    """Whether the measured speed-up is above tau, which only a slow baseline explains."""
    return record["speed"]["speedup"] > record["tau"]


def speedup_text(record: Record) -> str:
    """The measured speed-up of a record; `5.30x (!)` if it is above tau."""
    if not record.get("speed"):
        return "-"
    return f"{record['speed']['speedup']:.2f}x{' (!)' * has_slow_baseline(record)}"
