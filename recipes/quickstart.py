"""The whole job of one experiment: prompts -> target-written answers -> training -> evaluation -> export.

    python recipes/quickstart.py experiment=quickstart
    python recipes/quickstart.py experiment=qwen2.5-0.5b            # a GPU node with a model hub

Restartable: a finished step is skipped, a training run that was cut off goes on from its newest checkpoint. A step that
stands but was made with other settings is an error.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from pard_train.config import ExportConfig, TrainConfig
from pard_train.validation import validate_prepare, validate_regenerate, validate_train
from recipes.app import hydra_program

DECIDES_ANSWERS = ("temperature", "top_p", "max_new_tokens", "dtype")  # of config.regenerate, beside the targets


def validate(config: TrainConfig) -> None:
    """Check every section that the steps read."""
    validate_train(config)
    validate_prepare(config.prepare)
    validate_regenerate(config.regenerate)


def run(config: TrainConfig) -> None:
    """Run the steps in order."""
    from data_scripts.prepare import PROMPTS_FOLDER, prepare
    from data_scripts.regenerate import ANSWERS_FILE, ANSWERS_FOLDER, write_answers
    from pard_train.engines.candidates import write_custom_generate
    from pard_train.evaluation.evaluation import evaluate, read_document
    from pard_train.evaluation.monitor import build_monitor
    from pard_train.evaluation.target_text import model_fingerprint
    from pard_train.publishing.export import export
    from pard_train.reports.records import ACCEPTANCE_FILE
    from pard_train.reports.report import PAGE_FILE, render_report
    from pard_train.run import CONFIG_FILE, claim_product, read_json
    from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER, check_output, train

    root, started = Path(config.output_dir), time.time()
    train_dir, answers_dir = root / "train", root / ANSWERS_FOLDER
    targets, template = config.regenerate.targets or [config.model.path], config.data.template_kwargs

    def step(number: int, what: str) -> None:
        print(f"\n[{number}/5] {what} ({(time.time() - started) / 60:.1f} min so far)", flush=True)

    training = replace(
        config,
        data=replace(config.data, source=str(answers_dir / ANSWERS_FILE)),
        output_dir=str(train_dir),
        resume=(train_dir / CONFIG_FILE).exists(),
    )
    check_output(training)
    written_with = {name: getattr(config.regenerate, name) for name in DECIDES_ANSWERS}
    claim_product(train_dir, {"targets": targets, **written_with})

    step(1, "prompts: choose those to train on, hold some out")
    prompts, held_out = prepare(config.prepare, root / PROMPTS_FOLDER, seed=config.seed)

    step(2, f"answers: {', '.join(targets)} writes them")
    write_answers(config.regenerate, targets, prompts, answers_dir, template_kwargs=template, seed=config.seed)

    step(3, "training: adapt the draft model")
    evaluation = replace(
        config.evaluate,
        targets=config.evaluate.targets or targets,
        benchmarks=config.evaluate.benchmarks or [str(path) for path in held_out],
    )
    if not (train_dir / DRAFT_FOLDER).exists():
        training = replace(training, evaluate=evaluation)
        train(training, build_monitor(training))

    step(4, "evaluation: acceptance on held-out prompts, before and after")
    drafts = {"before": str(train_dir / INITIAL_FOLDER), "after": str(train_dir / DRAFT_FOLDER)}
    evaluation = replace(evaluation, drafts=drafts, output_dir=str(root / "evaluation"))
    document = read_document(evaluation) or evaluate(evaluation)
    print("\n" + render_report(document))

    step(5, "export: write the folder that engines load, with its figures on the card, and load it again")
    evaluated = read_json(root / "evaluation" / CONFIG_FILE)
    claim_product(root / "export", {"draft": model_fingerprint(drafts["after"]), "evaluation": evaluated})
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
