"""Answers that target models write to the prompts of a file, turn by turn, kept in a cache as they come."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from pard_train.config import RegenerateConfig, SourceConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.rows import read_jsonl, source_version
from pard_train.data.schemas import SYSTEM_PROMPTS, to_chat
from pard_train.device import default_device, this_process
from pard_train.downloads import local_model
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.generation.decoding import Limits, end_ids_of
from pard_train.model import DTYPES, load_causal_lm, load_tokenizer
from pard_train.runs import MANIFEST_FILE, fingerprint, provenance, read_json, write_json
from pard_train.targets.answers import (
    GREEDY,
    Answer,
    AnswerCache,
    Conversation,
    Refusal,
    Sampling,
    converse,
    prompt_key,
    questions,
    split_batches,
    write_batches,
)
from pard_train.targets.servers import NoServerLeftError, Server, ServerPool, open_servers, run_together

PROMPTS_FILE = "prompts/train.jsonl"
ANSWERS_FOLDER = "answers"
ANSWERS_FILE = "answers.jsonl"
REJECTS_FILE = "rejects.jsonl"
CACHE_FOLDER = "target_text"

Row = dict[str, Any]


@dataclass(frozen=True)
class Written:
    """What `write_answers` made.

    Attributes:
        path: the file of answers.
        manifest: what it was made with, and counts that add up: rows = answered + rejected.
    """

    path: Path
    manifest: dict[str, Any]

    def summary(self) -> str:
        """One line of counts."""
        return (
            "{rows:,} rows -> {answered:,} conversations with {answers:,} answers ({cut:,} cut by the length limit), "
            "{rejected:,} rejected; {new_tokens:,} new tokens, {tokens_per_second:,.0f} tokens/s"
        ).format(**self.manifest["counts"])


class Target:
    """One target model: which conversations are its own, how it is asked, and where its answers are kept.

    Args:
        name: folder or hub name, as the user gave it.
        rows: reads the conversations that belong to it.
        config: limits, sampling and backend.
        folder: where the cache goes.
        template_kwargs: extra arguments of the chat template.
        seed: of sampling.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterator[Row]],
        config: RegenerateConfig,
        folder: Path,
        template_kwargs: dict[str, Any],
        seed: int,
    ):
        self.name, self.rows, self.path = name, rows, local_model(name)
        self.title = f"{Path(self.path).name} answers"  # of progress bars
        self.tokenizer = load_tokenizer(self.path)
        self.encoder = ChatEncoder(self.tokenizer, template_kwargs)
        self.limits = Limits(config.max_new_tokens, end_ids_of(self.path, self.tokenizer))
        self.sampling = Sampling(config.temperature, config.top_p, seed) if config.temperature else GREEDY
        self.fingerprint = model_fingerprint(self.path)
        backend = "servers" if config.servers else config.dtype
        limits = [config.max_new_tokens, sorted(self.limits.end_ids)]
        self.folder = folder / CACHE_FOLDER / fingerprint([self.fingerprint, limits, asdict(self.sampling), backend])
        self.refusals: dict[str, Refusal] = {}  # by prompt key, of this run: another server may take these prompts

    def open_cache(self, rank: int = 0) -> AnswerCache:
        """Answers of all processes, now and earlier; new ones go to the file of this rank."""
        return AnswerCache(self.folder / f"rank-{rank}.jsonl", self.folder.glob("rank-*.jsonl"))


class OpenTurn(NamedTuple):
    """Where a conversation waits for an answer."""

    number: int  # of the turn, from 0
    prompt: list[int]


def follow(row: Row, target: Target, cache: Mapping[str, Answer]) -> OpenTurn | Conversation:
    """The conversation of a row, or the first turn of it whose answer is not known yet."""
    talk, number = converse(row, target.encoder, target.limits), 0
    try:
        prompt = next(talk)
        while reply := target.refusals.get(key := prompt_key(prompt)) or cache.get(key):
            prompt, number = talk.send(reply), number + 1
    except StopIteration as end:
        return end.value
    return OpenTurn(number, prompt)


# ---------------------------------------------------------------------------------------------------------------------
# All conversations
# ---------------------------------------------------------------------------------------------------------------------


