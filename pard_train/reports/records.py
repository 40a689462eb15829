"""One record of acceptance.json, and what several say together; docs/acceptance.md explains every field."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pard_train.errors import UserError

ACCEPTANCE_FILE = "acceptance.json"
SCHEMA_VERSION = 2  # of acceptance.json; adding a field keeps the version, renaming or removing one raises it
RENAMED = {  # names of schema_version 1, which results of version 0.1 and cached cells still use
    "made_by": "provenance",
    "estimated": "estimator",
    "outside": "mass_outside_top_k",
    "instruction": "prompt_template",
    "num_equal_texts": "num_identical_answers",
}

Record = dict[str, Any]
Result = dict[str, Any]
Value = TypeVar("Value")

TAU = (
    "Mean accepted length: tokens emitted per forward pass of the target, pooled over all answers. Without a draft it "
    "is 1, and with K draft tokens K + 1 at most."
)
TERMS = {
    "tau": f"{TAU} The first pass reads the prompt and verifies the first draft; the target's own token counts; tokens "
    "past the end of the turn or past the length limit do not.",
    "[low, high]": "Bootstrap 95% interval of tau over prompts.",
    "vLLM tau": "The same answers counted as vLLM counts: 1 + accepted / drafts, where the first token comes from the "
    "target's prefill and exactly K tokens are drafted at every step.",
    "K": "Draft tokens proposed per step, all of them in one forward pass of the draft model.",
    "survival": "Share of steps in which the draft token at a position is accepted, and so all before it.",
    "replay": "Exact acceptance under greedy decoding, from the target's cached text.",
    "estimate": "Expected acceptance under sampling, from the target's cached probabilities; no text is sampled.",
    "live": "Both models decode, with caches; this gives speed, and shows that the text is the target's own.",
    "speed-up": "Tokens per second with the draft over tokens per second of the target alone, on the same prompts, "
    "prefill included, the two taking turns.",
}


def read_result(path: Path) -> Result:
    """Read acceptance.json.

    Args:
        path: the file, or the folder of an evaluation.

    Raises:
        UserError: if it is not there, or is something else.
    """
    file = path / ACCEPTANCE_FILE if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file} does not exist: give a folder that recipes/evaluate.py wrote, or its file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): evaluate again") from None
    found = document.get("schema_version") if isinstance(document, dict) else None
    if found not in (1, SCHEMA_VERSION):
        raise UserError(f"{file} has schema_version={found}; allowed are 1 and {SCHEMA_VERSION}: evaluate again")
    return upgrade(document)


def upgrade(document: Result) -> Result:
    """A document of any known schema_version in the current one."""
    return {**document, "schema_version": SCHEMA_VERSION, "records": [renamed(r) for r in document["records"]]}


def renamed(record: Record) -> Record:
    """A record, or a part of one, under the current names.

    >>> renamed({"tau": 2.0, "outside": 0.01, "estimated": "along"})
    {'tau': 2.0, 'mass_outside_top_k': 0.01, 'estimator': 'sampled_text'}
    """
    record = {RENAMED.get(name, name): value for name, value in record.items()}
    if record.get("estimator") == "along":
        record["estimator"] = "sampled_text"
    if record.get("speed"):
        record["speed"] = renamed(record["speed"])
    return record


def distinct(values: Iterable[Value]) -> list[Value]:
    """Every value once, in order of first appearance."""
    return list(dict.fromkeys(values))


def label_of(record: Record) -> str:
    """What drafted and how, as tables and legends name it.

    >>> label_of({"draft": "mine", "method": "draft", "mode": "live", "temperature": 0.7})
    'mine, autoregressive, T=0.7'
    """
    name = "prompt look-up" if record["method"] == "ngram" else record["draft"]
    parts = [name, {"draft": "autoregressive"}.get(record["method"])]
    parts += ["in an engine" if record["mode"] == "engine" else None]
    how = " (estimate)" if record["mode"] == "estimate" else ""
    parts += [f"T={record['temperature']:g}{how}" if record["temperature"] else None]
    return ", ".join(part for part in parts if part)


def labels_of(records: list[Record]) -> list[str]:
    """Everything that drafted."""
    return distinct(label_of(r) for r in records)


def measured(document: Result) -> list[Record]:
    """The records that say most about acceptance: every prompt at every K; live ones only if there is nothing else."""
    records = document["records"]
    return [r for r in records if r["mode"] in ("replay", "estimate")] or records


def live(document: Result) -> list[Record]:
    """The records with a clock."""
    return [r for r in document["records"] if r.get("speed")]


def groups_of(record: Record, by: str | None = None) -> list[dict[str, Any]]:
    """The breakdown of a record, or the groups of one kind; an estimate has none."""
    return [g for g in record.get("groups", ()) if by in (None, g["by"])]


def at_largest_k(records: list[Record]) -> list[Record]:
    """Of every draft, target and benchmark the record with the most draft tokens."""
    largest: dict[tuple[str, ...], Record] = {}
    for r in sorted(records, key=lambda r: r["num_draft_tokens"]):
        largest[r["target"], r["benchmark"], label_of(r)] = r
    return [r for r in records if r is largest[r["target"], r["benchmark"], label_of(r)]]


def of_all_benchmarks(records: list[Record], label: str) -> list[Record]:
    """A draft's records, or none if it lacks one of the benchmarks: drafts are pooled over the same prompts or not."""
    mine = [r for r in records if label_of(r) == label]
    return mine if {r["benchmark"] for r in mine} == {r["benchmark"] for r in records} else []


def pooled_tau(records: list[Record]) -> float:
    """tau over several benchmarks: all tokens by all target passes."""
    return sum(r["num_tokens"] for r in records) / sum(r["num_steps"] for r in records)


def pooled_vllm_tau(records: list[Record]) -> float | None:
    """The same as vLLM counts; None where something was not counted so."""
    if not records or not all(r.get("vllm_drafts") for r in records):
        return None
    return 1 + sum(r["vllm_accepted"] for r in records) / sum(r["vllm_drafts"] for r in records)


def with_interval(record: Record) -> str:
    """`2.39 [2.28, 2.49]`"""
    return f"{record['tau']:.2f} [{record['tau_low']:.2f}, {record['tau_high']:.2f}]"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One row of a table: dotted names, lists as JSON, the command as one would type it.

    >>> flatten({"speed": {"speedup": 2.0}, "histogram": [3, 1]})
    {'speed.speedup': 2.0, 'histogram': '[3, 1]'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "command":
            flat[prefix + key] = shlex.join(value)
        elif key == "template_kwargs" or isinstance(value, list):
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
