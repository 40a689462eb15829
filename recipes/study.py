"""Train several runs that differ in a few settings, and compare what their drafts accept.

    python recipes/study.py experiment=quickstart study=objectives output_dir=outputs/objectives \\
        data.source=outputs/quickstart/answers/answers.jsonl evaluate.benchmarks=[held_out.jsonl]
    python recipes/study.py experiment=qwen2.5-0.5b output_dir=outputs/rates data.source=answers.jsonl seeds=[1,2] \\
        'runs.slow=["trainer.learning_rate=1e-5"]' 'runs.fast=["trainer.learning_rate=1e-4"]'

The same command skips finished runs and resumes an interrupted one. Writes study.md, study.png, runs/ and evaluation/.
Exit status 1: a run failed; the others are compared.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pard_train.config import Config
from pard_train.errors import UserError
from pard_train.program import compose_config, hydra_program, task_overrides
from pard_train.validation import validate_study, validate_train


def run(config: Config) -> None:
    """Train, evaluate, and print the table."""
    from pard_train.evaluation.evaluate import evaluate
    from pard_train.evaluation.study import check_finished, drafts_of, plan_runs, train_run, write_study
    from pard_train.training.inputs import check_output
    from pard_train.training.plan import plan_run

    folder = Path(config.output_dir)
    runs = plan_runs(config.study, task_overrides(), folder)
    trainings = [compose_config(planned.overrides) for planned in runs]
    for training in trainings:
        validate_train(replace(training, study=config.study))
    if config.plan_only:
        for planned, training in zip(runs, trainings, strict=True):
            print(f"{planned.draft}: {plan_run(training).render()}")
        return
    for training in () if config.study.launcher else trainings:  # its processes check
        check_output(training)
    check_finished(runs, trainings)
    failures = [reason for planned in runs if (reason := train_run(planned, config.study.launcher))]
    finished = [planned for planned in runs if planned.is_finished]
    if not finished:
        raise UserError(f"no run was trained: {'; '.join(failures)}")
    place, logger = folder / "evaluation", replace(config.logger, group=config.logger.group or folder.absolute().name)
    measurement = replace(config.evaluate, drafts=drafts_of(finished, place))
    draft = replace(config.draft, path=None)
    result = evaluate(replace(config, draft=draft, evaluate=measurement, logger=logger, output_dir=str(place)))
    print(write_study(result, finished, folder))
    if failures or result["failures"]:
        sys.exit("\n".join(failures) or "a part of the evaluation failed; the same command retries it")


if __name__ == "__main__":
    hydra_program("study", validate_study, run)
