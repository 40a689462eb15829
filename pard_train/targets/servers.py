"""Targets behind OpenAI-compatible servers (vLLM, SGLang): token ids in, token ids out.

Servers receive the ids from our chat encoder, so that the target answers the prompt of the training example.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import openai
from openai import AsyncOpenAI
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from pard_train.config import InferenceConfig
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import Sampling
from pard_train.targets.answers import Answer, prompt_key
from pard_train.targets.conversation import Refusal

Result = TypeVar("Result")

HTTP_LOGGERS = ("httpx", "httpx2")  # of openai before and since its version 3
REFUSALS = (400, 413, 422)  # HTTP codes of a request that no retry will mend, such as a prompt that is too long


@dataclass(frozen=True, eq=False)
class Server:
    """A server, and its name for one target."""

    url: str
    client: AsyncOpenAI
    model: str


class BrokenOffError(Exception):
    """A server ended an answer before the target did."""


class NoServerLeftError(UserError):
    """Every server of a target has failed."""


class AbsentError(UserError):
    """A server does not answer."""


@asynccontextmanager
async def open_servers(
    config: InferenceConfig, targets: Sequence[str], asked: Collection[str]
) -> AsyncIterator[dict[str, list[Server]]]:
    """The servers of each target, matched by the models that they list. Every server serves a single target.

    Args:
        config: addresses, time limit and retries. OPENAI_API_KEY in the environment gives the key.
        targets: names of all targets of the job.
        asked: those that need a server. A server that does not answer is skipped if each has another.

    Raises:
        UserError: if a server serves none of the targets, or a target in `asked` has no server that answers.
    """
    quiet_http()
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
        for name in asked:
            if not found[name]:
                reasons = "; ".join(map(str, absent)) or "add one that does, or leave it out of targets=[...]"
                raise UserError(f"inference.servers: none of {list(config.servers)} serves {name}: {reasons}")
        for reason in absent:
            _print_once(f"skipped: {reason}")
        yield found


def quiet_http() -> None:
    """Keep HTTP clients from logging every request."""
    for name in HTTP_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)


@cache
def _print_once(line: str) -> None:
    """Print a line once, although servers are opened for every benchmark."""
    tqdm.write(line)


async def _served_targets(url: str, client: AsyncOpenAI, targets: Sequence[str]) -> dict[str, str]:
    """The server's model name for each target that it serves."""
    try:
        models = (await client.models.list()).data
    except openai.APIError as error:
        raise AbsentError(
            f"inference.servers: {url} does not list its models ({_reason(error)}): start it, correct the address "
            "(it ends with /v1), or remove it"
        ) from error
    served = {}
    for name in targets:
        wanted = {Path(name).name, Path(name).name.removeprefix("pypi:")}
        matches = [m.id for m in models if name in (m.id, getattr(m, "root", None))]
        if not matches and [Path(other).name for other in targets].count(Path(name).name) == 1:
            matches = [m.id for m in models if wanted & {Path(str(n)).name for n in (m.id, getattr(m, "root", None))}]
        if matches or (len(targets) == 1 and models):
            served[name] = [*matches, models[0].id][0]
    if not served:
        raise UserError(
            f"inference.servers: {url} serves {', '.join(model.id for model in models) or 'nothing'}, which is "
            f"none of targets={list(targets)}: add its model to targets, or remove the server"
        )
    return served


def _reason(error: Exception) -> str:
    """One line about an error: the server's message if it sent one."""
    if isinstance(error, openai.APITimeoutError):
        return "no answer within inference.timeout"
    body = getattr(error, "body", None)
    words = (body.get("message") if isinstance(body, dict) else None) or str(error) or type(error).__name__
    return str(words).splitlines()[0][:300]


class ServerPool:
    """The servers of one target, each with a limit of concurrent requests.

    A server that fails is set aside. If it still answers another prompt, the one that it failed at is refused instead.

    Args:
        servers: of the target.
        tokenizer: of the target.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        concurrency: requests at a time, per server.
        needs_ids: refuse servers that return text alone, since tokenizing it may give other ids than the target's.
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
        self.num_permits = concurrency * len(servers)
        self._alive = set(servers)
        self._permits: asyncio.Queue[Server] = asyncio.Queue()  # one entry per request that may start
        for server in [*servers] * concurrency:
            self._permits.put_nowait(server)

    async def ask(self, prompt: Sequence[int]) -> Answer | Refusal:
        """The answer to one prompt, from the first server with a free permit.

        Raises:
            NoServerLeftError: if every server has failed.
            UserError: if token ids are needed and a server returns none.
        """
        while True:
            server = await self._permits.get()
            if server not in self._alive:
                continue
            try:
                reply = await self._complete(server, prompt)
            except (openai.APIError, BrokenOffError) as error:
                is_about_prompt = isinstance(error, (openai.APIStatusError, openai.APITimeoutError))
                if not (is_about_prompt and await self._is_well(server)):
                    self._set_aside(server, error)
                    continue
                reply = Refusal(_reason(error))
            self._permits.put_nowait(server)
            return reply

    async def _is_well(self, server: Server) -> bool:
        """Whether a server answers a prompt of one token: then an error is that of what it was asked."""
        prompt = [min(self.limits.end_ids)]
        client, settings = server.client.with_options(max_retries=0), self._settings(prompt_key(prompt))
        try:
            await client.completions.create(model=server.model, prompt=prompt, **settings | {"max_tokens": 1})
        except openai.APIError:
            return False
        return True

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
            raise BrokenOffError(f"finish_reason {choice.finish_reason} of an answer")
        ids = getattr(choice, "token_ids", None)
        if ids is None and self.needs_ids:
            raise UserError(
                f"inference.servers: {server.url} returns no token ids, without which replay is not exact: serve "
                f"{server.model} with an engine that supports return_token_ids, such as vLLM, or leave servers empty"
            )
        if ids is None:  # SGLang before July 2026 gives text only, and text is what is trained on
            ids = self.tokenizer(choice.text.rstrip("\ufffd"), add_special_tokens=False)["input_ids"]
        return Answer(ids, is_cut=choice.finish_reason == "length")

    def _settings(self, key: str) -> dict[str, Any]:
        """All sampling settings: engines take missing ones, penalties included, from the model's generation config."""
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
    """Results of all. If one raises, the others are cancelled before its error propagates and closes their clients."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
