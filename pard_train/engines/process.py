"""Start an engine in its own environment, and read its answers: `worker.py` is the other end."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pard_train.engines import worker
from pard_train.engines.worker import Counters, EngineAnswer, EngineRequest, EngineResult
from pard_train.errors import UserError

LOG_FILE = "log.txt"
REQUEST_FILE = "request.json"
RESULT_FILE = "result.json"

# Environment of the engine's process; the user's own variables take precedence.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that we start, and ends with it
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes a large share of the machine's memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes may use the same cores
    "VLLM_NO_USAGE_STATS": "1",
}

NOT_PASSED = ("PYTHONPATH", "PYTHONHOME")  # variables of our environment, not the engine's
PR_SET_PDEATHSIG = 1  # of Linux's prctl

ERROR = re.compile(r"\b\w+(?:Error|Exception): .*")  # of Python, after the prefixes of an engine's log

NAMES = {"vllm": "vLLM", "pace": "PACE"}  # of engines

# (part of an engine's error, remedy)
REMEDIES = (
    (
        "No module named 'vllm'",
        "set engine_python to the Python of an environment with vLLM; for CPUs launch/vllm_cpu.sh makes one",
    ),
    ("No module named 'pace'", "create an environment with launch/pace_cpu.sh; set engine_python=VENV/bin/python"),
    ("same vocabulary size", "export the draft again with targets=[TARGET], which pads its vocabulary"),
    ("For parallel drafting, the draft model config must have", "export the draft with recipes/export.py"),
    ("PARD token must be set", "export the draft with recipes/export.py"),
    ("parallel_drafting", "this vLLM lacks parallel_drafting: install 0.16 or newer"),
    ("index out of range", "pard_token and mask_token_id must be below vocab_size: export the draft again"),
    ("KV cache", "set VLLM_CPU_KVCACHE_SPACE to more GiB (CPU), or free memory of the accelerator"),
    ("max_model_len", "prompt and answer exceed the model's context: lower max_new_tokens, or shorten the prompts"),
)


def run(request: EngineRequest, *, python: str | None, folder: Path, timeout: float) -> EngineResult:
    """Run an engine on prompts, in a separate process.

    Args:
        request: models, prompts and limits.
        python: interpreter of the engine's environment; None is the current one.
        folder: for the request, the result and the engine's log; created if it does not exist.
        timeout: seconds for all prompts together.

    Raises:
        UserError: if it fails or exceeds the timeout; the message names the log and, where known, the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request_path, result_path, log_path = (folder / name for name in (REQUEST_FILE, RESULT_FILE, LOG_FILE))
    fail = partial(failure, log_path=log_path, engine=request.engine)
    result_path.unlink(missing_ok=True)
    request_path.write_text(json.dumps(asdict(request)))
    command = [python or sys.executable, worker.__file__, str(request_path.resolve()), str(result_path.resolve())]
    try:
        with log_path.open("w") as log, engine_process(command, log) as process:
            process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise fail(f"timeout={timeout:g} s exceeded: raise it, or reduce the prompts") from error
    except OSError as error:
        raise fail(f"engine_python={python} cannot be started: {error.strerror}") from error
    if not result_path.exists():
        raise fail(last_words(log_path, process.returncode))
    result = json.loads(result_path.read_text())
    if "error" in result:
        raise fail(result["error"])
    answers = [EngineAnswer(**{**answer, "counters": Counters(**answer["counters"])}) for answer in result["answers"]]
    return EngineResult(result["version"], answers)


@contextlib.contextmanager
def engine_process(command: Sequence[str], log: Any, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session that is killed, with its children, at the end of the block.

    SIGTERM and a closed terminal end the block, too. On Linux the process, not its children, also ends when that which
    started it is killed.

    Args:
        command: whose output goes to `log`.
        variables: of its environment, unless the user has set them.
    """
    environment = {**ENVIRONMENT, **variables, **os.environ}
    for name in NOT_PASSED:
        environment.pop(name, None)
    settings: dict[str, Any] = {"env": environment, "start_new_session": True, "preexec_fn": _end_with_parent}
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **settings) as process:
        is_main = threading.current_thread() is threading.main_thread()
        ends = [
            s for s in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(s) != signal.SIG_IGN
        ]  # nohup
        before = {s: signal.signal(s, lambda number, _: sys.exit(128 + number)) for s in ends}
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_with_parent() -> None:
    """In the engine's process: on Linux, end when the process that started it ends. vLLM may swallow a SIGTERM."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def last_words(log_path: Path, exit_status: int) -> str:
    """How the engine's process ended, and the last error in its log that names a cause, or else its last line."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    errors = [found[0] for line in lines if (found := ERROR.search(line)) and "root cause above" not in line]
    lines = errors or lines
    how = f"was killed by signal {-exit_status}" if exit_status < 0 else f"ended with status {exit_status}"
    return f"it {how}{': ' + lines[-1][:300] if lines else ''}"


def failure(reason: str, log_path: Path, engine: str = "vllm") -> UserError:
    """UserError about an engine that failed, with the remedy where one is known."""
    remedy = next((remedy for symptom, remedy in REMEDIES if symptom in reason), None)
    return UserError(f"the {NAMES[engine]} engine failed: {reason} (log: {log_path}){'; ' + remedy if remedy else ''}")
