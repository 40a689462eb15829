"""Targets behind OpenAI-compatible servers (vLLM, SGLang): token ids go in, token ids come out.

A server reads the very ids that our own chat encoder rendered, so what a target was asked is what is trained on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import openai
from openai import AsyncOpenAI
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.targets.answers import GREEDY, Answer, AnswerCache, Refusal, Sampling, prompt_key

Result = TypeVar("Result")

HTTP_LOGGERS = ("httpx", "httpx2")  # of openai before and since its version 3
REFUSALS = (400, 413, 422)  # HTTP codes that blame the request: too long, above all


class ServerSettings(Protocol):
    """What RegenerateConfig and EvaluateConfig say of servers."""

    servers: list[str]
    concurrency: int
    timeout: float
    max_retries: int


@dataclass(frozen=True, eq=False)
class Server:
    """A server and the name that it gives to one target."""

    url: str
    client: AsyncOpenAI
    model: str


class BrokenOffError(Exception):
    """A server ended an answer before the target did."""


class NoServerLeftError(UserError):
    """Every server of a target has failed."""


class AbsentError(UserError):
    """A server that does not answer."""


@asynccontextmanager
async def open_servers(
    config: ServerSettings, targets: Mapping[str, str], asked: Collection[str] | None = None
) -> AsyncIterator[dict[str, list[Server]]]:
    """The servers of each target, by the models that they list. A single target is served by every server.

    Args:
        config: addresses, time limit and retries. The key comes from the environment: OPENAI_API_KEY.
        targets: folder or hub name of each target, by the name that the user gave it.
        asked: names of those that must have a server; None takes all. A server that does not answer is set aside as
            long as each of them has another.

    Raises:
        UserError: if a server serves none of the targets, or a target that is asked has no server that answers.
    """
    for name in HTTP_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every request
    key = os.environ.get("OPENAI_API_KEY") or "none"
    found: dict[str, list[Server]] = {name: [] for name in targets}
    absent: list[AbsentError] = []
    async with AsyncExitStack() as stack:
        for url in config.servers:
            client = AsyncOpenAI(base_url=url, api_key=key, timeout=config.timeout, max_retries=config.max_retries)
            await stack.enter_async_context(client)
            try:
                served = await _served_targets(url, client, targets)
            except AbsentError as error:
                absent.append(error)
                continue
            for name, model in served.items():
                found[name].append(Server(url, client, model))
        for name in targets if asked is None else asked:
            if not found[name]:
                reasons = "; ".join(map(str, absent)) or "start one"
                raise UserError(f"targets: no server of {list(config.servers)} serves {name}: {reasons}")
        for reason in absent:
            _say_once(f"set aside: {reason}")
        yield found


@cache
def _say_once(line: str) -> None:
    """Print a line the first time: servers are opened for every benchmark and turn."""
    tqdm.write(line)


async def _served_targets(url: str, client: AsyncOpenAI, targets: Mapping[str, str]) -> dict[str, str]:
    """Name of the model that stands for each target on a server."""
    try:
        models = (await client.models.list()).data
    except openai.APIError as error:
        raise AbsentError(
            f"servers: {url} does not list its models ({_reason(error)}): start it, mend the address "
            "(it ends with /v1), or take it off the list"
        ) from error
    served = {}
    for name, path in targets.items():
        wanted = {Path(name).name, Path(path).name}
        matches = [m.id for m in models if wanted & {Path(str(n)).name for n in (m.id, getattr(m, "root", None))}]
        if matches or (len(targets) == 1 and models):
            served[name] = [*matches, models[0].id][0]
    if not served:
        raise UserError(
            f"servers: {url} serves {', '.join(model.id for model in models) or 'nothing'}, which is "
            f"none of targets={list(targets)}: name its model there, or take it off the list"
        )
    return served


def _reason(error: Exception) -> str:
    """What went wrong, in one line: the server's own words if it gave any."""
    body = getattr(error, "body", None)
    words = (body.get("message") if isinstance(body, dict) else None) or str(error) or type(error).__name__
    return str(words).splitlines()[0][:300]


