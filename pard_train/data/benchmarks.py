"""Benchmarks: lists of prompts with their exact text, by name or from any JSONL file.

A named benchmark is an entry of NAMED: where its rows come from, which of their columns are asked, and in which words.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from pard_train.config import SourceConfig
from pard_train.data.rows import Row, read_jsonl
from pard_train.data.schemas import SYSTEM_PROMPTS, check_messages, to_chat
from pard_train.data.sources import (
    ALPACA,
    CODEIO,
    GOV_REPORT,
    GSM8K,
    GSM8K_SAMPLE,
    HUMAN_EVAL,
    MATH_500,
    MBPP,
    MT_BENCH,
    SPEC_BENCH,
    Generated,
    Modules,
    Packaged,
    RowSource,
)
from pard_train.errors import RowError, UserError
from pard_train.runs import fingerprint

Messages = tuple[dict[str, Any], ...]

FILE_SUFFIXES = (".jsonl", ".jsonl.gz")
IDS = ("id", "task_id", "question_id")  # of a row of a file; the first that it has


@dataclass(frozen=True)
class Prompt:
    """One conversation that a target carries on: the messages before each of its answers.

    turns[0] may hold a system prompt and earlier messages and ends with a question; later turns are follow-ups.
    """

    id: str  # unique and stable within the benchmark
    turns: tuple[Messages, ...]
    category: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Prompts that acceptance is measured on."""

    name: str  # for tables and file names
    prompts: tuple[Prompt, ...]  # in the order of their source
    source: str  # including its version
    license: str  # of the prompts; `unknown` for a file
    instruction: str  # exact text of a prompt around the source's {question}

    @property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with the text, id or category of any prompt."""
        return fingerprint([asdict(prompt) for prompt in self.prompts])


@dataclass(frozen=True)
class Recipe:
    """How a named benchmark is built from the first rows of its source."""

    source: RowSource
    license: str
    num_prompts: int
    columns: tuple[str, ...]  # the question: texts joined by blank lines, or one list of texts, one per turn
    id: str = ""  # column of the id; if empty, the number of the row
    category: str = ""  # column of the category, if any
    instruction: str = "{question}"  # exact text of a prompt around its {question}
    max_words: int = 0  # a longer question is cut; 0 cuts none
    categories: Mapping[str, str] = field(default_factory=dict)  # new names of some categories


_MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_AS_MT_BENCH = dict.fromkeys(_MT_BENCH_CATEGORIES, "mt_bench")
_PUZZLES = Generated("reasoning-gym==0.1.25", (("gsm_symbolic", 80), ("leg_counting", 20)), seed=42)
_COMPLETE = "Complete the following Python function.\n\n{question}"
_IMPLEMENT = "Write a Python function `main_solution` that does the following.\n\n{question}"
_REASON = "{question}\n\nReason step by step."
_EXPLAIN = (
    "Read this Python module.\n\n```python\n{question}\n```\n\n"
    "Explain line by line how its first function works, then write three pytest tests for it."
)
_SUMMARIZE = "Summarize the following report.\n\n{question}"

NAMED: dict[str, Recipe] = {
    "humaneval": Recipe(Packaged(HUMAN_EVAL), "mit", 164, ("prompt",), id="task_id", instruction=_COMPLETE),
    "gsm8k": Recipe(Packaged(GSM8K_SAMPLE), "mit", 100, ("prompt",), id="id"),
    "gsm8k-test": Recipe(GSM8K, "mit", 1319, ("question",)),
    "math-500": Recipe(MATH_500, "mit", 500, ("problem",), id="unique_id", category="subject"),
    "mbpp": Recipe(MBPP, "cc-by-4.0", 257, ("prompt",), id="task_id"),
    "mt-bench": Recipe(Packaged(MT_BENCH), "apache-2.0", 80, ("turns",), id="question_id", category="category"),
    "alpaca": Recipe(ALPACA, "cc-by-nc-4.0", 80, ("turns",), id="question_id"),
    "spec-bench": Recipe(SPEC_BENCH, "apache-2.0", 480, ("turns",), "question_id", "category", categories=_AS_MT_BENCH),
    "codeio": Recipe(
        Packaged(CODEIO), "apache-2.0", 100, ("task_description", "input_output_spec"), instruction=_IMPLEMENT
    ),
    "generated-maths": Recipe(_PUZZLES, "apache-2.0", 100, ("question",), "id", "category", instruction=_REASON),
    "long-code": Recipe(Modules(HUMAN_EVAL, 24, step=4), "mit", 41, ("module",), id="task_id", instruction=_EXPLAIN),
    "govreport": Recipe(GOV_REPORT, "unknown", 80, ("report",), instruction=_SUMMARIZE, max_words=6000),
}


def check_benchmark(source: str) -> None:
    """Check that a benchmark exists, without reading it. Raises UserError."""
    if source not in NAMED and not (source.endswith(FILE_SUFFIXES) and Path(source).is_file()):
        names = ", ".join(NAMED)
        raise UserError(f"benchmark {source!r}: allowed are {names}, or an existing .jsonl file of prompts")


def benchmark_name(source: str) -> str:
    """Name of a benchmark in results: that in NAMED, or of its file without the suffix."""
    return source if source in NAMED else Path(source).name.partition(".jsonl")[0]


def load_benchmark(source: str, max_prompts: int = 0) -> Benchmark:
    """Load a named benchmark, or the prompts of a (gzipped) JSONL file (see `file_prompt`).

    `max_prompts` are taken round-robin from the categories, the first of each; 0 takes all. Raises UserError for an
    unknown name, a source that cannot be read or a bad row.
    """
    check_benchmark(source)
    if source in NAMED:
        recipe = NAMED[source]
        prompts = _distinct(_named_prompts(source, recipe))
        where, license, instruction = str(recipe.source), recipe.license, recipe.instruction
    else:
        prompts = _distinct((file_prompt(row, origin), origin) for row, origin in read_jsonl(source))
        where, license, instruction = source, "unknown", "{question}"
    if not prompts:
        raise UserError(f"benchmark {source}: no prompts")
    return Benchmark(benchmark_name(source), _share(prompts, max_prompts), where, license, instruction)


def _distinct(prompts: Iterable[tuple[Prompt, str]]) -> list[Prompt]:
    """Prompts of (prompt, origin). Raises RowError where an id stands twice."""
    found: dict[str, tuple[Prompt, str]] = {}
    for prompt, origin in prompts:
        if prompt.id in found:
            raise RowError(origin, f"id {prompt.id!r} stands at {found[prompt.id][1]} too: ids must be unique")
        found[prompt.id] = prompt, origin
    return [prompt for prompt, _ in found.values()]


def _share(prompts: Sequence[Prompt], max_prompts: int) -> tuple[Prompt, ...]:
    """The first prompts of every category, round-robin, in the order of the source; 0 takes all."""
    seen: defaultdict[str, Iterator[int]] = defaultdict(count)
    ranks = sorted((next(seen[prompt.category]), index) for index, prompt in enumerate(prompts))
    return tuple(prompts[index] for index in sorted(index for _, index in ranks[: max_prompts or None]))


def _named_prompts(name: str, recipe: Recipe) -> Iterator[tuple[Prompt, str]]:
    """(prompt, origin). Raises UserError, naming the offline benchmarks, if the source cannot be read."""
    try:
        rows = list(islice(recipe.source.rows(), recipe.num_prompts))
    except UserError as error:
        others = ", ".join(name for name, entry in NAMED.items() if entry.source.is_offline)
        advice = "" if recipe.source.is_offline else f"; without a network there are {others}, and .jsonl files"
        raise UserError(f"benchmark {name}: {error}{advice}") from error
    if len(rows) < recipe.num_prompts:
        raise UserError(f"benchmark {name}: {recipe.num_prompts} rows expected of {recipe.source}, found {len(rows)}")
    return ((_named_prompt(row, number, recipe), origin) for number, (row, origin) in enumerate(rows))


def _named_prompt(row: Row, number: int, recipe: Recipe) -> Prompt:
    first = row[recipe.columns[0]]
    questions = first if isinstance(first, list) else ["\n\n".join(row[column] for column in recipe.columns)]
    texts = [recipe.instruction.replace("{question}", _cut(question, recipe.max_words)) for question in questions]
    category = row[recipe.category] if recipe.category else ""
    name = str(row[recipe.id] if recipe.id else number)
    return Prompt(name, _as_turns(texts), recipe.categories.get(category, category))


def _as_turns(texts: Iterable[str]) -> tuple[Messages, ...]:
    return tuple(({"role": "user", "content": text},) for text in texts)


def _cut(text: str, max_words: int) -> str:
    words = re.match(rf"(\s*\S+){{0,{max_words}}}", text) if max_words else None
    return words.group() if words else text


def file_prompt(row: Row, origin: str) -> Prompt:
    """Prompt of a row of a file: `prompt`, `turns` or `messages`, with an optional id and `category`.

    A last answer among the messages is left out. A row without an id is named by its line (`origin` is FILE:LINE).
    Raises RowError, naming the field and what is allowed.
    """
    forms = [form for form in ("prompt", "turns", "messages") if row.get(form) is not None]
    if len(forms) != 1:
        wanted = "`prompt` (a text), `turns` (a list of texts) and `messages` (a list of {role, content})"
        raise RowError(origin, f"a prompt needs one of {wanted}, found {' and '.join(forms) or 'none'}")
    if forms != ["messages"] and (lost := [name for name in (*SYSTEM_PROMPTS, "tools") if row.get(name)]):
        raise RowError(origin, f"`{lost[0]}` is not read beside `{forms[0]}`: give the chat as `messages`")
    turns = (_history(row, origin),) if forms == ["messages"] else _turns(row, forms[0], origin)
    category = row.get("category")
    if not isinstance(category, str | None):
        raise RowError(origin, f"`category` must be a text, found {category!r:.80}")
    return Prompt(_id(row, origin), turns, category or "")


def _turns(row: Row, form: str, origin: str) -> tuple[Messages, ...]:
    texts = [row[form]] if form == "prompt" else row[form]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        wanted = "a text that is" if form == "prompt" else "a list of texts that are"
        raise RowError(origin, f"`{form}` must be {wanted} not empty, found {row[form]!r:.80}")
    turns = _as_turns(texts)
    for turn in turns:
        check_messages(turn, origin)
    return turns


def _history(row: Row, origin: str) -> Messages:
    chat = to_chat(row, SourceConfig(path=origin, schema="messages"), origin)
    if chat.tools:
        raise RowError(origin, "`tools` cannot be offered to a target: remove them, or the row")
    messages = chat.messages[:-1] if chat.messages[-1]["role"] == "assistant" else chat.messages
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowError(origin, f"`messages` must end with a question, found role {messages[-1]['role']}")
    return tuple(messages)


def _id(row: Row, origin: str) -> str:
    name, value = next(
        ((name, row[name]) for name in IDS if row.get(name) is not None), ("", origin.rpartition(":")[2])
    )
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RowError(origin, f"`{name}` must be a text or a whole number, found {value!r:.80}")
    return str(value)


def load_benchmarks(sources: Sequence[str], max_prompts: int = 0) -> list[Benchmark]:
    """Load several benchmarks. Raises UserError, before any is read, if one does not exist or two have one name."""
    by_name: dict[str, str] = {}
    for source in sources:
        check_benchmark(source)
        name = benchmark_name(source)
        if name == "all":
            raise UserError(f"benchmark {source}: `all` stands for all benchmarks together: rename the file")
        if name in by_name:
            raise UserError(f"benchmarks {by_name[name]} and {source} are both named {name}: rename one of the files")
        by_name[name] = source
    return [load_benchmark(source, max_prompts) for source in sources]