def write_answers(
    config: RegenerateConfig,
    targets: list[str],
    prompts_file: Path,
    folder: Path,
    *,
    template_kwargs: dict[str, Any],
    seed: int,
) -> Written:
    """Have the targets answer every conversation of a file.

    Args:
        config: servers or settings of generation in this process, sampling and limits.
        targets: folders or hub names. A hash of its questions decides which of them a conversation belongs to.
        prompts_file: JSONL of chats.
        folder: where answers, rejects, manifest and the cache go.
        template_kwargs: extra arguments of the chat template.
        seed: of sampling.

    Returns:
        What was made.

    Raises:
        UserError: at a bad row or a server that does not fit, before anything is asked; if all servers of a target
            fail; or if no conversation got an answer.
    """
    process = this_process()
    if config.servers and process.num_processes > 1:
        raise UserError("regenerate.servers are asked by one process: start it without torchrun")
    if prompts_file.resolve() == (folder / ANSWERS_FILE).resolve():
        raise UserError(f"regenerate.prompts={prompts_file} would be overwritten: choose another output_dir")
    _check_shared(folder, process)
    for _ in read_chats(prompts_file):
        pass
    shares = [partial(_share, prompts_file, number, len(targets)) for number in range(len(targets))]
    writers = [Target(*pair, config, folder, template_kwargs, seed) for pair in zip(targets, shares, strict=True)]
    start = time.time()
    if config.servers:
        backend, num_tokens = asyncio.run(_ask_servers(writers, config))
    else:
        backend, num_tokens = _generate_here(writers, config, process)
    speed = {"new_tokens": num_tokens, "tokens_per_second": num_tokens / (time.time() - start)}
    if process.is_main_process:
        manifest = {
            "prompts": {"path": str(prompts_file), "version": source_version(SourceConfig(path=str(prompts_file)))},
            "targets": {target.name: target.fingerprint for target in writers},
            **backend,
            **{name: getattr(config, name) for name in ("temperature", "top_p", "max_new_tokens")},
            "seed": seed,
            "template_kwargs": template_kwargs,
            "counts": {**_assemble(prompts_file, writers, folder), **speed},
            "files": {ANSWERS_FILE: source_version(SourceConfig(path=str(folder / ANSWERS_FILE)))},
            "made_by": provenance(),
        }
        write_json(folder / MANIFEST_FILE, manifest)
    process.wait_for_everyone()
    return Written(folder / ANSWERS_FILE, read_json(folder / MANIFEST_FILE))


def read_chats(prompts_file: Path) -> Iterator[tuple[Row, str]]:
    """Rows and where they stand, with `messages` and `tools` as data_scripts/encode.py will read them.

    Raises:
        RowError: at the first row without a chat.
    """
    source = SourceConfig(path=str(prompts_file), schema="messages")
    for row, origin in read_jsonl(prompts_file):
        chat = to_chat(row, source, origin)
        rest = {name: value for name, value in row.items() if name not in (*SYSTEM_PROMPTS, "tools")}
        yield {**rest, "messages": chat.messages, **({"tools": chat.tools} if chat.tools else {})}, origin


def _check_shared(folder: Path, process: PartialState) -> None:
    """Check that all processes see one folder: each would take its own answers for all there are, and wait for ever.

    Raises:
        UserError: in every process.
    """
    if process.num_processes == 1:
        return
    (name,) = broadcast_object_list([uuid.uuid4().hex])
    sign = folder / f".shared-{name}"
    if process.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        sign.touch()
    process.wait_for_everyone()
    is_seen = gather_object([sign.exists()])
    if process.is_main_process:
        sign.unlink()
    if not all(is_seen):
        raise UserError(
            f"{folder}: {is_seen.count(False)} of {process.num_processes} processes do not see this folder of the first"
            " one: choose an output_dir on a disk that all nodes share, or run on one node"
        )


def _owner(row: Row, num_targets: int) -> int:
    """Number of the target that a conversation belongs to: equal shares, whatever else is in the file."""
    asked = json.dumps(questions(row["messages"]), sort_keys=True)
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), "big") % num_targets


def _share(prompts_file: Path, number: int, num_targets: int) -> Iterator[Row]:
    return (row for row, _ in read_chats(prompts_file) if _owner(row, num_targets) == number)


def _assemble(prompts_file: Path, targets: list[Target], folder: Path) -> dict[str, Any]:
    """Write the files of answers and of rejects from the caches, in the order of the prompts. Returns counts."""
    counts, reason = dict.fromkeys(("rows", "answered", "answers", "cut", "rejected"), 0), "there is none"
    with ExitStack() as stack:
        caches = [stack.enter_context(target.open_cache()) for target in targets]
        answers, rejects = (stack.enter_context(_whole_file(folder / name)) for name in (ANSWERS_FILE, REJECTS_FILE))
        for row, origin in tqdm(read_chats(prompts_file), desc="assemble", unit="row"):
            number = _owner(row, len(targets))
            conversation = follow(row, targets[number], caches[number])
            assert isinstance(conversation, Conversation), origin
            counts["rows"] += 1
            if not conversation.messages:
                counts["rejected"] += 1
                reason = conversation.reason
                reject = {"origin": origin, "reason": reason, "row": json.dumps(row, ensure_ascii=False)}
                rejects.write(json.dumps(reject, ensure_ascii=False) + "\n")
                continue
            counts["answered"] += 1
            counts["answers"] += sum(message["role"] == "assistant" for message in conversation.messages)
            counts["cut"] += conversation.is_cut
            answers.write(_as_line(row, conversation, targets[number].name))
        if not counts["answered"]:
            raise UserError(f"{prompts_file}: no conversation of {counts['rows']} was answered; the last: {reason}")
    return counts


