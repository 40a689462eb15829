"""The page of a result: one HTML file with inline charts, without scripts, fonts or anything to fetch.

Jinja escapes every text, and the page's content security policy forbids scripts: model output stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pard_train.reports.charts import TEMPLATES, assign_styles, draw_svg, legend_of
from pard_train.reports.records import (
    KINDS,
    TAU,
    TERMS,
    Record,
    Result,
    acceptance_records,
    at_largest_k,
    distinct,
    grouped,
    label_of,
    pooled_by_label,
    pooled_tau,
    pooled_vllm_tau,
)
from pard_train.reports.sections import Section, build_sections
from pard_train.reports.tables import fingerprint_table, record_table
from pard_train.runs import flatten

PAGE_FILE = "report.html"  # of an evaluation, and of a training run
SETTINGS = ("max_new_tokens", "dtype", "temperature", "top_p", "system_prompt", "template_kwargs", "prompt_template")


def fill(template: str, sections: Sequence[Section], **content: Any) -> str:
    """A page from a file in templates/, with every text escaped and every chart drawn."""
    styles = assign_styles(chart for section in sections for chart in section.charts)
    drawn = [(s, legend_of(s.charts, styles), [(c, draw_svg(c, styles)) for c in s.charts]) for s in sections]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(sections=drawn, **content)


def render_page(result: Result, predictions: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> str:
    """The page of one evaluation, from its acceptance.json, predictions.json and samples.json."""
    records = result["records"]
    settings = [flatten({name: r[name] for name in SETTINGS}) for r in records]
    return fill(
        "report.html",
        build_sections(result, predictions),
        summary=TAU,
        terms=TERMS,
        tiles=_tiles(acceptance_records(result)),
        failures=result["failures"],
        questions=_questions(samples),
        record_table=record_table(records),
        fingerprints=fingerprint_table(records),
        settings=[(name, " · ".join(distinct(str(row[name]) for row in settings))) for name in SETTINGS],
        provenances=[dict(items) for items in distinct(tuple(flatten(r["provenance"]).items()) for r in records)],
    )


def render_samples(samples: Sequence[dict[str, Any]]) -> str:
    """A page of the sample answers alone, for trackers."""
    return fill("samples.html", [], questions=_questions(samples))


def _questions(samples: Sequence[dict[str, Any]]) -> dict[Any, list[dict[str, Any]]]:
    return grouped(samples, itemgetter("target", "benchmark", "prompt_id", "question"))


def _tiles(records: list[Record]) -> list[tuple[str, str, str]]:
    """(number, unit, subject): the best draft of every target over all benchmarks, then the number of answers."""
    tiles = []
    for target, mine in grouped(at_largest_k(records), itemgetter("target")).items():
        if best := max(pooled_by_label(mine).values(), key=pooled_tau, default=[]):
            vllm, k = pooled_vllm_tau(best), max(r["num_draft_tokens"] for r in best)
            subject = f"{label_of(best[0])} on {target}" + (f", vLLM tau {vllm:.2f}" if vllm else "")
            tiles.append((f"{pooled_tau(best):.2f}", f"tokens per pass at K={k}", subject))
    cases = {(r["target"], r["benchmark"]): r["num_turns"] for r in records}
    counts = {kind: len(distinct(r[kind] for r in records)) for kind in KINDS}
    subject = ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items())
    return [*tiles, (f"{sum(cases.values()):,}", "answers", subject)]
