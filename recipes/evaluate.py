"""Measure the acceptance length of a draft model.

    python recipes/evaluate.py draft=outputs/my-draft/draft targets=[Qwen/Qwen2.5-7B-Instruct] \\
        benchmarks=[humaneval,gsm8k,mt-bench] output_dir=outputs/my-draft/evaluation

The same command goes on where it was stopped. Status 3 where a threshold of fail_below is missed, 1 where a part of the
matrix failed; what could be measured is written all the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pard_train.config import EvaluateConfig
from pard_train.errors import ThresholdError
from pard_train.program import hydra_program
from pard_train.validation import validate_evaluate


def run(config: EvaluateConfig) -> None:
    """Evaluate, print the report, and check the thresholds."""
    from pard_train.evaluation.evaluate import evaluate
    from pard_train.reports.report import PAGE_FILE, render_report, tau_below
    from pard_train.training.trackers import log_evaluation

    document = evaluate(config)
    folder = Path(config.output_dir or "")
    print(render_report(document))
    print(f"written to {folder}; open {folder / PAGE_FILE} in a browser")
    log_evaluation(config.logger, folder.name, document, folder / PAGE_FILE)
    if misses := tau_below(document, config.fail_below):
        raise ThresholdError(misses)
    if document["failures"]:
        sys.exit(1)


def main() -> None:
    """Entry point of `pard-evaluate`."""
    hydra_program("evaluate", validate_evaluate, run)


if __name__ == "__main__":
    main()
