"""Answers that targets write to the prompts of a file, turn by turn."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from pard_train.config import Config, RegenerateConfig, SourceConfig
from pard_train.data.rows import Row, read_jsonl, source_version
from pard_train.data.schemas import SYSTEM_PROMPTS, to_chat
from pard_train.device import this_process, who_sees
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.runs import MANIFEST_FILE, fingerprint, locked, new_file, provenance, write_json
from pard_train.targets.answers import AnswerCache
from pard_train.targets.conversation import AnsweredChat, Conversation, Conversations, answer_chat, question_turns
from pard_train.targets.target import Target, load_targets
from pard_train.targets.writing import write_missing

ANSWERS_FOLDER = "answers"  # of the output folder
ANSWERS_FILE = "answers.jsonl"
REJECTS_FILE = "rejects.jsonl"
CACHE_FOLDER = "target_text"


def write_answers(config: Config, prompts_file: Path, folder: Path) -> Path:
    """Have the targets answer every conversation of a file. A hash of its questions decides which target answers it.

    Args:
        config: targets, inference and regenerate settings.
        prompts_file: JSONL of chats.
        folder: of answers, rejects, manifest and the cache.

    Returns:
        The file of answers. The counts of the manifest add up: rows = answered + rejected.

    Raises:
        UserError: at a bad row or a server that does not fit, before anything is asked; if all servers of a target
            fail; if no conversation was answered; or if another program works in the folder.
    """
    with locked(folder) if this_process().is_main_process else nullcontext():
        return _write_answers(config, prompts_file, folder)


def _write_answers(config: Config, prompts_file: Path, folder: Path) -> Path:
    settings, process = config.regenerate, this_process()
    if config.inference.servers and process.num_processes > 1:
        raise UserError("inference.servers are asked by one process: start the program without torchrun")
    if prompts_file.resolve() == (folder / ANSWERS_FILE).resolve():
        raise UserError(f"regenerate.prompts={prompts_file} would be overwritten: choose another output_dir")
    _check_shared(folder, process)
    for _ in read_chats(prompts_file):
        pass
    targets = load_targets(config, dtype=settings.dtype)
    jobs = [_job(target, n, prompts_file, settings, folder, config.seed) for n, target in enumerate(targets)]
    start = time.time()
    backend, num_tokens = write_missing(jobs, process)
    speed = {"new_tokens": num_tokens, "tokens_per_second": num_tokens / (time.time() - start)}
    if process.is_main_process:
        manifest = {
            "prompts": {"path": str(prompts_file), "version": source_version(SourceConfig(path=str(prompts_file)))},
            "targets": {target.name: target.fingerprint for target in targets},
            **backend,
            **{name: getattr(settings, name) for name in ("temperature", "top_p", "max_new_tokens")},
            "seed": config.seed,
            "template_kwargs": config.data.template_kwargs,
            "counts": {**_assemble(prompts_file, jobs, folder), **speed},
            "files": {ANSWERS_FILE: source_version(SourceConfig(path=str(folder / ANSWERS_FILE)))},
            "made_by": provenance(),
        }
        write_json(folder / MANIFEST_FILE, manifest)
    process.wait_for_everyone()
    return folder / ANSWERS_FILE


def _job(
    target: Target, number: int, prompts_file: Path, settings: RegenerateConfig, folder: Path, seed: int
) -> Conversations[AnsweredChat]:
    """The conversations of one target, by its number among all targets."""
    limits = Limits(settings.max_new_tokens, target.end_ids)
    sampling = Sampling(settings.temperature, settings.top_p, seed) if settings.temperature else GREEDY
    backend = "servers" if target.inference.servers else target.dtype
    identity = [target.fingerprint, [limits.max_new_tokens, sorted(limits.end_ids)], asdict(sampling), backend]
    cache = folder / CACHE_FOLDER / fingerprint(identity)

    def start() -> Iterator[Conversation[AnsweredChat]]:
        """Every conversation of the file that belongs to the target."""
        for row, _ in read_chats(prompts_file):
            if _owner(row, len(target.names)) == number:
                yield answer_chat(row, target.encoder, limits, target.context)

    return Conversations(
        target=target,
        start=start,
        limits=limits,
        open_cache=lambda rank: AnswerCache(cache / f"rank-{rank}.jsonl", cache.glob("rank-*.jsonl")),
        description=f"{target.label} answers",
        sampling=sampling,
    )


def read_chats(prompts_file: Path) -> Iterator[tuple[Row, str]]:
    """Rows and their origins, with `messages` and `tools` as encoding reads them.

    Raises:
        RowError: at the first row without a chat.
    """
    source = SourceConfig(path=str(prompts_file), schema="messages")
    for row, origin in read_jsonl(prompts_file):
        chat = to_chat(row, source, origin)
        rest = {name: value for name, value in row.items() if name not in (*SYSTEM_PROMPTS, "tools", "token_ids")}
        yield {**rest, "messages": chat.messages, **({"tools": chat.tools} if chat.tools else {})}, origin


def _check_shared(folder: Path, process: PartialState) -> None:
    """Check that all processes see one folder: otherwise each would wait forever for the answers of the others.

    Raises:
        UserError: in every process.
    """
    if not all(is_visible := who_sees(folder, process)):
        raise UserError(
            f"{folder}: {is_visible.count(False)} of {process.num_processes} processes do not see this folder of the "
            "first one: choose an output_dir on a disk that all nodes share, or run on one node"
        )


def _owner(row: Row, num_targets: int) -> int:
    """Number of the target that answers a conversation: equal shares, whatever else is in the file."""
    asked = json.dumps(question_turns(row["messages"]), sort_keys=True)
    return int.from_bytes(hashlib.blake2b(asked.encode(), digest_size=8).digest(), "big") % num_targets


def _assemble(prompts_file: Path, jobs: list[Conversations[AnsweredChat]], folder: Path) -> dict[str, Any]:
    """Write the files of answers and rejects from the caches, in the order of the prompts. Returns counts."""
    counts, reason = dict.fromkeys(("rows", "answered", "answers", "cut", "rejected"), 0), "there is none"
    with ExitStack() as stack:
        caches = [stack.enter_context(job.open_cache(0)) for job in jobs]
        paths = [stack.enter_context(new_file(folder / name)) for name in (ANSWERS_FILE, REJECTS_FILE)]
        # Half a character becomes JSON's own escape.
        answers, rejects = (stack.enter_context(path.open("w", errors="backslashreplace")) for path in paths)
        for row, origin in tqdm(read_chats(prompts_file), desc="assemble", unit="row"):
            owner = _owner(row, len(jobs))
            job, cache = jobs[owner], caches[owner]
            chat = job.follow(answer_chat(row, job.target.encoder, job.limits, job.target.context), cache)
            assert isinstance(chat, AnsweredChat), origin
            counts["rows"] += 1
            if not chat.messages:
                counts["rejected"] += 1
                reason = chat.reason
                reject = {"origin": origin, "reason": reason, "row": json.dumps(row, ensure_ascii=False)}
                rejects.write(json.dumps(reject, ensure_ascii=False) + "\n")
                continue
            counts["answered"] += 1
            counts["answers"] += sum(message["role"] == "assistant" for message in chat.messages)
            counts["cut"] += chat.is_cut
            answers.write(_as_line(row, chat, job))
        if not counts["answered"]:
            raise UserError(f"{prompts_file}: no conversation of {counts['rows']} was answered; the last: {reason}")
    return counts


def _as_line(row: Row, chat: AnsweredChat, job: Conversations[AnsweredChat]) -> str:
    """A row of answers, with the target's own token ids unless a server gave text only (then no end is among them)."""
    finish = "length" if chat.is_cut else "stop"
    answered = {**row, "messages": chat.messages, "finish_reason": finish, "target": job.target.name}
    ended = chat.turns[:-1] if chat.is_cut else chat.turns
    if all(answer[-1] in job.limits.end_ids for _, answer in ended):
        answered["token_ids"] = {"tokenizer": job.target.encoder.tokenizer_fingerprint, "turns": chat.turns}
    return json.dumps(answered, ensure_ascii=False) + "\n"