def _as_line(row: Row, conversation: Conversation, target: str) -> str:
    reason = "length" if conversation.is_cut else "stop"
    answered = {**row, "messages": conversation.messages, "finish_reason": reason, "target": target}
    return json.dumps(answered, ensure_ascii=False) + "\n"


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A JSON file that takes its place when all is written. Half a character goes into it as JSON's own escape."""
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("w", encoding="utf-8", errors="backslashreplace") as file:
        yield file
    unfinished.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# Generation in this process, and in the others of a launcher
# ---------------------------------------------------------------------------------------------------------------------


def _generate_here(
    targets: list[Target], config: RegenerateConfig, process: PartialState
) -> tuple[dict[str, Any], int]:
    """Fill the caches, one target after another. Returns the dtype, and the number of tokens of all processes."""
    num_tokens = sum(_generate(target, config, process) for target in targets)
    return {"dtype": config.dtype}, sum(gather_object([num_tokens]))


def _generate(target: Target, config: RegenerateConfig, process: PartialState) -> int:
    """Answer this process's part of what is missing, turn after turn. Returns its number of tokens."""
    model, num_tokens = None, 0
    while missing := _missing_prompts(target, process):
        model = model or load_causal_lm(target.path, dtype=DTYPES[config.dtype]).to(default_device()).eval()
        batches = split_batches(missing, config.batch_size)[process.process_index :: process.num_processes]
        description = target.title if process.is_main_process else ""
        with target.open_cache(process.process_index) as cache:
            write_batches(
                model, missing, batches, cache, limits=target.limits, sampling=target.sampling, description=description
            )
            num_tokens += cache.num_new_tokens
        process.wait_for_everyone()
    del model
    gc.collect()  # one target at a time is in memory
    return num_tokens


def _missing_prompts(target: Target, process: PartialState) -> dict[str, list[int]]:
    """The prompts by key that come next: those of the earliest turn that lacks answers; the same in all processes.

    Turn after turn, so that what a kill leaves over falls into the batches of a run that is not killed. In bfloat16 an
    answer may depend on what is padded beside it.
    """
    with target.open_cache(process.process_index) as cache:
        states = (follow(row, target, cache) for row in target.rows())
        waiting = [state for state in states if isinstance(state, OpenTurn)]
    process.wait_for_everyone()  # nobody writes while another still reads
    number = min((turn.number for turn in waiting), default=0)
    return {prompt_key(turn.prompt): turn.prompt for turn in waiting if turn.number == number}


# ---------------------------------------------------------------------------------------------------------------------
# Servers
# ---------------------------------------------------------------------------------------------------------------------


async def _ask_servers(targets: list[Target], config: RegenerateConfig) -> tuple[dict[str, Any], int]:
    """Fill the caches, all targets at once. Returns the servers with their models, and the number of new tokens."""
    async with open_servers(config, {target.name: target.path for target in targets}) as found:
        num_tokens = await run_together(_ask_target(target, found[target.name], config) for target in targets)
    models = {name: {server.url: server.model for server in servers} for name, servers in found.items()}
    return {"servers": models}, sum(num_tokens)


async def _ask_target(target: Target, servers: list[Server], config: RegenerateConfig) -> int:
    """Have the servers of one target answer its conversations. Returns the number of tokens received."""
    pool = ServerPool(servers, target.tokenizer, target.limits, target.sampling, config.concurrency)
    under_way: dict[str, asyncio.Event] = {}
    num_turns = sum(len(questions(row["messages"])) for row in target.rows())
    rows = target.rows()
    with (
        target.open_cache() as cache,
        tqdm(total=num_turns, desc=target.title, unit="answer") as bar,
    ):

        async def work() -> None:
            for row in rows:
                await asyncio.sleep(0)  # thousands of known answers in a row must not keep the others waiting
                while not isinstance(state := follow(row, target, cache), Conversation):
                    await _ask_once(state.prompt, target, cache, pool, under_way)
                bar.update(len(questions(row["messages"])))

        try:
            await run_together(work() for _ in range(pool.num_slots))
        except NoServerLeftError as error:
            raise UserError(
                f"{error}; {len(cache):,} answers are safe in the cache: run the same command again to go on from them"
            ) from error
        return cache.num_new_tokens


async def _ask_once(
    prompt: list[int], target: Target, cache: AnswerCache, pool: ServerPool, under_way: dict[str, asyncio.Event]
) -> None:
    """Ask for an answer and keep it; if another conversation has just asked the same, wait for that."""
    key = prompt_key(prompt)
    if key in under_way:
        await under_way[key].wait()
        return
    under_way[key] = asyncio.Event()
    reply = await pool.ask(prompt)
    if isinstance(reply, Refusal):
        target.refusals[key] = reply
    else:
        cache.add({key: reply})
    under_way.pop(key).set()
