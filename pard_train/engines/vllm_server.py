"""vLLM's OpenAI-compatible server, started and ended here: the engine as people run it."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pard_train.engines.process import engine_process, failure, last_words
from pard_train.engines.worker import Counters, speculative_config

METRIC = re.compile(r"^vllm:spec_decode_(\w+?)_total\{(.*)\} (\S+)$", re.MULTILINE)
POSITION = re.compile(r'position="(\d+)"')
POLL_SECONDS = 0.5
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not find our own server


@dataclass(frozen=True)
class ServerSettings:
    """What a server serves.

    Attributes:
        target: folder or hub name.
        draft: exported folder; None serves the target alone.
        num_draft_tokens: K.
        max_model_len: tokens of context.
        max_num_seqs: requests in a batch at most.
        dtype: of weights and activations.
        arguments: further arguments of the server.
    """

    target: str
    draft: str | None = None
    num_draft_tokens: int = 0
    max_model_len: int = 2048
    max_num_seqs: int = 16
    dtype: str = "float32"
    arguments: Sequence[str] = ()

    def command(self, python: str, port: int) -> list[str]:
        """The command that starts the server."""
        options: dict[str, Any] = {
            "model": self.target,
            "host": "127.0.0.1",
            "port": port,
            "dtype": self.dtype,
            "max-model-len": self.max_model_len,
            "max-num-seqs": self.max_num_seqs,
            "generation-config": "vllm",  # ignores the model's sampling settings
        }
        if self.draft is not None:
            drafting = speculative_config(self.draft, self.num_draft_tokens, self.max_model_len)
            options["speculative-config"] = json.dumps(drafting)
        named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        flags = ["--no-enable-prefix-caching"]  # speeds do not depend on earlier prompts
        flags += ["--disable-hybrid-kv-cache-manager"] * (self.draft is not None)  # as in engine_arguments
        return [python, "-m", "vllm.entrypoints.openai.api_server", *named, *flags, *self.arguments]


class VllmServer:
    """A server in a session of its own, which ends with the `with` block.

    Args:
        settings: what it serves.
        python: interpreter of vLLM's environment; None is the current one.
        log: file of its output.
        timeout: seconds that its start, or a request, may take.
    """

    def __init__(self, settings: ServerSettings, *, python: str | None, log: Path, timeout: float):
        port = _free_port()
        self.settings, self.log, self.timeout = settings, log, timeout
        self.address = f"http://127.0.0.1:{port}"
        self.command = settings.command(python or sys.executable, port)

    @property
    def url(self) -> str:
        """Address for OpenAI clients."""
        return f"{self.address}/v1"

    def __enter__(self) -> VllmServer:
        """Start, and wait until it answers. Raises UserError naming the log if it ends or takes too long."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            log = stack.enter_context(self.log.open("w"))
            try:
                self.process = stack.enter_context(engine_process(self.command, log, OMP_WAIT_POLICY="PASSIVE"))
            except OSError as error:
                python = self.command[0]
                raise failure(f"engine_python={python} cannot be started: {error.strerror}", self.log) from error
            self._wait()
            self._stack = stack.pop_all()
        return self

    def _wait(self) -> None:
        """Wait until the server answers."""
        deadline = time.monotonic() + self.timeout
        while not self.read("health", default=None):
            if (status := self.process.poll()) is not None:
                raise failure(last_words(self.log, status), self.log)
            if time.monotonic() > deadline:
                raise failure(f"timeout={self.timeout:g} s exceeded before the server answers: raise it", self.log)
            time.sleep(POLL_SECONDS)

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, page: str, *, default: str | None = "") -> str | None:
        """A page of the server; the default while it does not answer. An empty page reads as `ok`."""
        try:
            with DIRECT.open(f"{self.address}/{page}", timeout=10) as response:
                return response.read().decode() or "ok"
        except OSError:
            return default

    def counters(self) -> Counters:
        """The counters of speculative decoding since the start; all 0 without a draft. Raises UserError."""
        if (page := self.read("metrics", default=None)) is None:
            raise failure("its page of metrics did not answer within 10 s", self.log)
        return counters_in(page, self.settings.num_draft_tokens)


def counters_in(metrics: str, num_draft_tokens: int) -> Counters:
    """Counters in a page of Prometheus metrics, summed over engines.

    >>> page = 'vllm:spec_decode_num_drafts_total{engine="0"} 3.0'
    >>> counters_in(page, 1)
    Counters(num_drafts=3, num_draft_tokens=0, num_accepted_tokens=0, accepted_per_position=[0])
    """
    totals = {"num_drafts": 0, "num_draft_tokens": 0, "num_accepted_tokens": 0}
    per_position = [0] * num_draft_tokens
    for name, labels, value in METRIC.findall(metrics):
        if position := POSITION.search(labels):
            per_position[int(position[1])] += int(float(value))
        elif name in totals:
            totals[name] += int(float(value))
    return Counters(**totals, accepted_per_position=per_position)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
