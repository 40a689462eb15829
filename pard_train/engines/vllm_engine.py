"""vLLM as an engine: greedy answers to prompts of token ids, plain or speculative, with its acceptance counters.

vLLM pins other versions than we do, so it has its own virtual environment (launch/vllm_cpu.sh creates one for CPUs).
`run` starts this file with that environment's Python. So the top of the file imports the standard library only. One
process is one engine, which frees all memory when it ends.

Prompts run one at a time and step by step, so that a difference can be traced to its prompt and step.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

# (part of an error of vLLM, remedy)
REMEDIES = (
    ("No module named 'vllm'", "create an environment with launch/vllm_cpu.sh; set engine_python=VENV/bin/python"),
    ("same vocabulary size", "export the draft again with targets=[TARGET], which pads its vocabulary"),
    ("For parallel drafting, the draft model config must have", "export the draft with recipes/export.py"),
    ("parallel_drafting", "this vLLM lacks parallel_drafting: install 0.16 or newer"),
    ("index out of range", "pard_token and mask_token_id must be below vocab_size: export the draft again"),
    ("KV cache", "set VLLM_CPU_KVCACHE_SPACE to more GiB (CPU), or free memory of the accelerator"),
    ("max_model_len", "prompt and answer exceed the model's context: lower max_new_tokens, or shorten the prompts"),
)


@dataclass(frozen=True)
class EngineRequest:
    """Models, prompts and limits for an engine.

    Attributes:
        target: folder or hub name.
        draft: exported folder; None decodes without draft.
        num_draft_tokens: K.
        prompts: token ids of each.
        max_new_tokens: of each answer.
        end_ids: ids that end an answer; if empty, answers run to the limit.
        dtype: of weights and activations.
        trust_remote_code: run code of the model's folder.
    """

    target: str
    draft: str | None
    num_draft_tokens: int
    prompts: list[list[int]]
    max_new_tokens: int
    end_ids: list[int]
    dtype: str = "float32"
    trust_remote_code: bool = False

    @property
    def num_positions(self) -> int:
        """Context that the engine needs: with less than 2 K positions left, it drafts zeros."""
        return max(map(len, self.prompts)) + self.max_new_tokens + 2 * self.num_draft_tokens + 1


@dataclass(frozen=True)
class Counters:
    """vLLM's counters of speculative decoding: `vllm:spec_decode_*_total`.

    Attributes:
        num_drafts: verified drafts, which is steps after the prefill.
        num_draft_tokens: their tokens.
        num_accepted_tokens: of them, accepted.
        accepted_per_position: drafts whose position i = 1..K was accepted, [K].
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: list[int]

    @classmethod
    def of(cls, accepted: list[int], num_draft_tokens: int) -> Counters:
        """Counters of drafts of K tokens, given the accepted tokens of each.

        >>> Counters.of([2, 0], 3)
        Counters(num_drafts=2, num_draft_tokens=6, num_accepted_tokens=2, accepted_per_position=[1, 1, 0])
        """
        per_position = [sum(a > i for a in accepted) for i in range(num_draft_tokens)]
        return cls(len(accepted), len(accepted) * num_draft_tokens, sum(accepted), per_position)

    @classmethod
    def total(cls, parts: Sequence[Counters]) -> Counters:
        """The sum of one or more."""
        return cls(
            sum(part.num_drafts for part in parts),
            sum(part.num_draft_tokens for part in parts),
            sum(part.num_accepted_tokens for part in parts),
            [sum(column) for column in zip(*(part.accepted_per_position for part in parts), strict=True)],
        )

    def __sub__(self, before: Counters) -> Counters:
        pairs = zip(self.accepted_per_position, before.accepted_per_position, strict=True)
        return Counters(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            [now - then for now, then in pairs],
        )


@dataclass(frozen=True)
class EngineAnswer:
    """An engine's answer to one prompt.

    Attributes:
        token_ids: the answer, its end-of-turn token included.
        accepted: accepted tokens of each verified draft, matches past the end of the answer included.
        drafts: tokens of each verified draft; empty if the engine does not expose them.
        counters: the engine's own, of this prompt.
        seconds: wall-clock, prefill included.
    """

    token_ids: list[int]
    accepted: list[int]
    drafts: list[list[int]]
    counters: Counters
    seconds: float


@dataclass(frozen=True)
class EngineResult:
    """Answers in the order of the prompts, and the engine's version."""

    version: str
    answers: list[EngineAnswer]

    @property
    def counters(self) -> Counters:
        """Counters of all prompts."""
        return Counters.total([answer.counters for answer in self.answers])


# ---------------------------------------------------------------------------------------------------------------------
# Our process
# ---------------------------------------------------------------------------------------------------------------------


