"""vLLM under concurrent load, with and without a draft: measured and predicted speed of every K, and K for the load."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import openai
from openai import AsyncOpenAI

from pard_train.acceptance.load import Request, StepTimes, best_k, predict_load, schedules
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, LoadConfig, decisive
from pard_train.data.benchmarks import load_benchmarks
from pard_train.data.chat import ChatEncoder
from pard_train.device import default_device, device_name, dtype_name
from pard_train.downloads import local_model
from pard_train.engines.vllm_server import ServerSettings, VllmServer
from pard_train.errors import UserError, first_line
from pard_train.generation.decoding import end_ids_of
from pard_train.generation.proposers import Drafter
from pard_train.model import DTYPES
from pard_train.runs import check_run, claim_run, locked, provenance, write_json
from pard_train.targets.compatibility import Model, require
from pard_train.targets.servers import quiet_http
from pard_train.targets.serving import check_serving
from pard_train.targets.target import first_target
from pard_train.training.checkpoints import resolve_draft

LOAD_FILE = "load.json"
SCHEMA_VERSION = 1
MIN_REQUESTS = 4  # of a measurement
CALIBRATION_TOKENS = 16  # answered per request of a calibration
SHORT_PROMPT = 32  # tokens, where steps are calibrated and not prefill
NUM_PREFILLS = 3  # the median counts

Ids = list[int]


@dataclass(frozen=True)
class Reply:
    """One streamed answer.

    Attributes:
        token_ids: of the answer.
        start: when it was asked, in seconds.
        arrivals: when each chunk with tokens arrived; a chunk is one step of the engine.
    """

    token_ids: Ids
    start: float
    arrivals: list[float]

    @property
    def first_token_seconds(self) -> float:
        """Time to first token."""
        return self.arrivals[0] - self.start

    @property
    def token_seconds(self) -> float:
        """Inter-token latency: mean time between two tokens."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, len(self.token_ids) - 1)


def measure_load(config: Config) -> dict[str, Any]:
    """Serve the target alone and with the draft at every K, load each server, and predict the same.

    Args:
        config: validated. The first target is used.

    Returns:
        Content of load.json (docs/reference/load-json.md).

    Raises:
        UserError: if draft, target and engine do not fit, or a server fails.
    """
    with locked(Path(config.output_dir)):
        return _measure_load(config)


def _measure_load(config: Config) -> dict[str, Any]:
    settings = replace(config.load, dtype=dtype_name(config.load.dtype))
    folder, trust = Path(config.output_dir), config.model.trust_remote_code
    benchmarks = load_benchmarks(settings.benchmarks, settings.max_prompts)
    names = {"draft": resolve_draft(config.draft.path or ""), "target": first_target(config)}
    decides = {**names, **decisive(settings), "template_kwargs": dict(config.data.template_kwargs)}
    check_run(folder, decides, resume=True)
    draft, target = (Model.load(name, trust_remote_code=trust) for name in names.values())
    encoder = ChatEncoder(target.tokenizer, config.data.template_kwargs)
    prompts = [encoder.encode_prompt(p.turns[0]) for benchmark in benchmarks for p in benchmark.prompts]
    load = Load(settings, prompts, sorted(end_ids_of(target.name, target.tokenizer)))
    findings = check_serving(
        draft,
        target,
        num_tokens=load.max_model_len,
        num_draft_tokens=load.values_of_k[-1],
        dtype=settings.dtype,
        python=settings.engine_python,
    )
    require(findings)
    claim_run(folder, decides)
    served = {k: load.server_settings(target.name, draft.name if k else None, k) for k in load.values_of_k}
    quiet_http()
    version, runs, times = _measure(load, served, folder)
    texts = _compare_texts(runs)
    drafter = Drafter.load(draft.name, dtype=DTYPES[settings.dtype], device=default_device(), trust_remote_code=trust)
    predictions, best = _predict(load, drafter, texts, times)
    result = {
        "schema_version": SCHEMA_VERSION,
        **{key: decides[key] for key in ("draft", "target", "dtype", "max_new_tokens")},
        "engine_version": version,
        "device": device_name(),
        "runs": runs,
        "step_times": asdict(times),
        "predictions": predictions,
        "schedules": schedules(best),
        "provenance": provenance(),
    }
    write_json(folder / LOAD_FILE, result)
    return result


