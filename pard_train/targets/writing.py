"""Generate missing answers of conversations: with servers, or in the processes of a launcher."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pard_train.config import InferenceConfig
from pard_train.errors import UserError
from pard_train.targets.answers import AnswerCache, prompt_key, split_batches, write_batches
from pard_train.targets.conversation import Conversations, OpenTurn, Refusal
from pard_train.targets.servers import NoServerLeftError, Server, ServerPool, open_servers, run_together


def write_missing(jobs: Sequence[Conversations[Any]], process: PartialState | None = None) -> tuple[dict, int]:
    """Generate every missing answer of conversations into their caches.

    Args:
        jobs: of several targets with the same inference settings.
        process: of a launcher, whose processes share the work; None for a single process.

    Returns:
        What generated the answers, for manifests (`servers` with their models, or `dtype`), and the number of new
        tokens.

    Raises:
        UserError: if no server serves a target, or all of its servers have failed.
    """
    inference = jobs[0].target.inference
    if inference.servers:
        return asyncio.run(_ask_servers(jobs, inference))
    num_tokens = 0
    for job in jobs:
        num_tokens += _generate(job, inference.batch_size, process)
        if len(jobs) > 1:
            job.target.unload()  # one target at a time is in memory
    return {"dtype": jobs[0].target.dtype}, sum(gather_object([num_tokens])) if process else num_tokens


def _generate(job: Conversations[Any], batch_size: int, process: PartialState | None) -> int:
    """Generate this process's share of the missing answers, turn by turn. Returns the number of new tokens."""
    rank, num_ranks = (process.process_index, process.num_processes) if process else (0, 1)
    num_tokens, ended = 0, set[int]()
    while missing := _next_prompts(job, rank, process, ended):
        batches = split_batches(missing, batch_size)[rank::num_ranks]
        with job.open_cache(rank) as cache:
            write_batches(
                job.target.weights,
                missing,
                batches,
                cache,
                limits=job.limits,
                sampling=job.sampling,
                description=job.description if rank == 0 else "",
            )
            num_tokens += cache.num_new_tokens
        _wait(process)
    return num_tokens


def _next_prompts(
    job: Conversations[Any], rank: int, process: PartialState | None, ended: set[int]
) -> dict[str, Sequence[int]]:
    """Prompts by key of the earliest turn with missing answers; the same in all processes.

    Turn by turn, so that an interrupted run forms the same batches again: in bfloat16 an answer may depend on the
    padding of its batch. Conversations that have ended are added to `ended`, and not followed again.
    """
    waiting, number = dict[str, Sequence[int]](), -1
    with job.open_cache(rank) as cache:
        for index, conversation in enumerate(job.start()):
            if index in ended:
                continue
            state = job.follow(conversation, cache)
            if not isinstance(state, OpenTurn):
                ended.add(index)
            elif not waiting or state.number <= number:
                waiting, number = waiting if state.number == number else {}, state.number
                waiting[prompt_key(state.prompt)] = array("i", state.prompt)  # 4 bytes per token
    _wait(process)  # no process writes while another still reads
    return waiting


def _wait(process: PartialState | None) -> None:
    if process:
        process.wait_for_everyone()


async def _ask_servers(jobs: Sequence[Conversations[Any]], inference: InferenceConfig) -> tuple[dict[str, Any], int]:
    """Request the missing answers of all targets concurrently."""
    async with open_servers(inference, jobs[0].target.names, [job.target.name for job in jobs]) as found:
        num_tokens = await run_together(_ask_target(job, found[job.target.name], inference) for job in jobs)
    models = {name: {server.url: server.model for server in servers} for name, servers in found.items()}
    return {"servers": models}, sum(num_tokens)


async def _ask_target(job: Conversations[Any], servers: list[Server], inference: InferenceConfig) -> int:
    """Request the missing answers of one target from its servers. Returns the number of new tokens."""
    pool = ServerPool(
        servers, job.target.tokenizer, job.limits, job.sampling, inference.concurrency, needs_ids=job.needs_ids
    )
    in_flight: dict[str, asyncio.Event] = {}
    with job.open_cache(0) as cache, tqdm(desc=job.description, unit="answer") as bar:
        conversations = job.start()

        async def work() -> None:
            """Follow conversations to their ends until none is left."""
            for conversation in conversations:
                await asyncio.sleep(0)  # thousands of cached answers in a row must not block the other workers
                try:
                    prompt = next(conversation)
                    while True:
                        key = prompt_key(prompt)
                        if key not in cache and key not in job.refusals:
                            await _ask_once(key, prompt, job, cache, pool, in_flight)
                        bar.update()
                        prompt = conversation.send(job.refusals.get(key) or cache[key])
                except StopIteration:
                    continue

        try:
            await run_together(work() for _ in range(pool.num_permits))
        except NoServerLeftError as error:
            raise UserError(
                f"{error}; {len(cache):,} answers are in the cache: run the same command again to resume"
            ) from error
        return cache.num_new_tokens


async def _ask_once(
    key: str,
    prompt: list[int],
    job: Conversations[Any],
    cache: AnswerCache,
    pool: ServerPool,
    in_flight: dict[str, asyncio.Event],
) -> None:
    """Request an answer and cache it. If another conversation has requested the same one, wait for it."""
    if key in in_flight:
        await in_flight[key].wait()
        return
    in_flight[key] = asyncio.Event()
    reply = await pool.ask(prompt)
    if isinstance(reply, Refusal):
        job.refusals[key] = reply
    else:
        cache.add({key: reply})
    in_flight.pop(key).set()
