"""Measure the acceptance length of a draft model.

    python recipes/evaluate.py draft=outputs/my-draft/draft targets=[Qwen/Qwen2.5-7B-Instruct] \\
        benchmarks=[humaneval,gsm8k,mt-bench] output_dir=outputs/my-draft/evaluation
"""

from __future__ import annotations

from pard_train.config import EvaluateConfig
from pard_train.validation import validate_evaluate
from recipes.app import hydra_program


def run(config: EvaluateConfig) -> None:
    """Evaluate and print the report."""
    from pard_train.evaluation import evaluate
    from pard_train.report import render_report

    print(render_report(evaluate(config)))
    print(f"written to {config.output_dir}")


def main() -> None:
    """Entry point of `pard-evaluate`."""
    hydra_program("evaluate", validate_evaluate, run)


if __name__ == "__main__":
    main()
