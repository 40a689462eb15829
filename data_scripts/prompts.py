"""Choose prompts to train on, and keep some of every kind apart for evaluation.

    python data_scripts/prompts.py experiment=quickstart output_dir=outputs/my-data
    python data_scripts/prompts.py experiment=qwen2.5-0.5b output_dir=outputs/my-data \\
        regenerate.prompts=HuggingFaceH4/ultrachat_200k regenerate.split=train_sft regenerate.num_prompts=20000

Writes OUTPUT_DIR/prompts.jsonl and OUTPUT_DIR/held_out/KIND.jsonl, one {"messages": [...]} a line. No prompt is in both
of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pard_train.benchmarks import load_benchmark, prompt_messages
from pard_train.config import RegenerateConfig, TrainConfig
from pard_train.corpus import read_rows
from pard_train.errors import UserError
from pard_train.validation import validate_regenerate
from recipes.app import hydra_program

PROMPTS_FILE = "prompts.jsonl"
HELD_OUT_FOLDER = "held_out"
EMBEDDED_KINDS = {"code": "humaneval", "maths": "gsm8k", "chat": "mt-bench"}

Messages = list[dict[str, str]]


def write_prompts(config: RegenerateConfig, folder: Path, *, seed: int) -> tuple[Path, list[Path]]:
    """Write the prompts to train on and the held-out ones.

    Args:
        config: where prompts come from and how many.
        folder: where the files go.
        seed: of the split.

    Returns:
        The training prompts, and one file of held-out prompts per kind.

    Raises:
        UserError: for a source that cannot be read, or too few prompts to hold some out.
    """
    training: list[Messages] = []
    held_out: dict[str, list[Messages]] = {}
    for number, (kind, prompts) in enumerate(_prompts_by_kind(config).items()):
        if len(prompts) <= config.num_held_out:
            raise UserError(
                f"regenerate.num_held_out={config.num_held_out}: only {len(prompts)} different prompts of kind {kind}"
            )
        shuffled = _shuffled(prompts, [seed, number])
        held_out[kind] = shuffled[: config.num_held_out]
        training += shuffled[config.num_held_out :]
    files = [_write_rows(folder / HELD_OUT_FOLDER / f"{kind}.jsonl", rows) for kind, rows in held_out.items()]
    return _write_rows(folder / PROMPTS_FILE, _shuffled(training, [seed])[: config.num_prompts]), files


def _prompts_by_kind(config: RegenerateConfig) -> dict[str, list[Messages]]:
    """Distinct prompts per kind. A source of one's own is one kind, of which no more is read than is wanted."""
    if config.prompts == "embedded":
        return {kind: list(_distinct(load_benchmark(name).prompts)) for kind, name in EMBEDDED_KINDS.items()}
    rows = read_rows(config.prompts, config.split)
    first_turns = (_first_turn(prompt_messages(row, origin)) for row, origin in rows)
    return {"prompts": list(islice(_distinct(first_turns), config.num_prompts + config.num_held_out))}


def _first_turn(messages: Messages) -> Messages:
    """Messages up to the first question."""
    stop = next(i for i, message in enumerate(messages) if message["role"] == "user") + 1
    return messages[:stop]


def _distinct(prompts: Iterable[Messages]) -> Iterator[Messages]:
    seen = set()
    for prompt in prompts:
        name = json.dumps(prompt, sort_keys=True)
        if name not in seen:
            seen.add(name)
            yield prompt


def _shuffled(prompts: list[Messages], seed: list[int]) -> list[Messages]:
    return [prompts[i] for i in np.random.default_rng(seed).permutation(len(prompts))]


def _write_rows(path: Path, prompts: list[Messages]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"messages": prompt}, ensure_ascii=False) + "\n" for prompt in prompts))
    return path


def run(config: TrainConfig) -> None:
    """Write the prompts of an experiment and say where."""
    prompts, held_out = write_prompts(config.regenerate, Path(config.output_dir), seed=config.seed)
    print("\n".join(map(str, [prompts, *held_out])))


if __name__ == "__main__":
    hydra_program("data", lambda config: validate_regenerate(config.regenerate), run)
