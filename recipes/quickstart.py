"""The whole job of one experiment: prompts -> answers of the targets -> training -> evaluation -> export -> speed.

    python recipes/quickstart.py experiment=quickstart
    python recipes/quickstart.py experiment=qwen2.5-0.5b            # a GPU node with a model hub

The same command skips finished steps and resumes an interrupted one. A finished step that was made with other settings
is an error. Exit status 3: the trained draft misses a threshold of evaluate.fail_below. Exit status 1: a part of the
evaluation failed.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from pard_train.config import Config, decisive
from pard_train.errors import ThresholdError
from pard_train.program import hydra_program
from pard_train.validation import validate_quickstart


def run(config: Config) -> None:
    """Run the steps in order."""
    from pard_train.data.prompts import PROMPTS_FOLDER, prepare
    from pard_train.device import dtype_name
    from pard_train.evaluation.evaluate import evaluate, on_stand_in
    from pard_train.evaluation.monitor import build_monitor
    from pard_train.fingerprints import model_fingerprint
    from pard_train.model import inspect_base
    from pard_train.publishing.export import check_targets, export
    from pard_train.reports.records import ACCEPTANCE_FILE
    from pard_train.reports.report import PAGE_FILE, render_report, render_speed, tau_below
    from pard_train.runs import CONFIG_FILE, claim_product, read_json
    from pard_train.targets.regeneration import ANSWERS_FILE, ANSWERS_FOLDER, write_answers
    from pard_train.training.inputs import check_output
    from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER, train

    root, started, steps = Path(config.output_dir), time.time(), 6 if config.stand_in.times else 5
    answers, train_dir, evaluation_dir = root / ANSWERS_FOLDER, root / "train", root / "evaluation"

    def step(number: int, what: str) -> None:
        print(f"\n[{number}/{steps}] {what} ({(time.time() - started) / 60:.1f} min so far)", flush=True)

    data = replace(config.data, source=str(answers / ANSWERS_FILE))
    training = replace(config, data=data, output_dir=str(train_dir), resume=(train_dir / CONFIG_FILE).exists())
    check_output(training)
    writing = {**decisive(config.regenerate), "dtype": dtype_name(config.regenerate.dtype or config.inference.dtype)}
    claim_product(train_dir, {"targets": config.targets, **writing})
    check_targets(inspect_base(config.model, config.draft), config.targets)

    step(1, "prompts: select training prompts, hold some out")
    prompts, held_out = prepare(config.prepare, root / PROMPTS_FOLDER, seed=config.seed)

    step(2, f"answers: {', '.join(config.targets)} writes them")
    write_answers(config, prompts, answers)

    step(3, "training: adapt the draft model")
    benchmarks = config.evaluate.benchmarks or [str(path) for path in held_out]
    training = replace(training, evaluate=replace(config.evaluate, benchmarks=benchmarks))
    if not (train_dir / DRAFT_FOLDER).exists():
        train(training, build_monitor(training))

    step(4, "evaluation: acceptance on held-out prompts, before and after")
    drafts = {"before": str(train_dir / INITIAL_FOLDER), "after": str(train_dir / DRAFT_FOLDER)}
    both, measured = replace(config.draft, path=None), replace(training.evaluate, drafts=drafts)
    evaluation = replace(training, draft=both, evaluate=measured, output_dir=str(evaluation_dir))
    document = evaluate(evaluation)
    print("\n" + render_report(document))
    trained = {**document, "records": [record for record in document["records"] if record["draft"] == "after"]}
    if misses := tau_below(trained, config.evaluate.fail_below):
        raise ThresholdError(misses)
    if document["failures"]:
        sys.exit("not exported: a part of the evaluation failed, see the report; the same command retries it")

    step(5, "export: write the folder that engines load, with its model card, and reload it")
    from_here = {"checkpoint": drafts["after"], "acceptance": str(evaluation_dir / ACCEPTANCE_FILE)}
    settings = replace(config.export, **from_here, acceptance_draft="after")
    exported = replace(config, export=settings, output_dir=str(root / "export"))
    evaluated = read_json(evaluation_dir / CONFIG_FILE)
    made_from = {"draft": model_fingerprint(drafts["after"]), "targets": config.targets, "evaluation": evaluated}
    made_from["export"] = decisive(config.export)
    claim_product(root / "export", made_from)
    for folder in export(exported) if not (root / "export").exists() else ():
        print(f"exported and reloaded: {folder}")

    if times := config.stand_in.times:
        step(6, f"speed on a stand-in for a target {times} times the draft's cost: same text, each layer {times} times")
        print(render_speed(evaluate(on_stand_in(evaluation, drafts["after"], root / "stand_in"))))
    pages = f"{evaluation_dir / PAGE_FILE}, {train_dir / PAGE_FILE}"
    print(f"done in {(time.time() - started) / 60:.1f} min; pages: {pages}")


if __name__ == "__main__":
    hydra_program("quickstart", validate_quickstart, run)
