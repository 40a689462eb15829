"""Evaluation: drafts x targets x benchmarks x K x temperature -> acceptance.json, tables and a page.

Each target writes its greedy text once; replay then gives every draft's exact acceptance for every K from that cache.
Live runs decode some prompts for real: for speed, for sampling, and as proof that the output is unchanged. The same
command goes on where it was stopped, and a target that fails leaves the others alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pard_train.config import EvaluateConfig
from pard_train.data.benchmarks import Benchmark, benchmark_name, check_benchmark, load_benchmark
from pard_train.downloads import local_model
from pard_train.errors import UserError
from pard_train.evaluation.engine_records import engine_records
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.measurement import (
    NO_DRAFT,
    Draft,
    estimate_records,
    live_records,
    measure_steps,
    predict_speedup,
    replay_case,
    replay_records,
    sampling_at,
)
from pard_train.evaluation.samples import sample_answers
from pard_train.evaluation.speed import Latencies
from pard_train.fingerprints import model_fingerprint
from pard_train.reports.records import ACCEPTANCE_FILE, SCHEMA_VERSION, Document, Record
from pard_train.reports.report import write_report
from pard_train.runs import CONFIG_FILE, RUN_FILE, provenance, read_json, write_json
from pard_train.targets.cases import Case, Target, longest_text, short_name, write_case
from pard_train.targets.compatibility import OK, Model, check_engine, check_pair, require
from pard_train.targets.scored_cases import ScoredCase, write_scored_case

PREDICTIONS_FILE = "predictions.json"
SAMPLES_FILE = "samples.json"


def evaluate(config: EvaluateConfig) -> Document:
    """Measure every draft on every target and benchmark.

    Args:
        config: validated.

    Returns:
        What acceptance.json holds (docs/acceptance.md).

    Raises:
        UserError: for a model, benchmark, pair or threshold that does not fit, before any target writes a token; or if
            nothing could be measured.
    """
    folder = Path(config.output_dir or "")
    _check_thresholds(config)
    benchmarks = load_benchmarks(config)
    targets = [load_target(name, config) for name in config.targets]
    drafts = [load_draft(name, path, config) for name, path in _named_drafts(config).items()]
    for draft in drafts:
        for target in targets:
            check_fit(draft.model, target, benchmarks, config)
    if config.engine_python:
        require([check_engine(config.engine_python)])
    _claim_output(folder, config)

    matrix = Matrix(folder)
    found = [_visit(matrix, target, drafts, benchmarks, config) for target in targets]
    records = [record for visit in found for record in visit.records]
    samples: list[dict[str, Any]] = []
    for draft in drafts:
        for visit in found:
            _replay_visit(matrix, draft, visit, config, records, samples)
        draft.unload()
    if not records:
        raise UserError(f"nothing could be measured; the first failure: {matrix.failures[0]['reason']}")
    document = {"schema_version": SCHEMA_VERSION, "records": records, "failures": matrix.failures}
    predictions = [predict_speedup(records, *latency) for visit in found for latency in visit.latencies]
    for name, content in ((ACCEPTANCE_FILE, document), (PREDICTIONS_FILE, predictions), (SAMPLES_FILE, samples)):
        write_json(folder / name, content)
    write_report(document, folder, predictions=predictions, samples=samples)
    return document


@dataclass
class Visit:
    """What was measured while a target was in memory, and its texts."""

    cases: list[Case] = field(default_factory=list)
    scored: list[ScoredCase] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    latencies: list[tuple[Draft, Target, Latencies]] = field(default_factory=list)


def _visit(
    matrix: Matrix, target: Target, drafts: Sequence[Draft], benchmarks: Sequence[Benchmark], config: EvaluateConfig
) -> Visit:
    """Have a target write its texts and decode live; then it leaves memory, and an engine may have its place."""
    visit = Visit()
    warm = [sampling_at(temperature, config) for temperature in config.temperatures if temperature]
    for benchmark in benchmarks:
        with matrix.surviving(target=target.label, benchmark=benchmark.name):
            visit.cases.append(write_case(target, benchmark, config, matrix.folder))
            for sampling in [] if config.servers else warm:  # scores take the target's weights
                visit.scored.append(write_scored_case(target, benchmark, config, matrix.folder, sampling))
    if config.live_prompts:
        for case in visit.cases:
            visit.records += live_records(matrix, drafts, target, case, config)
        visit.latencies += measure_steps(matrix, drafts, target, visit.cases, config)
    target.unload()
    for draft in drafts if config.engine_python else ():
        for case in visit.cases:
            with matrix.surviving(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
                visit.records += engine_records(matrix, draft, target, case, config)
    return visit


def _replay_visit(
    matrix: Matrix,
    draft: Draft,
    visit: Visit,
    config: EvaluateConfig,
    records: list[Record],
    samples: list[dict[str, Any]],
) -> None:
    """Add what one draft does on the texts of one target, which is needed no more."""
    for case in visit.cases:
        with matrix.surviving(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
            matches, made_by = replay_case(matrix, draft, case, config)
            records += replay_records(draft, case, matches, config, made_by)
            samples += sample_answers(draft, case, matches, config)
    for scored in visit.scored:
        with matrix.surviving(draft=draft.name, target=scored.case.target, benchmark=scored.case.benchmark.name):
            records += estimate_records(matrix, draft, scored, config)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, checked before anything expensive
# ---------------------------------------------------------------------------------------------------------------------


def _check_thresholds(config: EvaluateConfig) -> None:
    names = [*map(benchmark_name, config.benchmarks), "all"]
    for name in config.fail_below:
        if name not in names:
            raise UserError(f"fail_below.{name} is the threshold of no benchmark: allowed are {', '.join(names)}")


def load_benchmarks(config: EvaluateConfig) -> list[Benchmark]:
    """Every benchmark. Raises UserError if one does not exist, before any is read, or if two have one name."""
    for source in config.benchmarks:
        check_benchmark(source)
    benchmarks = [load_benchmark(source, config.max_prompts) for source in config.benchmarks]
    by_name: dict[str, str] = {}
    for benchmark, source in zip(benchmarks, config.benchmarks, strict=True):
        if other := by_name.get(benchmark.name):
            raise UserError(
                f"benchmarks {other} and {source} are both called {benchmark.name}: rename one of the files"
            )
        by_name[benchmark.name] = source
    return benchmarks


def load_target(name: str, config: EvaluateConfig) -> Target:
    """Config and tokenizer of a target. Raises UserError."""
    return Target(Model.load(name, trust_remote_code=config.trust_remote_code), config)


def load_draft(name: str, path: str, config: EvaluateConfig) -> Draft:
    """Config and tokenizer of a draft. Raises UserError."""
    return Draft(name, Model.load(path, trust_remote_code=config.trust_remote_code), config)


def check_fit(draft: Model, target: Target, benchmarks: Sequence[Benchmark], config: EvaluateConfig) -> None:
    """Print what an engine or a user may stumble over. Raises UserError where a pair cannot work at all."""
    longest = max(
        longest_text(b.prompts, target.encoder, config.max_new_tokens, system_prompt=config.system_prompt)
        for b in benchmarks
    )
    num_tokens = longest + max(*config.num_draft_tokens, config.live_num_draft_tokens)
    findings = check_pair(draft, target.model, num_tokens=num_tokens, dtype=config.dtype)
    require(findings)
    for finding in findings:
        if finding.level != OK:
            print(f"draft {draft.name}, target {target.label}: {finding}")


def _named_drafts(config: EvaluateConfig) -> dict[str, str]:
    return dict(config.drafts) if config.draft is None else {Path(config.draft).name: config.draft}


def _claim_output(folder: Path, config: EvaluateConfig) -> None:
    """Refuse a folder that holds another evaluation; claim it otherwise. The same evaluation may be repeated."""
    path = folder / CONFIG_FILE
    if path.exists() and read_json(path) != _settings(config):
        raise UserError(f"output_dir={folder} holds an evaluation with other settings: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, _settings(config))
    write_json(folder / RUN_FILE, provenance())


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """What decides the result, as JSON."""
    free = ("logger", "fail_below", "concurrency", "timeout", "max_retries", "servers", "device_map")
    return {name: value for name, value in json.loads(json.dumps(asdict(config))).items() if name not in free}


def read_document(config: EvaluateConfig) -> Document | None:
    """The result of this very evaluation, of the weights and prompts as they are now; None if there is none.

    A result with failures does not count.

    Raises:
        UserError: if a benchmark cannot be read.
    """
    folder = Path(config.output_dir or "")
    if not (folder / ACCEPTANCE_FILE).exists() or read_json(folder / CONFIG_FILE) != _settings(config):
        return None
    document = read_json(folder / ACCEPTANCE_FILE)
    return None if document["failures"] or _named_in(document) != _named_now(config) else document


def _named_in(document: Document) -> set[tuple[str, str, str]]:
    """(kind, name, fingerprint) of everything that a result is about."""
    kinds = ("draft", "target", "benchmark")
    named = {(kind, r[kind], r[f"{kind}_fingerprint"]) for r in document["records"] for kind in kinds}
    return named - {("draft", NO_DRAFT, NO_DRAFT)}


def _named_now(config: EvaluateConfig) -> set[tuple[str, str, str]]:
    """The same of what an evaluation would be about."""
    drafts = {("draft", name, model_fingerprint(local_model(path))) for name, path in _named_drafts(config).items()}
    targets = {("target", short_name(t, config.targets), model_fingerprint(local_model(t))) for t in config.targets}
    return drafts | targets | {("benchmark", b.name, b.fingerprint) for b in load_benchmarks(config)}
