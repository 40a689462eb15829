"""Compare two or more results of recipes/evaluate.py, or training runs; status 3 where a later one falls behind.

    python recipes/compare.py results.main=outputs/main/evaluation results.mine=outputs/mine/evaluation \\
        min_ratio=0.98 output_dir=outputs/comparison
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.errors import ThresholdError
from pard_train.program import hydra_program
from pard_train.validation import validate_compare


def run(config: Config) -> None:
    """Compare, print the table, and check the ratios."""
    from pard_train.reports.comparison import COMPARISON_PAGE, compare
    from pard_train.training.trackers import Outcome, check_trackers, log_outcome

    settings, folder = config.compare, Path(config.output_dir)
    check_trackers(config.logger)
    compared = compare(settings.results, folder, min_ratio=settings.min_ratio)
    print(compared.text)
    print(f"written to {folder}; open {folder / COMPARISON_PAGE} in a browser")
    log_outcome(config, Outcome("compare", folder, compared.values, files=[folder / COMPARISON_PAGE]))
    if compared.misses:
        raise ThresholdError(compared.misses)


if __name__ == "__main__":
    hydra_program("compare", validate_compare, run)
