"""Evaluation: drafts x targets x benchmarks x K x temperature -> acceptance.json, tables and a page.

Each target writes its greedy answers once; replay then gives every draft's exact acceptance for every K from them. Live
runs decode some prompts, for speed and sampling, and check that the output is unchanged. The same command resumes an
interrupted evaluation. A target that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pard_train.config import Config, EvaluateConfig, decisive
from pard_train.data.benchmarks import Benchmark, load_benchmarks
from pard_train.device import dtype_name
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
)
from pard_train.evaluation.samples import sample_answers
from pard_train.evaluation.speed import Latencies
from pard_train.fingerprints import model_fingerprint
from pard_train.reports.records import ACCEPTANCE_FILE, SCHEMA_VERSION, Record, Result, upgrade
from pard_train.reports.report import write_report
from pard_train.runs import check_run, claim_run, read_json, write_json
from pard_train.targets.cases import Case, ScoredCase, longest_text, score_case, write_case
from pard_train.targets.compatibility import OK, Model, check_engine, check_pair, require
from pard_train.targets.target import Target, load_targets, short_name
from pard_train.training.checkpoints import resolve_draft

PREDICTIONS_FILE = "predictions.json"
SAMPLES_FILE = "samples.json"


def evaluate(config: Config) -> Result:
    """Measure every draft on every target and benchmark.

    Args:
        config: validated.

    Returns:
        Content of acceptance.json (docs/reference/acceptance-json.md).

    Raises:
        UserError: for a model, benchmark, pair or threshold that does not fit, before any target writes a token; or if
            nothing could be measured.
    """
    matrix, settings = Matrix(config), config.evaluate
    benchmarks = load_benchmarks(settings.benchmarks, settings.max_prompts)
    _check_thresholds(settings.fail_below, benchmarks)
    targets = load_targets(config)
    trust = config.model.trust_remote_code
    named = named_drafts(config)
    drafts = [Draft(name, Model.load(path, trust_remote_code=trust), matrix) for name, path in named.items()]
    for target in targets:
        check_fit([draft.model for draft in drafts], target, benchmarks, settings)
    if settings.engine_python:
        require([check_engine(settings.engine_python)])
    decides = evaluation_settings(config, named)
    check_run(matrix.folder, decides, resume=True)
    claim_run(matrix.folder, decides)

    found = [_visit(matrix, target, drafts, benchmarks) for target in targets]
    records = [record for visit in found for record in visit.records]
    samples: list[dict[str, Any]] = []
    for draft in drafts:
        for visit in found:
            _replay_visit(matrix, draft, visit, records, samples)
        draft.unload()
    if not records:
        raise UserError(f"nothing could be measured; the first failure: {matrix.failures[0]['reason']}")
    document = {"schema_version": SCHEMA_VERSION, "records": records, "failures": matrix.failures}
    predictions = [predict_speedup(records, *latency) for visit in found for latency in visit.latencies]
    for name, content in ((ACCEPTANCE_FILE, document), (PREDICTIONS_FILE, predictions), (SAMPLES_FILE, samples)):
        write_json(matrix.folder / name, content)
    write_report(document, matrix.folder, predictions=predictions, samples=samples)
    return document


@dataclass
class Visit:
    """What was measured while a target was in memory, and its answers."""

    cases: list[Case] = field(default_factory=list)
    scored: list[ScoredCase] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    latencies: list[tuple[Draft, Target, Latencies]] = field(default_factory=list)


def _visit(matrix: Matrix, target: Target, drafts: Sequence[Draft], benchmarks: Sequence[Benchmark]) -> Visit:
    """Have a target write its answers and decode live; then unload it, which makes room for an engine."""
    visit, settings = Visit(), matrix.settings
    limit, system = settings.max_new_tokens, settings.system_prompt
    can_score = not target.inference.servers  # scores need the target's weights
    for benchmark in benchmarks:
        with matrix.keep_going(target=target.label, benchmark=benchmark.name):
            visit.cases.append(write_case(target, benchmark, matrix.folder, max_new_tokens=limit, system_prompt=system))
            for sampling in [matrix.sampling(t) for t in settings.temperatures if t and can_score]:
                case = write_case(
                    target, benchmark, matrix.folder, max_new_tokens=limit, system_prompt=system, sampling=sampling
                )
                visit.scored.append(score_case(target, case, sampling, matrix.folder))
    if settings.live_prompts:
        for case in visit.cases:
            visit.records += live_records(matrix, drafts, target, case)
        visit.latencies += measure_steps(matrix, drafts, target, visit.cases)
    target.unload()
    for draft in drafts if settings.engine_python else ():
        for case in visit.cases:
            with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
                visit.records += engine_records(matrix, draft, target, case)
    return visit


def _replay_visit(
    matrix: Matrix, draft: Draft, visit: Visit, records: list[Record], samples: list[dict[str, Any]]
) -> None:
    """Add the acceptance of one draft on the answers of one target."""
    for case in visit.cases:
        with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
            matches, made_by = replay_case(matrix, draft, case)
            records += replay_records(matrix, draft, case, matches, made_by)
            samples += sample_answers(draft, case, matches, matrix.settings.num_draft_tokens)
    for scored in visit.scored:
        with matrix.keep_going(draft=draft.name, target=scored.case.target, benchmark=scored.case.benchmark.name):
            records += estimate_records(matrix, draft, scored)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, checked before anything expensive
# ---------------------------------------------------------------------------------------------------------------------


def _check_thresholds(fail_below: dict[str, float], benchmarks: Sequence[Benchmark]) -> None:
    names = [*(benchmark.name for benchmark in benchmarks), "all"]
    for name in fail_below:
        if name not in names:
            raise UserError(f"evaluate.fail_below.{name} is not a benchmark: allowed are {', '.join(names)}")


def check_fit(
    drafts: Sequence[Model], target: Target, benchmarks: Sequence[Benchmark], settings: EvaluateConfig
) -> None:
    """Print what an engine or a user should know about each pair. Raises UserError if a pair cannot work."""
    longest = max(
        longest_text(b.prompts, target.encoder, settings.max_new_tokens, system_prompt=settings.system_prompt)
        for b in benchmarks
    )
    num_tokens = longest + max(*settings.num_draft_tokens, settings.live_num_draft_tokens)
    model = Model.load(target.name, trust_remote_code=target.trust_remote_code)
    for draft in drafts:
        findings = check_pair(draft, model, num_tokens=num_tokens, dtype=target.dtype)
        require(findings)
        for finding in findings:
            if finding.level != OK:
                print(f"draft {draft.name}, target {target.label}: {finding}")


def named_drafts(config: Config) -> dict[str, str]:
    """Path of every draft by its name: evaluate.drafts, or draft.path by the name of its folder."""
    path = config.draft.path
    if path is None:
        return dict(config.evaluate.drafts)
    return {Path(path).name: resolve_draft(path)}


def evaluation_settings(config: Config, drafts: dict[str, str]) -> dict[str, Any]:
    """The settings that decide the result of an evaluation of drafts, path by name."""
    return {
        "drafts": drafts,
        "targets": list(config.targets),
        "evaluate": {**decisive(config.evaluate), "drafts": None},
        "dtype": dtype_name(config.inference.dtype),
        "batch_size": config.inference.batch_size,
        "template_kwargs": dict(config.data.template_kwargs),
        "trust_remote_code": config.model.trust_remote_code,
        "seed": config.seed,
    }


def read_document(config: Config) -> Result | None:
    """The result of this evaluation with the present weights and prompts; None if there is none or it has failures.

    Raises:
        UserError: if the folder holds another evaluation, or a benchmark cannot be read.
    """
    folder = Path(config.output_dir)
    if not (folder / ACCEPTANCE_FILE).exists():
        return None
    drafts = named_drafts(config)
    check_run(folder, evaluation_settings(config, drafts), resume=True)
    document = upgrade(read_json(folder / ACCEPTANCE_FILE))
    return None if document["failures"] or _named_in(document) != _named_now(config, drafts) else document


def _named_in(document: Result) -> set[tuple[str, str, str]]:
    """(kind, name, fingerprint) of every draft, target and benchmark of a result."""
    kinds = ("draft", "target", "benchmark")
    named = {(kind, r[kind], r[f"{kind}_fingerprint"]) for r in document["records"] for kind in kinds}
    return named - {("draft", NO_DRAFT, NO_DRAFT)}


def _named_now(config: Config, drafts: dict[str, str]) -> set[tuple[str, str, str]]:
    """The same of what an evaluation would measure."""
    named = {("draft", name, model_fingerprint(path)) for name, path in drafts.items()}
    targets = {("target", short_name(name, config.targets), model_fingerprint(name)) for name in config.targets}
    benchmarks = load_benchmarks(config.evaluate.benchmarks, config.evaluate.max_prompts)
    return named | targets | {("benchmark", b.name, b.fingerprint) for b in benchmarks}
