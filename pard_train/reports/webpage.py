"""The page of a result: one HTML file with its charts inside, no script and nothing to fetch.

`sections.py` decides what is shown, templates/ how. Jinja escapes every text, and the page's own policy forbids
scripts, so that what a model wrote can do nothing but be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pard_train.reports.records import (
    TAU,
    TERMS,
    Record,
    Result,
    at_largest_k,
    distinct,
    flatten,
    labels_of,
    measured,
    of_all_benchmarks,
    pooled_tau,
    pooled_vllm_tau,
)
from pard_train.reports.sections import build_sections
from pard_train.reports.tables import KINDS, model_table, record_table

TEMPLATES = Path(__file__).with_name("templates")
SETTINGS = ("max_new_tokens", "dtype", "temperature", "top_p", "system_prompt", "template_kwargs", "prompt_template")


def fill(template: str, **content: Any) -> str:
    """A page from a file in templates/, everything escaped."""
    loader = FileSystemLoader(TEMPLATES)
    settings: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined}
    environment = Environment(loader=loader, autoescape=True, **settings)
    return environment.get_template(template).render(content)


def render_page(document: Result, predictions: list[dict[str, Any]], samples: list[dict[str, Any]]) -> str:
    """The page of one evaluation.

    Args:
        document: acceptance.json.
        predictions: predictions.json; may be empty.
        samples: samples.json; may be empty.
    """
    records = document["records"]
    return fill(
        "report.html",
        summary=TAU,
        terms=TERMS,
        tiles=_tiles(measured(document)),
        failures=document["failures"],
        sections=build_sections(document, predictions),
        questions=_questions(samples),
        record_table=record_table(records),
        models=model_table(records),
        settings=_settings(records),
        makers=_makers(records),
    )


def _tiles(records: list[Record]) -> list[tuple[str, str, str]]:
    """(number, what, of what): the best draft of every target over all benchmarks, then how much was measured."""
    tiles = []
    for target in distinct(r["target"] for r in records):
        mine = at_largest_k([r for r in records if r["target"] == target])
        by_draft = {label: of_all_benchmarks(mine, label) for label in labels_of(mine)}
        by_draft = {label: found for label, found in by_draft.items() if found}
        if not by_draft:
            continue
        best = max(by_draft, key=lambda label: pooled_tau(by_draft[label]))
        vllm = pooled_vllm_tau(by_draft[best])
        k = max(r["num_draft_tokens"] for r in by_draft[best])
        whose = f"{best} for {target}" + (f", {vllm:.2f} as vLLM counts" if vllm else "")
        tiles.append((f"{pooled_tau(by_draft[best]):.2f}", f"tokens per pass at K={k}", whose))
    cases = {(r["target"], r["benchmark"]): r for r in records}.values()
    counts = {kind: len(distinct(r[kind] for r in records)) for kind in KINDS}
    measured_on = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    return [*tiles, (f"{sum(r['num_turns'] for r in cases):,}", "answers", measured_on)]


def _questions(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples of the same question together."""
    questions: dict[tuple[str, ...], dict[str, Any]] = {}
    for s in samples:
        head = {name: s[name] for name in ("target", "benchmark", "prompt_id", "question")}
        question = questions.setdefault(tuple(head.values()), {**head, "answers": []})
        question["answers"].append(_answer(s))
    return list(questions.values())


def _answer(sample: dict[str, Any]) -> dict[str, Any]:
    num_drafted = sum(len(step["accepted"]) for step in sample["steps"])
    num_own = sum(len(step["target_token"]) for step in sample["steps"])
    share = f"{num_drafted / max(num_drafted + num_own, 1):.0%}"
    k, num_steps = sample["num_draft_tokens"], len(sample["steps"])
    return {"draft": sample["draft"], "k": k, "share": share, "num_steps": num_steps, "steps": sample["steps"]}


def _settings(records: list[Record]) -> list[tuple[str, str]]:
    """Settings with every value that they took."""
    flat = [flatten({name: r[name] for name in SETTINGS}) for r in records]
    return [(name, " · ".join(distinct(str(row[name]) for row in flat))) for name in SETTINGS]


def _makers(records: list[Record]) -> list[dict[str, Any]]:
    """Every run that made some of the records: command, time, machine, versions."""
    makers = [flatten(r["provenance"]) for r in records]
    return [dict(items) for items in distinct(tuple(maker.items()) for maker in makers)]
