"""Measure the acceptance length of draft models.

    python recipes/evaluate.py draft.path=outputs/my-draft/export targets=[Qwen/Qwen2.5-7B-Instruct] \\
        benchmarks=[humaneval,gsm8k,mt-bench] output_dir=outputs/my-draft/evaluation

The same command resumes an interrupted evaluation. Exit status 3: a threshold of evaluate.fail_below is missed.
Exit status 1: a part of the matrix failed; the other results are written.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pard_train.config import Config
from pard_train.errors import ThresholdError
from pard_train.program import hydra_program
from pard_train.validation import validate_evaluate


def run(config: Config) -> None:
    """Evaluate, print the report, and check the thresholds."""
    from pard_train.evaluation.evaluate import evaluate
    from pard_train.reports.report import PAGE_FILE, render_report, tau_below

    document, folder = evaluate(config), Path(config.output_dir)
    print(render_report(document))
    print(f"written to {folder}; open {folder / PAGE_FILE} in a browser")
    if misses := tau_below(document, config.evaluate.fail_below):
        raise ThresholdError(misses)
    if document["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    hydra_program("evaluate", validate_evaluate, run)