class ServerPool:
    """The servers of one target: each has at most so many requests under way, and one that fails is set aside.

    Args:
        servers: of the target.
        tokenizer: of the target.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        concurrency: requests under way at each server.
        needs_ids: text alone will not do, as tokenizing it may give other tokens than the target's.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        sampling: Sampling,
        concurrency: int,
        *,
        needs_ids: bool = False,
    ):
        self.tokenizer, self.limits, self.sampling, self.needs_ids = tokenizer, limits, sampling, needs_ids
        self.num_slots = concurrency * len(servers)
        self._alive = set(servers)
        self._slots: asyncio.Queue[Server] = asyncio.Queue()  # one entry per request that may start
        for server in [*servers] * concurrency:
            self._slots.put_nowait(server)

    async def ask(self, prompt: Sequence[int]) -> Answer | Refusal:
        """The answer to one prompt, from whichever server is free.

        Raises:
            NoServerLeftError: if every server has failed.
            UserError: if token ids are needed and a server returns none.
        """
        while True:
            server = await self._slots.get()
            if server not in self._alive:
                continue
            try:
                reply = await self._complete(server, prompt)
            except (openai.APIError, BrokenOffError) as error:
                self._set_aside(server, error)
                continue
            self._slots.put_nowait(server)
            return reply

    async def _complete(self, server: Server, prompt: Sequence[int]) -> Answer | Refusal:
        try:
            completion = await server.client.completions.create(
                model=server.model, prompt=list(prompt), **self._settings(prompt_key(prompt))
            )
        except openai.APIStatusError as error:
            if error.status_code in REFUSALS:
                return Refusal(_reason(error))
            raise
        choice = completion.choices[0]
        if choice.finish_reason not in ("stop", "length"):  # vLLM and SGLang: abort, when they are shut down
            raise BrokenOffError(f"it ended an answer with finish_reason {choice.finish_reason}")
        ids = getattr(choice, "token_ids", None)
        if ids is None and self.needs_ids:
            raise UserError(
                f"servers: {server.url} returns no token ids, without which replay is not exact: serve {server.model} "
                "with an engine that knows return_token_ids, as vLLM does, or leave servers empty"
            )
        if ids is None:  # SGLang before July 2026 gives text only, and text is what is trained on
            ids = self.tokenizer(choice.text, add_special_tokens=False)["input_ids"]
        return Answer(ids, is_cut=choice.finish_reason == "length")

    def _settings(self, key: str) -> dict[str, Any]:
        """Every setting by name: engines fill those left out from the model's generation config, penalties and all."""
        return {
            "max_tokens": self.limits.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed_of(key),
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "extra_body": {
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(self.limits.end_ids),
                "skip_special_tokens": False,
                "return_token_ids": True,
            },
        }

    def _set_aside(self, server: Server, error: Exception) -> None:
        if server in self._alive:
            self._alive.remove(server)
            tqdm.write(f"{server.url} is set aside: {_reason(error)}")
        if not self._alive:
            raise NoServerLeftError(f"no server of {server.model} is left: {_reason(error)}")


async def run_together(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all. If one fails the others are ended before its error goes on: they use what will be closed."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ask_all(
    config: ServerSettings,
    targets: Mapping[str, str],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[int]],
    answers: AnswerCache,
    *,
    limits: Limits,
    description: str,
) -> None:
    """Have the servers of one target answer prompts greedily into a cache, each answer kept as it comes.

    Args:
        config: the servers.
        targets: folder or hub name of every target that they serve, by name.
        name: of the one that answers.
        tokenizer: its tokenizer.
        prompts: ids by key.
        answers: what they are added to.
        limits: when an answer ends.
        description: shown beside the progress bar.

    Raises:
        UserError: if a server refuses a prompt or returns no token ids, or all have failed.
    """

    async def ask(pool: ServerPool, key: str, bar: tqdm) -> None:
        reply = await pool.ask(prompts[key])
        if isinstance(reply, Refusal):
            raise UserError(f"servers: {name} refuses a prompt of {len(prompts[key])} tokens: {reply.reason}")
        answers.add({key: reply})
        bar.update()

    async def run() -> None:
        async with open_servers(config, targets, [name]) as found:
            pool = ServerPool(found[name], tokenizer, limits, GREEDY, config.concurrency, needs_ids=True)
            with tqdm(total=len(prompts), desc=description, unit="answer") as bar:
                await run_together(ask(pool, key, bar) for key in prompts)

    asyncio.run(run())
