"""The whole job of one experiment: prompts -> target-written answers -> training -> evaluation -> export.

    python recipes/quickstart.py experiment=quickstart
    python recipes/quickstart.py experiment=qwen2.5-0.5b            # a GPU node with a model hub

Restartable: a finished step is skipped, a training run that was cut off goes on from its newest checkpoint. A step that
stands but was made with other settings is an error. Status 3 where the trained draft misses a threshold of
evaluate.fail_below, 1 where a part of the evaluation failed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from pard_train.config import Config, ExportConfig
from pard_train.errors import ThresholdError
from pard_train.program import hydra_program
from pard_train.validation import validate_measurement, validate_prepare, validate_regenerate, validate_train

DECIDES_ANSWERS = ("temperature", "top_p", "max_new_tokens", "dtype")  # of config.regenerate, beside the targets


def validate(config: Config) -> None:
    """Check every section that the steps read."""
    validate_train(config)
    validate_prepare(config.prepare)
    validate_regenerate(config.regenerate)
    validate_measurement("evaluate.", config.evaluate)


def run(config: Config) -> None:
    """Run the steps in order."""
    from pard_train.data.prompts import PROMPTS_FOLDER, prepare
    from pard_train.evaluation.evaluate import evaluate, read_document
    from pard_train.evaluation.monitor import build_monitor
    from pard_train.fingerprints import model_fingerprint
    from pard_train.model import inspect_base
    from pard_train.publishing.export import check_targets, export
    from pard_train.reports.records import ACCEPTANCE_FILE
    from pard_train.reports.report import PAGE_FILE, render_report, tau_below
    from pard_train.runs import CONFIG_FILE, claim_product, read_json
    from pard_train.targets.regeneration import ANSWERS_FILE, ANSWERS_FOLDER, write_answers
    from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER, check_output, train

    root, started = Path(config.output_dir), time.time()
    answers_dir, train_dir, evaluation_dir = root / ANSWERS_FOLDER, root / "train", root / "evaluation"
    targets, template = config.regenerate.targets or [config.model.path], config.data.template_kwargs
    served = list(dict.fromkeys([*targets, *config.evaluate.targets]))

    def step(number: int, what: str) -> None:
        print(f"\n[{number}/5] {what} ({(time.time() - started) / 60:.1f} min so far)", flush=True)

    data = replace(config.data, source=str(answers_dir / ANSWERS_FILE))
    training = replace(config, data=data, output_dir=str(train_dir), resume=(train_dir / CONFIG_FILE).exists())
    check_output(training)
    written_with = {name: getattr(config.regenerate, name) for name in DECIDES_ANSWERS}
    claim_product(train_dir, {"targets": targets, **written_with})
    check_targets(inspect_base(config.model, config.draft), served)

    step(1, "prompts: choose those to train on, hold some out")
    prompts, held_out = prepare(config.prepare, root / PROMPTS_FOLDER, seed=config.seed)

    step(2, f"answers: {', '.join(targets)} writes them")
    write_answers(config.regenerate, targets, prompts, answers_dir, template_kwargs=template, seed=config.seed)

    step(3, "training: adapt the draft model")
    benchmarks = config.evaluate.benchmarks or [str(path) for path in held_out]
    evaluation = replace(config.evaluate, targets=config.evaluate.targets or targets, benchmarks=benchmarks)
    if not (train_dir / DRAFT_FOLDER).exists():
        training = replace(training, evaluate=evaluation)
        train(training, build_monitor(training))

    step(4, "evaluation: acceptance on held-out prompts, before and after")
    drafts = {"before": str(train_dir / INITIAL_FOLDER), "after": str(train_dir / DRAFT_FOLDER)}
    evaluation = replace(evaluation, draft=None, drafts=drafts, output_dir=str(evaluation_dir))
    document = read_document(evaluation) or evaluate(evaluation)
    print("\n" + render_report(document))
    trained = {**document, "records": [record for record in document["records"] if record["draft"] == "after"]}
    if misses := tau_below(trained, evaluation.fail_below):
        raise ThresholdError(misses)
    if document["failures"]:
        sys.exit("not exported: a part of the evaluation failed, see the report; the same command tries it again")

    step(5, "export: write the folder that engines load, with its figures on the card, and load it again")
    acceptance, after = str(evaluation_dir / ACCEPTANCE_FILE), drafts["after"]
    settings = ExportConfig(after, str(root / "export"), served, acceptance=acceptance, acceptance_draft="after")
    evaluated = read_json(evaluation_dir / CONFIG_FILE)
    claim_product(root / "export", {"draft": model_fingerprint(after), "targets": served, "evaluation": evaluated})
    if not (root / "export").exists():
        for folder in export(settings):
            print(f"exported and reloaded: {folder}")
    print(f"done in {(time.time() - started) / 60:.1f} min; open {evaluation_dir / PAGE_FILE} in a browser")


def main() -> None:
    """Entry point of the quickstart."""
    hydra_program("train", validate, run)


if __name__ == "__main__":
    main()
