"""Inspect training examples before a training run.

    python data_scripts/show.py experiment=qwen2.5-0.5b data.source=answers.jsonl row=3 picture=true

Checks the first show.num_checked rows, then prints one row: its tokens in colors (FORCE_COLOR=1 keeps them in a pipe),
the slots they become, and on request their attention pattern. Loads no weights and stores no tokens.
"""

from __future__ import annotations

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_show


def run(config: Config) -> None:
    """Check the data, print a row and its attention pattern."""
    from pard_train.data.inspection import show_examples

    show_examples(config)


if __name__ == "__main__":
    hydra_program("show", validate_show, run)
