"""The whole job of one experiment: prompts -> target-written answers -> training -> evaluation -> export.

    python recipes/quickstart.py experiment=quickstart
    python recipes/quickstart.py experiment=qwen2.5-0.5b            # a GPU node with a model hub

Restartable: a finished step is skipped, a training run that was cut off goes on from its newest checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from pard_train.config import ExportConfig, TrainConfig
from pard_train.validation import (
    validate_draft,
    validate_export,
    validate_prepare,
    validate_regenerate,
    validate_train,
)
from recipes.app import hydra_program


def validate(config: TrainConfig) -> None:
    """Check every section that the steps read."""
    validate_train(config)
    validate_prepare(config.prepare)
    validate_regenerate(config.regenerate)
    validate_draft(config.draft)
    validate_export(ExportConfig(checkpoint=config.output_dir, output_dir=config.output_dir))


def run(config: TrainConfig) -> None:
    """Run the steps in order."""
    from data_scripts.prepare import PROMPTS_FOLDER, prepare
    from data_scripts.regenerate import ANSWERS_FOLDER, write_answers
    from pard_train.engines.candidates import write_custom_generate
    from pard_train.evaluation.evaluation import evaluate, read_document
    from pard_train.evaluation.monitor import build_monitor
    from pard_train.publishing.export import export
    from pard_train.reports.records import ACCEPTANCE_FILE
    from pard_train.reports.report import PAGE_FILE, render_report
    from pard_train.run import CONFIG_FILE
    from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER, train

    root, started = Path(config.output_dir), time.time()
    targets = config.regenerate.targets or [config.model.path]

    def step(number: int, what: str) -> None:
        print(f"\n[{number}/5] {what} ({(time.time() - started) / 60:.1f} min so far)", flush=True)

    step(1, "prompts: choose those to train on, hold some out")
    prompts, held_out = prepare(config.prepare, root / PROMPTS_FOLDER, seed=config.seed)

    step(2, f"answers: {', '.join(targets)} writes them")
    answers = write_answers(
        config.regenerate,
        targets,
        prompts,
        root / ANSWERS_FOLDER,
        template_kwargs=config.data.template_kwargs,
        seed=config.seed,
    )

    step(3, "training: adapt the draft model")
    train_dir = root / "train"
    evaluation = replace(
        config.evaluate,
        targets=config.evaluate.targets or targets,
        benchmarks=config.evaluate.benchmarks or [str(path) for path in held_out],
    )
    training = replace(
        config,
        data=replace(config.data, source=str(answers.path)),
        evaluate=evaluation,
        output_dir=str(train_dir),
        resume=(train_dir / CONFIG_FILE).exists(),
    )
    if not (train_dir / DRAFT_FOLDER).exists():
        train(training, build_monitor(training))

    step(4, "evaluation: acceptance on held-out prompts, before and after")
    drafts = {"before": str(train_dir / INITIAL_FOLDER), "after": str(train_dir / DRAFT_FOLDER)}
    evaluation = replace(evaluation, drafts=drafts, output_dir=str(root / "evaluation"))
    document = read_document(evaluation) or evaluate(evaluation)
    print("\n" + render_report(document))

    step(5, "export: write the folder that engines load, with its figures on the card, and load it again")
    if not (root / "export").exists():
        settings = ExportConfig(checkpoint=drafts["after"], output_dir=str(root / "export"), acceptance_draft="after")
        for folder in export(replace(settings, acceptance=str(root / "evaluation" / ACCEPTANCE_FILE))):
            write_custom_generate(folder)
    print(f"done in {(time.time() - started) / 60:.1f} min; open {root / 'evaluation' / PAGE_FILE} in a browser")


def main() -> None:
    """Entry point of the quickstart."""
    hydra_program("train", validate, run)


if __name__ == "__main__":
    main()
