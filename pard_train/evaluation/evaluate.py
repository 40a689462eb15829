"""Evaluation: drafts x targets x benchmarks x K x temperature -> acceptance.json, tables and a page.

Each target writes its greedy answers once; replay then gives the exact acceptance of every draft at every K from that
cache. Live runs decode some prompts, for speed and sampling, and check that the output is unchanged. The same command
resumes an interrupted evaluation. A target that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pard_train.config import Config, EvaluateConfig, decisive
from pard_train.data.benchmarks import Benchmark, benchmark_name, load_benchmarks
from pard_train.device import dtype_name
from pard_train.errors import UserError
from pard_train.evaluation.engine_records import engine_records
from pard_train.evaluation.live import live_records, measure_steps, predict_speedup
from pard_train.evaluation.matrix import Matrix
from pard_train.evaluation.measurement import Draft, replay_case, replay_records, sample_outputs
from pard_train.evaluation.speed import Latencies
from pard_train.reports.records import (
    ACCEPTANCE_FILE,
    KINDS,
    PICTURE_FILE,
    PREDICTIONS_FILE,
    SCHEMA_VERSION,
    Record,
    Result,
    distinct,
    scalars,
)
from pard_train.reports.report import PAGE_FILE, SAMPLES_PAGE, write_report
from pard_train.runs import CONFIG_FILE, check_run, claim_run, locked, read_json, write_json
from pard_train.targets.cases import Case, longest_text, write_case
from pard_train.targets.compatibility import OK, Model, check_pair, require
from pard_train.targets.serving import check_engine, check_served
from pard_train.targets.target import Target, load_targets
from pard_train.training.checkpoints import resolve_draft
from pard_train.training.trackers import Outcome, check_trackers, log_outcome
from pard_train.training.trainer import BEST_FOLDER, INITIAL_FOLDER

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
    with locked(Path(config.output_dir)):
        return _evaluate(config)


def _evaluate(config: Config) -> Result:
    matrix, settings = Matrix(config), config.evaluate
    check_trackers(config.logger)
    _check_thresholds(settings)
    benchmarks = load_benchmarks(settings.benchmarks, settings.max_prompts)
    targets, paths = load_targets(config), draft_paths(config)
    drafts = [Draft(name, path, matrix) for name, path in paths.items()]
    for target in targets:
        _check_pairs(drafts, target, benchmarks, settings)
    if settings.engine_python:
        require([check_engine(settings.engine_python)])
    decisive_settings = _settings(config, paths)
    measured = read_json(claim).get("drafts", {}) if (claim := matrix.folder / CONFIG_FILE).is_file() else {}
    known = {name: path for name, path in paths.items() if name in measured} or paths  # more drafts may join them
    check_run(matrix.folder, {**decisive_settings, "drafts": known}, resume=True)
    claim_run(matrix.folder, decisive_settings, asdict(config))

    answered = [_measure_target(matrix, target, drafts, benchmarks) for target in targets]
    records = [record for answers in answered for record in answers.records]
    samples: list[dict[str, Any]] = []
    for draft in drafts:
        for answers in answered:
            _measure_draft(matrix, draft, answers, records, samples)
        draft.unload()
    if not records:
        raise UserError(f"nothing could be measured; the first failure: {matrix.failures[0]['reason']}")
    result = {"schema_version": SCHEMA_VERSION, "records": records, "failures": matrix.failures}
    predictions = [predict_speedup(records, *latency) for answers in answered for latency in answers.latencies]
    for name, content in ((ACCEPTANCE_FILE, result), (PREDICTIONS_FILE, predictions), (SAMPLES_FILE, samples)):
        write_json(matrix.folder / name, content)
    write_report(result, matrix.folder, predictions=predictions, samples=samples)
    for draft in drafts:
        _log_draft(config, records, draft)
    return result


def _log_draft(config: Config, everything: list[Record], draft: Draft) -> None:
    """One W&B run per draft, with columns that line up."""
    folder, name, path = Path(config.output_dir), draft.name, draft.path
    records = [r for r in everything if r["draft"] == name]
    fingerprints = {kind: {r[kind]: r[f"{kind}_fingerprint"] for r in records} for kind in KINDS}
    outcome = Outcome(
        program="evaluate",
        folder=folder,
        values=scalars(records, everything),
        files=[folder / file for file in (PAGE_FILE, SAMPLES_PAGE, PICTURE_FILE)],
        rows=[{k: v for k, v in r.items() if k not in ("groups", "prompt_counts")} for r in records],
        training=draft.run,
        kind={INITIAL_FOLDER: "init", BEST_FOLDER: "best"}.get(Path(path).name, "last"),
        facts={
            "draft_name": name,
            "draft_path": path,
            "fingerprints": fingerprints,
            "dtypes": distinct(r["dtype"] for r in records),
        },
        label=name if config.evaluate.drafts else "",
    )
    log_outcome(config, outcome)


@dataclass
class TargetAnswers:
    """What one target answered, and what was measured while it was in memory.

    Attributes:
        cases: its greedy answers to every benchmark.
        sampled: its answers drawn at temperatures above 0.
        records: of live decoding and of an engine.
        latencies: by the names of draft and target.
    """

    cases: list[Case] = field(default_factory=list)
    sampled: list[Case] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    latencies: list[tuple[dict[str, str], Latencies]] = field(default_factory=list)


def _measure_target(
    matrix: Matrix, target: Target, drafts: Sequence[Draft], benchmarks: Sequence[Benchmark]
) -> TargetAnswers:
    """Have a target write its answers and decode live; then unload it, which makes room for an engine."""
    answers, settings, folder = TargetAnswers(), matrix.settings, matrix.folder
    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "system_prompt": settings.system_prompt}
    write: Callable[..., Case] = partial(write_case, target, folder=folder, **limits)
    for benchmark in benchmarks:
        with matrix.keep_going(target=target.label, benchmark=benchmark.name):
            answers.cases.append(write(benchmark))
            for sampling in map(matrix.sampling, filter(None, settings.temperatures)):
                answers.sampled.append(write(benchmark, sampling=sampling))
    if settings.live_prompts:
        for case in answers.cases:
            answers.records += live_records(matrix, drafts, target, case)
        answers.latencies += measure_steps(matrix, drafts, target, answers.cases)
    target.unload()
    for draft in drafts if settings.engine_python else ():
        for case in answers.cases:
            with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
                answers.records += engine_records(matrix, draft, target, case)
    return answers


def _measure_draft(
    matrix: Matrix, draft: Draft, answers: TargetAnswers, records: list[Record], samples: list[dict[str, Any]]
) -> None:
    """Append the acceptance of one draft on the answers of one target, and sample outputs."""
    for case in (*answers.cases, *answers.sampled):
        with matrix.keep_going(draft=draft.name, target=case.target, benchmark=case.benchmark.name):
            matches, provenance = replay_case(matrix, draft, case)
            records += replay_records(matrix, draft, case, matches, provenance)
            if case.sampling.is_greedy:
                samples += sample_outputs(matrix, draft, case, matches)


# ---- Checks before anything expensive -------------------------------------------------------------------------------


def _check_thresholds(settings: EvaluateConfig) -> None:
    names = [*map(benchmark_name, settings.benchmarks), "all"]
    for name in settings.fail_below:
        if name not in names:
            raise UserError(f"evaluate.fail_below.{name} is not a benchmark: allowed are {', '.join(names)}")


def _check_pairs(
    drafts: Sequence[Draft], target: Target, benchmarks: Sequence[Benchmark], settings: EvaluateConfig
) -> None:
    """Print what an engine or a user should know about each pair. Raises UserError if a pair cannot work."""
    limits: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "system_prompt": settings.system_prompt}
    longest = max(longest_text(benchmark.prompts, target.encoder, **limits) for benchmark in benchmarks)
    num_tokens = longest + max(*settings.num_draft_tokens, settings.live_num_draft_tokens)
    model = Model.load(target.name, trust_remote_code=target.trust_remote_code)
    check = check_served if settings.engine_python else check_pair
    for draft in drafts:
        findings = check(draft.model, model, num_tokens=num_tokens, dtype=target.dtype)
        require(findings)
        for finding in findings:
            if finding.level != OK:
                print(f"draft {draft.name}, target {target.label}: {finding}")


def draft_paths(config: Config) -> dict[str, str]:
    """Draft folder or hub name of every draft by its name: evaluate.drafts, or draft.path by the name of its folder.

    A run folder stands for the better of its drafts.
    """
    path = config.draft.path
    named = dict(config.evaluate.drafts) if path is None else {Path(path).name: path}
    return {name: resolve_draft(path) for name, path in named.items()}


def _settings(config: Config, drafts: dict[str, str]) -> dict[str, Any]:
    """The settings that decide the result of an evaluation."""
    return {
        **decisive(config.evaluate),
        "drafts": drafts,
        "targets": list(config.targets),
        "dtype": dtype_name(config.inference.dtype),
        "batch_size": config.inference.batch_size,
        "template_kwargs": dict(config.data.template_kwargs),
        "trust_remote_code": config.model.trust_remote_code,
        "seed": config.seed,
    }


def on_stand_in(config: Config, draft: str, folder: Path) -> Config:
    """The evaluation of a draft's speed on a stand-in for a larger target: the first target with repeated layers.

    In float32: products of one row in bfloat16 are slow on many CPUs, which would flatter the draft.

    Args:
        config: of a job; its `stand_in` says how.
        draft: its folder.
        folder: output folder.
    """
    settings = config.stand_in
    evaluation = replace(
        config.evaluate,
        drafts={},
        benchmarks=config.evaluate.benchmarks[:1],
        max_prompts=1,
        max_new_tokens=settings.max_new_tokens,
        num_draft_tokens=[settings.num_draft_tokens],
        live_num_draft_tokens=settings.num_draft_tokens,
        live_prompts=1,
        live_methods=["pard"],
        live_batch_sizes=[1],
        live_rounds=settings.num_rounds,
        temperatures=[0.0],
        fail_below={},
    )
    return replace(
        config,
        draft=replace(config.draft, path=draft),
        targets=[f"{config.targets[0]}*{settings.times}"],
        evaluate=evaluation,
        inference=replace(config.inference, dtype="float32"),
        output_dir=str(folder),
    )