@dataclass(frozen=True)
class Load:
    """What is asked of every server.

    Attributes:
        settings: concurrency, rounds and limits.
        prompts: token ids.
        end_ids: ids that end an answer.
    """

    settings: LoadConfig
    prompts: Sequence[Ids]
    end_ids: Sequence[int]

    @property
    def values_of_k(self) -> list[int]:
        """0, the target alone, and every K to serve."""
        return [0, *sorted(set(self.settings.num_draft_tokens))]

    @property
    def max_model_len(self) -> int:
        """Context of the servers: with less than 2 K tokens left, vLLM drafts zeros."""
        prompt, answer = max(map(len, self.prompts)), self.settings.max_new_tokens
        return max(prompt, SHORT_PROMPT) + max(answer, CALIBRATION_TOKENS) + 2 * self.values_of_k[-1] + 1

    def indexes(self, concurrency: int) -> list[int]:
        """Prompts of the requests, in order; they repeat if there are fewer."""
        number = max(MIN_REQUESTS, self.settings.requests_per_client * concurrency)
        return [index % len(self.prompts) for index in range(number)]

    def server_settings(self, target: str, draft: str | None, num_draft_tokens: int) -> ServerSettings:
        """A server of the target, alone or with the draft at one K."""
        return ServerSettings(
            local_model(target),
            draft and local_model(draft),
            num_draft_tokens,
            max_model_len=self.max_model_len,
            max_num_seqs=max(self.settings.concurrency),
            dtype=self.settings.dtype,
            arguments=self.settings.server_arguments,
        )


# ---- Measurement ----------------------------------------------------------------------------------------------------


def _measure(
    load: Load, served: Mapping[int, ServerSettings], folder: Path
) -> tuple[str, list[dict[str, Any]], StepTimes]:
    """vLLM's version, every measurement of every server, and the times of their steps."""
    version = ""
    runs: list[dict[str, Any]] = []
    seconds: dict[int, dict[int, float]] = {}
    prefill: dict[int, float] = {}
    groups = [list(served)] if load.settings.keep_servers else [[k] for k in served]
    for group in groups:
        with ExitStack() as stack:
            servers = {k: stack.enter_context(_server(load, served[k], folder)) for k in group}
            for k, server in servers.items():
                version = json.loads(server.read("version") or "{}").get("version", "")
                prefill[k], seconds[k] = _calibrate(load, server)
            for round_number, concurrency, k in _in_turn(load, group):
                runs.append(_run(load, servers[k], concurrency) | {"round": round_number})
                _report(runs[-1])
    return version, runs, StepTimes(seconds, prefill, _median_length(load.prompts))


def _server(load: Load, settings: ServerSettings, folder: Path) -> VllmServer:
    name = f"k{settings.num_draft_tokens}" if settings.draft else "plain"
    python, timeout = load.settings.engine_python, load.settings.timeout
    return VllmServer(settings, python=python, log=folder / "servers" / f"{name}.log", timeout=timeout)


