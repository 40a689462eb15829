"""The real vLLM for slow tests: where its interpreter is, and its server for one model."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pard_train.engines.vllm_server import ServerSettings, VllmServer

ROOT = Path(__file__).parents[1]
START_SECONDS = 300.0  # that a server may take until it answers


def vllm_python() -> str:
    """Interpreter of vLLM's environment: PARD_VLLM_PYTHON, or that of launch/vllm_cpu.sh. Skips without one."""
    python = Path(os.environ.get("PARD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no vLLM: make its environment with launch/vllm_cpu.sh, or set PARD_VLLM_PYTHON")
    return str(python)


def vllm_server(model: Path, log: Path, max_model_len: int) -> VllmServer:
    """A server of one model in float32."""
    settings = ServerSettings(str(model), max_model_len=max_model_len, arguments=["--enforce-eager"])
    return VllmServer(settings, python=vllm_python(), log=log, timeout=START_SECONDS)


def num_answered(server: VllmServer) -> int:
    """Requests that came to their end, none of those that a client left."""
    pattern = r'request_success_total\{.*finished_reason="(?:stop|length)".*\} (\S+)'
    return int(sum(map(float, re.findall(pattern, server.read("metrics") or ""))))