def run(request: EngineRequest, *, python: str | None, folder: Path, timeout: float) -> EngineResult:
    """Run vLLM on prompts, in a separate process.

    Args:
        request: models, prompts and limits.
        python: interpreter of vLLM's environment; None is the current one.
        folder: for the request, the result and the engine's log; created if it does not exist.
        timeout: seconds for all prompts together.

    Raises:
        UserError: if it fails or exceeds the timeout; the message names the log and, where known, the remedy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request_path, result_path, log_path = (folder / name for name in (REQUEST_FILE, RESULT_FILE, LOG_FILE))
    result_path.unlink(missing_ok=True)
    request_path.write_text(json.dumps(asdict(request)))
    command = [python or sys.executable, __file__, str(request_path.resolve()), str(result_path.resolve())]
    try:
        with log_path.open("w") as log, _process(command, log) as process:
            process.wait(timeout)
    except subprocess.TimeoutExpired as error:
        raise failure(f"timeout={timeout:g} s exceeded: raise it, or reduce the prompts", log_path) from error
    except OSError as error:
        raise failure(f"engine_python={python} cannot be started: {error.strerror}", log_path) from error
    if not result_path.exists():
        raise failure(last_words(log_path, process.returncode), log_path)
    result = json.loads(result_path.read_text())
    if "error" in result:
        raise failure(result["error"], log_path)
    answers = [EngineAnswer(**{**answer, "counters": Counters(**answer["counters"])}) for answer in result["answers"]]
    return EngineResult(result["version"], answers)


@contextlib.contextmanager
def _process(command: list[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session that is killed, with its children, at the end of the block.

    It also ends when its standard input closes, so it does not outlive us if we are killed.
    """
    environment = {**ENVIRONMENT, **os.environ}
    for name in NOT_PASSED:
        environment.pop(name, None)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
    with subprocess.Popen(command, **pipes, env=environment, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def last_words(log_path: Path, exit_status: int) -> str:
    """How the engine's process ended, and the last line of its log."""
    lines = [line.strip() for line in log_path.read_text(errors="replace").splitlines() if line.strip()]
    how = f"was killed by signal {-exit_status}" if exit_status < 0 else f"ended with status {exit_status}"
    return f"it {how}{': ' + lines[-1][:300] if lines else ''}"


def failure(reason: str, log_path: Path) -> Exception:
    """UserError about an engine that failed, with the remedy where one is known."""
    from pard_train.errors import UserError  # not at the top: the engine's Python may not have pard_train

    remedy = next((remedy for symptom, remedy in REMEDIES if symptom in reason), None)
    return UserError(f"the vLLM engine failed: {reason} (log: {log_path}){'; ' + remedy if remedy else ''}")


# ---------------------------------------------------------------------------------------------------------------------
# The engine's process
# ---------------------------------------------------------------------------------------------------------------------


def work(request: EngineRequest) -> EngineResult:
    """Answer every prompt with vLLM, in this process."""
    import vllm

    llm = vllm.LLM(**engine_arguments(request))
    limits: dict[str, Any] = {"stop_token_ids": request.end_ids} if request.end_ids else {"ignore_eos": True}
    # Sets every value that a model's generation config could change.
    sampling = vllm.SamplingParams(
        temperature=0.0, repetition_penalty=1.0, max_tokens=request.max_new_tokens, detokenize=False, **limits
    )
    answers = [
        _answer(llm, sampling, str(number), ids, request.draft is not None)
        for number, ids in enumerate(request.prompts)
    ]
    return EngineResult(vllm.__version__, answers)


def engine_arguments(request: EngineRequest) -> dict[str, Any]:
    """Arguments of `vllm.LLM`, for exact results rather than speed."""
    arguments: dict[str, Any] = {
        "model": request.target,
        "dtype": request.dtype,
        "max_model_len": request.num_positions,
        "max_num_seqs": 1,
        "enforce_eager": True,  # no compilation
        "enable_prefix_caching": False,  # results do not depend on earlier prompts
        "async_scheduling": False,  # a draft can be read before it is verified
        "disable_log_stats": False,
        "generation_config": "vllm",  # ignores the model's sampling settings
        "trust_remote_code": request.trust_remote_code,
    }
    if request.draft is not None:
        arguments["speculative_config"] = {
            "method": "draft_model",
            "model": request.draft,
            "num_speculative_tokens": request.num_draft_tokens,
            "parallel_drafting": True,
            "max_model_len": request.num_positions,
        }
    return arguments


def _answer(llm: Any, sampling: Any, name: str, prompt_ids: list[int], is_speculative: bool) -> EngineAnswer:
    """One prompt, step by step."""
    engine, first, start = llm.llm_engine, _read_counters(llm, is_speculative), time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt_ids}, sampling)
    token_ids: list[int] = []
    accepted, drafts, before = [], [], first
    while engine.has_unfinished_requests():
        draft = _pending_draft(engine)
        for output in engine.step():
            token_ids = list(output.outputs[0].token_ids)
        now = _read_counters(llm, is_speculative)
        if now.num_drafts > before.num_drafts:
            accepted.append(now.num_accepted_tokens - before.num_accepted_tokens)
            drafts += draft
        before = now
    seconds = time.perf_counter() - start
    return EngineAnswer(token_ids, accepted, drafts, before - first, seconds)


def _read_counters(llm: Any, is_speculative: bool) -> Counters:
    """The engine's counters since it started."""
    if not is_speculative:
        return Counters(0, 0, 0, [])
    found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    drafts, draft_tokens, accepted_tokens = (
        found[name].value for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    return Counters(drafts, draft_tokens, accepted_tokens, list(found["num_accepted_tokens_per_pos"].values))


def _pending_draft(engine: Any) -> list[list[int]]:
    """Draft tokens that the next step verifies, as a list of one draft; empty if the engine does not expose them.

    They are not part of vLLM's interface, and only describe differences.
    """
    try:
        (request,) = engine.engine_core.engine_core.scheduler.requests.values()
        return [list(request.spec_token_ids)]
    except (AttributeError, ValueError):
        return []


def main(request_path: str, result_path: str) -> int:
    """Read a request and write its result. An error goes into the result, its traceback into the log."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = EngineRequest(**json.loads(Path(request_path).read_text()))
    result: dict[str, Any]
    try:
        result = asdict(work(request))
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]}
    partial = Path(result_path + ".partial")
    partial.write_text(json.dumps(result))
    partial.replace(result_path)
    return int("error" in result)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()  # until the parent closes it, or ends
    os._exit(1)


if __name__ == "__main__":
    # Python puts the folder of this file first, which has our modules; its option -P needs 3.11.
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    sys.exit(main(*sys.argv[1:]))