def _in_turn(load: Load, group: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(round, concurrency, K) of every measurement; the K that begins rotates, so drift does not favour one."""
    turn = 0
    for round_number in range(load.settings.num_rounds):
        for concurrency in load.settings.concurrency:
            for shift in range(len(group)):
                yield round_number, concurrency, group[(turn + shift) % len(group)]
            turn += 1


def _run(load: Load, server: VllmServer, concurrency: int) -> dict[str, Any]:
    """One measurement: a load of so many clients, with the server's own counters."""
    indexes = load.indexes(concurrency)
    before, start = server.counters(), time.perf_counter()
    prompts, body = [load.prompts[index] for index in indexes], {"stop_token_ids": list(load.end_ids)}
    replies = asyncio.run(_ask(server, prompts, concurrency, load.settings.max_new_tokens, body))
    seconds, counters = time.perf_counter() - start, server.counters() - before
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    return {
        "num_draft_tokens": server.settings.num_draft_tokens,
        "concurrency": concurrency,
        "num_requests": len(replies),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "first_token_seconds": statistics.median(reply.first_token_seconds for reply in replies),
        "token_seconds": statistics.median(reply.token_seconds for reply in replies),
        "counters": asdict(counters),
        "vllm_tau": 1 + counters.num_accepted_tokens / counters.num_drafts if counters.num_drafts else 1.0,
        "texts": [(index, reply.token_ids) for index, reply in zip(indexes, replies, strict=True)],
    }


def _compare_texts(runs: Sequence[dict[str, Any]]) -> dict[int, Ids]:
    """Answers of the target alone by prompt; every run counts how many of its own equal them."""
    texts = dict(text for run in runs if not run["num_draft_tokens"] for text in run["texts"])
    for run in runs:
        own = run.pop("texts")
        run |= {"num_identical": sum(ids == texts[index] for index, ids in own), "num_texts": len(own)}
    return texts


def _report(run: Mapping[str, Any]) -> None:
    draft = f"K = {run['num_draft_tokens']}" if run["num_draft_tokens"] else "no draft"
    print(f"{run['concurrency']} clients, {draft}: {run['tokens_per_second']:.1f} tokens/s", flush=True)


def _calibrate(load: Load, server: VllmServer) -> tuple[float, dict[int, float]]:
    """Seconds to prefill a prompt of median length, and of a step by batch size, on texts other than the load's."""
    draws, vocabulary = np.random.default_rng(0), sorted({token for prompt in load.prompts for token in prompt})

    def ask(number: int, length: int) -> list[Reply]:
        prompts = draws.choice(vocabulary, (number, length)).tolist()
        return asyncio.run(_ask(server, prompts, number, CALIBRATION_TOKENS, {"ignore_eos": True}))

    ask(1, SHORT_PROMPT)  # warm-up
    alone = [ask(1, _median_length(load.prompts))[0] for _ in range(NUM_PREFILLS)]
    seconds = {1: statistics.median(_step_seconds([reply]) for reply in alone)}
    seconds |= {b: _step_seconds(ask(b, SHORT_PROMPT)) for b in load.settings.concurrency if b > 1}
    return statistics.median(reply.first_token_seconds for reply in alone), seconds


def _step_seconds(replies: Sequence[Reply]) -> float:
    """Median time between two chunks, from when all have begun."""
    begun = max(reply.arrivals[0] for reply in replies)
    gaps = [b - a for reply in replies for a, b in pairwise(reply.arrivals) if a >= begun]
    return statistics.median(gaps or [b - a for reply in replies for a, b in pairwise(reply.arrivals)])


def _median_length(prompts: Sequence[Ids]) -> int:
    return int(np.median([len(prompt) for prompt in prompts]))


async def _ask(
    server: VllmServer, prompts: Sequence[Ids], concurrency: int, max_tokens: int, body: Mapping[str, Any]
) -> list[Reply]:
    """Replies in the order of the prompts, with so many in flight. Raises UserError if the server fails."""
    body = {"return_token_ids": True, "repetition_penalty": 1.0, "skip_special_tokens": False, **body}
    key = os.environ.get("OPENAI_API_KEY") or "none"
    numbered = iter(enumerate(prompts))
    replies: dict[int, Reply] = {}
    direct = openai.DefaultAsyncHttpxClient(trust_env=False)  # as in `VllmServer.read`
    async with AsyncOpenAI(
        base_url=server.url, api_key=key, timeout=server.timeout, max_retries=2, http_client=direct
    ) as client:

        async def _ask_in_turn() -> None:
            for number, prompt in numbered:
                reply = replies[number] = Reply([], time.perf_counter(), [])
                stream = await client.completions.create(
                    model=server.settings.target,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    temperature=0.0,
                    stream=True,
                    extra_body=body,
                )
                async for chunk in stream:
                    if chunk.choices and (ids := getattr(chunk.choices[0], "token_ids", None)):
                        reply.token_ids.extend(ids)
                        reply.arrivals.append(time.perf_counter())

        try:
            await asyncio.gather(*(_ask_in_turn() for _ in range(concurrency)))
        except openai.APIError as error:
            raise UserError(f"the vLLM server failed: {first_line(error)[:300]} (log: {server.log})") from error
    return [replies[number] for number in range(len(prompts))]


# ---- Prediction -----------------------------------------------------------------------------------------------------


def _predict(
    load: Load, drafter: Drafter, texts: Mapping[int, Ids], times: StepTimes
) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Predictions of every K and concurrency, from replay of the target's own answers, and the best K of each."""
    used = sorted(texts)
    pairs = [(load.prompts[index], texts[index]) for index in used]
    matches = replay_all(drafter, pairs, load.values_of_k[-1], description="replay")
    requests = {
        index: Request(len(load.prompts[index]), found.tolist()) for index, found in zip(used, matches, strict=True)
    }
    rows, best = [], {}
    for concurrency in load.settings.concurrency:
        own = predict_load([requests[i] for i in load.indexes(concurrency)], times, concurrency)
        best[concurrency] = best_k(own)
        rows += [row | {"is_best": row["num_draft_tokens"] == best[concurrency]} for row in own]
    return rows, best
