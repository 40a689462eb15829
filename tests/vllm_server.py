"""The real vLLM for slow tests: where its interpreter is, and its OpenAI-compatible server on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType

import pytest
from tiny import free_port

ROOT = Path(__file__).parents[1]
START_SECONDS = 300.0  # that a server may take until it answers


def vllm_python() -> str:
    """Interpreter of vLLM's environment: PARD_VLLM_PYTHON, or that of launch/vllm_cpu.sh. Skips without one."""
    python = Path(os.environ.get("PARD_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
    if not python.exists():
        pytest.skip("no vLLM: make its environment with launch/vllm_cpu.sh, or set PARD_VLLM_PYTHON")
    return str(python)


class VllmServer:
    """vLLM serving one model in float32, in a process group of its own, while its `with` block lasts."""

    def __init__(self, model: Path, log: Path, max_model_len: int):
        port = free_port()
        self.address, self.log = f"http://127.0.0.1:{port}", log
        self.command = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        self.command += ["--dtype", "float32", "--max-model-len", str(max_model_len), "--enforce-eager"]
        self.command += ["--host", "127.0.0.1", "--port", str(port)]

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def __enter__(self) -> VllmServer:
        threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **threads, "VLLM_CPU_KVCACHE_SPACE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.read("v1/models"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"vLLM does not start: {self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    def read(self, page: str) -> str:
        """A page of the server; empty while it is not up."""
        try:
            with urllib.request.urlopen(f"{self.address}/{page}", timeout=10) as response:
                return response.read().decode()
        except OSError:
            return ""

    def num_answered(self) -> int:
        """Requests that came to their end, none of those that a client left."""
        counts = re.findall(
            r'request_success_total\{.*finished_reason="(?:stop|length)".*\} (\S+)', self.read("metrics")
        )
        return int(sum(map(float, counts)))

    def kill(self) -> None:
        """Kill the server and its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
