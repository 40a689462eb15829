"""Chats to fine-tune copies of a target on, so that a family in small has targets that write differently.

    pip install -e '.[benchmarks]'
    python benchmarks/dialects.py --to outputs/family
    python recipes/train.py experiment=quickstart draft.num_draft_tokens=1 objective=pard trainer.max_steps=40 \\
        trainer.learning_rate=1e-4 data.source=outputs/family/essays.jsonl monitor.every_steps=0 \\
        output_dir=outputs/family/essays

With K = 1 a run of recipes/train.py is plain fine-tuning on answers: its draft/ is the target. `essays` holds
instructions with long answers in full sentences, `sums` word problems with terse steps and "#### 42" at the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import reasoning_gym
from chats import real_chats

SEED = 11  # other problems than those of mix.py and of the benchmark of generated maths
Exchange = tuple[str, str]


def essays() -> Iterator[Exchange]:
    """Question and answer of the sample chats in English."""
    for chat in real_chats():
        question, answer = chat["messages"][:2]
        if not chat["tools"] and question["role"] == "user" and question["content"].isascii():
            yield question["content"], answer["content"]


def sums(number: int) -> Iterator[Exchange]:
    """Word problems with the steps that lead to their answer."""
    for puzzle in reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=number):
        yield puzzle["question"], puzzle["metadata"]["answer_cot"]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=400, help="chats of each kind at most")
    parser.add_argument("--to", type=Path, default=Path("outputs/family"), help="folder")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, exchanges in {"essays": essays(), "sums": sums(arguments.number)}.items():
        with (arguments.to / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for question, answer in islice(exchanges, arguments.number):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main()
