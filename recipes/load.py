"""Serve a target in vLLM with and without its draft, load the servers, and choose K for the load.

    make vllm     # once: vLLM in its own virtual environment
    python recipes/load.py draft.path=outputs/my-draft/export targets=[Qwen/Qwen2.5-7B-Instruct] \\
        engine_python=.venv-vllm/bin/python num_draft_tokens=[2,4,8] concurrency=[1,4,16] output_dir=outputs/load
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_load


def run(config: Config) -> None:
    """Measure, predict, and print the tables."""
    from pard_train.evaluation.load import LOAD_FILE, measure_load
    from pard_train.reports.load import render_load, write_load

    result = measure_load(config)
    write_load(result, Path(config.output_dir))
    print(f"\n{render_load(result)}\nresult: {config.output_dir}/{LOAD_FILE}")


if __name__ == "__main__":
    hydra_program("load", validate_load, run)
