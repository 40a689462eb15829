"""Targets answer every conversation turn by turn; no kill, of the program or of a server, changes a byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_server import FakeServer, Reply, scripted
from tiny import build_model, config_for, conversations, free_port
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from vllm_server import vllm_server

from pard_train.config import SourceConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.rows import source_version
from pard_train.downloads import unpack_model
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits, decode
from pard_train.model import load_tokenizer
from pard_train.runs import MANIFEST_FILE, read_json
from pard_train.targets.answers import prompt_key
from pard_train.targets.regeneration import read_chats, write_answers

SETTINGS = {"max_new_tokens": 24, "batch_size": 3, "dtype": "float32", "concurrency": 4, "max_retries": 0}
FILES = ("answers.jsonl", "rejects.jsonl")
ROOT = Path(__file__).parents[1]
Serve = Callable[..., FakeServer]
Row = dict[str, Any]


@pytest.fixture
def serve(tokenizer: PreTrainedTokenizerBase) -> Iterator[Serve]:
    """Starts servers that stop with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(FakeServer(scripted(tokenizer), **settings))


class Written(NamedTuple):
    """The file of answers, and its manifest."""

    path: Path
    manifest: dict[str, Any]


def write(prompts: Path, folder: Path, targets: list[Path], seed: int = 0, **settings: Any) -> Written:
    """Run in this process."""
    names = [str(target) for target in targets]
    config = config_for("regenerate", targets=names, seed=seed, **SETTINGS | settings)
    path = write_answers(config, prompts, folder)
    return Written(path, read_json(path.parent / MANIFEST_FILE))


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def cached_keys(folder: Path) -> set[str]:
    """Keys of the whole lines of a cache."""
    lines = [line for file in folder.glob("target_text/*/*.jsonl") for line in file.read_bytes().splitlines(True)]
    return {json.loads(line)["key"] for line in lines if line.endswith(b"\n")}


def mixed_rows(number: int) -> list[Row]:
    """Conversations with all that may befall one: cut, empty and refused answers, tools, systems, repetitions."""
    draw = random.Random(7)
    rows: list[Row] = []
    for n, chat in enumerate(conversations(number, seed=3)):
        for message in chat[::2]:
            message["content"] += draw.choice(["", "", "", " cut", " empty", " refuse"])
        if n % 4 == 0:
            chat.insert(0, {"role": "system", "content": "Be brief."})
        if n % 5 == 0:
            chat += [{"role": "tool", "content": "42"}, {"role": "user", "content": "and now"}]
        if n % 7 == 0:
            chat.append({"role": "user", "content": "a question left open"})
        rows.append({"id": f"row-{n}", "messages": chat, "source": {"name": "tiny"}, "finish_reason": "other"})
    return rows + [{**row, "id": row["id"] + "-again"} for row in rows[::6]]


def expected(row: Row, encoder: ChatEncoder, reply: Reply) -> tuple[list[dict[str, str]], str]:
    """What becomes of a conversation, told once more and simply: (messages, finish reason)."""
    answered: list[dict[str, str]] = []
    asked: list[dict[str, str]] = []
    for message in row["messages"]:
        if message["role"] == "tool":
            break
        if message["role"] == "assistant":
            continue
        asked.append(message)
        if message["role"] == "user":
            choice = reply(encoder.encode_prompt(asked))
            if not choice.get("text"):
                break
            asked.append({"role": "assistant", "content": choice["text"]})
            answered = list(asked)
            if choice["finish_reason"] == "length":
                return answered, "length"
    return answered, "stop"


def version_of(path: Path) -> str:
    """Hash of a file's contents, as data.source of data_scripts/encode.py has it."""
    return source_version(SourceConfig(path=str(path)))


def test_every_conversation_is_answered_as_told_in_order_and_the_counts_add_up(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, base_folder: Path, tmp_path: Path
) -> None:
    rows, server = mixed_rows(60), serve()
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    written = write(prompts, tmp_path / "out", [base_folder], servers=[server.url])
    ours = [(row, *expected(row, ChatEncoder(tokenizer), server.reply)) for row in rows]
    answered, ids = read_rows(written.path), []
    for row in answered:
        ids.append(row.pop("token_ids"))
    assert answered == [
        {**row, "messages": messages, "finish_reason": reason, "target": str(base_folder)}
        for row, messages, reason in ours
        if messages
    ]
    of_target = ChatEncoder(load_tokenizer(str(base_folder))).tokenizer_fingerprint
    for row, token_ids in zip(answered, ids, strict=True):
        assert token_ids["tokenizer"] == of_target
        for prompt, answer in token_ids["turns"]:
            assert server.reply(prompt)["token_ids"] == answer
        num_turns = sum(message["role"] == "assistant" for message in row["messages"])
        assert len(token_ids["turns"]) == num_turns
    rejects = read_rows(tmp_path / "out" / "rejects.jsonl")
    rejected = [(n, row) for n, (row, messages, _) in enumerate(ours, start=1) if not messages]
    assert [(r["origin"], json.loads(r["row"])) for r in rejects] == [(f"{prompts}:{n}", row) for n, row in rejected]
    reasons = {reject["reason"] for reject in rejects}
    assert reasons == {"the answer is empty", "refused by the server: your prompt is too long"}
    counts = written.manifest["counts"]
    assert counts["rows"] == len(rows) == counts["answered"] + counts["rejected"]
    assert counts["rejected"] == len(rejects) > 5
    assert counts["cut"] == sum(reason == "length" for *_, reason in ours) > 5
    assert counts["answers"] == sum(m["role"] == "assistant" for _, messages, _ in ours for m in messages)
    assert counts["rows"] == len(rows)
    assert written.manifest["servers"] == {str(base_folder): {server.url: "target"}}
    assert written.manifest["prompts"] == {"path": str(prompts), "version": version_of(prompts)}
    assert written.manifest["files"] == {"answers.jsonl": version_of(written.path)}
    assert len(server.prompts) == len(set(server.prompts))  # a question that many conversations share is asked once


def test_what_many_conversations_ask_at_the_same_time_is_asked_once(
    serve: Serve, base_folder: Path, tmp_path: Path
) -> None:
    chats = [[{"role": "user", "content": "Hi"}, {"role": "user", "content": f"number {n % 3}"}] for n in range(12)]
    prompts, server = write_rows(tmp_path / "p.jsonl", [{"messages": chat} for chat in chats]), serve(seconds=0.05)
    written = write(prompts, tmp_path / "out", [base_folder], servers=[server.url])
    assert written.manifest["counts"]["answers"] == 24
    assert len(server.requests) == 1 + 3


def test_answers_that_are_written_anew_leave_nothing_of_the_old_ones_and_what_exceeds_the_context_is_rejected(
    base_folder: Path, tmp_path: Path
) -> None:
    old, answer = {"token_ids": {"tokenizer": "x", "turns": [[[1], [2]]]}}, {"role": "assistant", "content": "old"}
    rows = [
        {"messages": [{"role": "user", "content": text}, answer], **old}
        for text in ("the cat", "why", "the cat " * 4000)
    ]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    written = write(prompts, tmp_path / "out", [base_folder])
    assert all(row["token_ids"]["tokenizer"] != "x" for row in read_rows(written.path))
    assert next(read_chats(prompts))[0].keys() == {"messages"}  # though a server gives no ids
    (reject,) = read_rows(tmp_path / "out" / "rejects.jsonl")
    assert "tokens and an answer of 24 exceed" in reject["reason"]
    assert json.loads(reject["row"])["messages"] == rows[-1]["messages"]


def test_servers_write_what_generation_in_this_process_writes(
    tokenizer: PreTrainedTokenizerBase, base_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"messages": chat} for chat in conversations(12, seed=1)])

    def reply(prompt: list[int]) -> dict[str, Any]:
        ids = [token for step in decode(model, prompt, Limits(24, frozenset({2}))) for token in step.tokens]
        return {"text": "", "token_ids": ids, "finish_reason": "stop" if ids[-1] == 2 else "length"}

    with FakeServer(reply) as server:
        write(prompts, tmp_path / "servers", [base_folder], servers=[server.url])
    here = write(prompts, tmp_path / "here", [base_folder])
    assert contents(tmp_path / "here") == contents(tmp_path / "servers")
    assert here.manifest["dtype"] == "float32"
    assert here.manifest["counts"]["answered"] == 12


def test_several_targets_share_by_content_whatever_else_is_in_the_file_and_each_asks_its_own_servers(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, base_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    build_model("llama", seed=9).save_pretrained(other)
    tokenizer.save_pretrained(other)
    targets = [base_folder, other]
    servers = [serve(models=({"id": "base"},)), serve(models=({"id": "other"},)), serve(models=({"id": "other"},))]
    rows = [{"id": n, "messages": chat} for n, chat in enumerate(conversations(120, seed=2))]

    def owners(rows: list[Row], name: str) -> dict[int, str]:
        prompts = write_rows(tmp_path / f"{name}.jsonl", rows)
        written = write(prompts, tmp_path / name, targets, servers=[s.url for s in servers])
        return {row["id"]: row["target"] for row in read_rows(written.path)}

    whole = owners(rows, "whole")
    share = sum(target == str(other) for target in whole.values())
    assert 38 < share < 82  # 60 +- 4 standard deviations of 5.5
    shuffled = random.Random(0).sample(rows, 50)
    without_answers = [{**row, "messages": row["messages"][::2]} for row in shuffled]
    assert owners(without_answers, "part") == {row["id"]: whole[row["id"]] for row in shuffled}
    assert {request["model"] for request in servers[0].requests} == {"base"}
    assert {request["model"] for server in servers[1:] for request in server.requests} == {"other"}
    assert all(server.requests for server in servers)


def test_prompts_that_are_added_or_moved_send_only_what_is_new(serve: Serve, base_folder: Path, tmp_path: Path) -> None:
    rows, server = mixed_rows(20), serve()
    write(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "grown", [base_folder], servers=[server.url])
    known, more = cached_keys(tmp_path / "grown"), serve()
    prompts = write_rows(tmp_path / "b.jsonl", mixed_rows(40)[::-1])
    write(prompts, tmp_path / "grown", [base_folder], servers=[more.url])
    assert not known & {prompt_key(prompt) for prompt in more.prompts if more.reply(list(prompt)).get("text")}
    write(prompts, tmp_path / "fresh", [base_folder], servers=[server.url])
    assert contents(tmp_path / "grown") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("changes", [{"max_new_tokens": 12}, {"temperature": 0.5}, {"dtype": "bfloat16"}])
def test_other_settings_never_reuse_an_answer(base_folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"messages": chat} for chat in conversations(3, seed=1)])
    write(prompts, tmp_path / "out", [base_folder])
    (before,) = (tmp_path / "out" / "target_text").iterdir()
    written = write(prompts, tmp_path / "out", [base_folder], **changes)
    assert written.manifest["counts"]["new_tokens"] > 0
    assert len(list((tmp_path / "out" / "target_text").iterdir())) == 2
    assert before.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> Callable[..., BaseProcess]:
    """Starts `write` in a process that can be killed, with modules imported beforehand."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pard_train.targets.regeneration", "torch.distributed", "transformers.generation.utils"]
    )

    def start(*arguments: Any, environment: dict[str, str] | None = None, **settings: Any) -> BaseProcess:
        process = context.Process(target=write_apart, args=(environment or {}, arguments, settings), daemon=True)
        process.start()
        return process

    return start


def write_apart(environment: dict[str, str], arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """`write` in a process of its own."""
    os.environ.update(environment)
    write(*arguments, **settings)


def wait_until(is_so: Callable[[], bool], processes: list[BaseProcess]) -> None:
    """Wait for something that a running process brings about."""
    while not is_so() and all(process.is_alive() for process in processes):
        time.sleep(0.001)


@pytest.mark.slow
def test_a_program_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_is_not(
    start: Callable[..., BaseProcess], serve: Serve, base_folder: Path, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", mixed_rows(40))
    write(prompts, tmp_path / "whole", [base_folder], servers=[serve().url])
    server, draw = serve(seconds=0.02), random.Random(1)
    known: set[str] = set()
    for _ in range(4):
        num_before, stop = len(server.requests), server.num_answered + draw.randint(2, 12)
        process = start(prompts, tmp_path / "killed", [base_folder], servers=[server.url])
        wait_until(lambda stop=stop: server.num_answered >= stop, [process])
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not (tmp_path / "killed" / "answers.jsonl").exists()
        asked_again = {prompt_key(prompt) for prompt in server.prompts[num_before:]}
        assert not asked_again & known
        known = cached_keys(tmp_path / "killed")
    num_before = len(server.requests)
    write(prompts, tmp_path / "killed", [base_folder], servers=[server.url])
    assert known  # or nothing was killed in the middle
    assert not {prompt_key(prompt) for prompt in server.prompts[num_before:]} & known
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    answered = [prompt for prompt in server.prompts if "error" not in server.reply(list(prompt))]
    assert len(answered) - len(set(answered)) <= 4 * SETTINGS["concurrency"]  # what was under way at a kill


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"dtype": "bfloat16"}], ids=["sampled", "bfloat16"])
@pytest.mark.slow
def test_what_a_kill_leaves_over_is_answered_as_if_nothing_had_happened(
    base_folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"messages": chat} for chat in conversations(40, seed=8)])
    write(prompts, tmp_path / "whole", [base_folder], **settings)
    (cache,) = (tmp_path / "whole" / "target_text").glob("*/*.jsonl")
    lines = cache.read_bytes().splitlines(keepends=True)
    for stop in range(SETTINGS["batch_size"], len(lines), 2 * SETTINGS["batch_size"]):  # after some whole batches
        killed = tmp_path / f"killed-{stop}"
        left = killed / cache.relative_to(tmp_path / "whole")
        left.parent.mkdir(parents=True)
        left.write_bytes(b"".join(lines[:stop]))
        write(prompts, killed, [base_folder], **settings)
        assert contents(killed) == contents(tmp_path / "whole"), stop


@pytest.mark.slow
def test_processes_that_share_no_disk_are_told_so(base_folder: Path, tmp_path: Path) -> None:
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(2):
        folder = tmp_path / f"disk-of-{rank}"
        (folder / "prompts").mkdir(parents=True)
        write_rows(folder / "prompts" / "train.jsonl", [{"messages": chat} for chat in conversations(5, seed=8)])
        command = [sys.executable, "data_scripts/regenerate.py", f"targets=[{base_folder}]", f"output_dir={folder}"]
        environment = {**os.environ, **launch, "RANK": str(rank), "LOCAL_RANK": "0"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 2
        assert "1 of 2 processes do not see this folder of the first one: choose an output_dir on a disk" in said
    assert not list(tmp_path.rglob("*.shared*"))


def test_system_prompts_and_tools_in_columns_of_their_own_are_asked_as_they_are_taught(
    base_folder: Path, tmp_path: Path
) -> None:
    question = {"messages": [{"role": "user", "content": "why"}], "mark": 1}
    call = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{"system": "the cat", **question}, {"tools": json.dumps([call["function"]]), **question}]
    written = write(write_rows(tmp_path / "prompts.jsonl", rows), tmp_path / "out", [base_folder])
    with_system, with_tools = read_rows(written.path)
    assert [m["content"] for m in with_system["messages"][:2]] == ["the cat", "why"]
    assert "system" not in with_system and "tools" not in with_system and with_system["mark"] == 1
    assert with_tools["tools"] == [call]


def test_two_processes_write_what_one_writes_also_if_all_are_killed_and_one_goes_on(
    start: Callable[..., BaseProcess], base_folder: Path, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"messages": chat} for chat in conversations(30, seed=8)])
    write(prompts, tmp_path / "one", [base_folder])
    whole = cached_keys(tmp_path / "one")

    def start_two(folder: Path) -> list[BaseProcess]:
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [{**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [start(prompts, folder, [base_folder], environment=rank) for rank in ranks]

    for process in start_two(tmp_path / "two"):
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    (folder,) = (tmp_path / "two" / "target_text").iterdir()
    keys = [[row["key"] for row in read_rows(folder / f"rank-{rank}.jsonl")] for rank in range(2)]
    assert sorted(keys[0] + keys[1]) == sorted(whole)  # each answer once
    assert min(map(len, keys)) > len(whole) // 4

    processes = start_two(tmp_path / "killed")
    wait_until(lambda: len(cached_keys(tmp_path / "killed")) > len(whole) // 3, processes)
    for process in processes:
        process.kill()
        process.join()
    known = cached_keys(tmp_path / "killed")
    assert len(whole) // 3 < len(known) < len(whole)
    write(prompts, tmp_path / "killed", [base_folder])
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")


def test_when_a_server_dies_the_other_finishes_with_the_same_bytes(
    serve: Serve, base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", mixed_rows(40))
    write(prompts, tmp_path / "whole", [base_folder], servers=[serve().url])
    dying, other = serve(seconds=0.01), serve(seconds=0.01)
    dying.fault = lambda number: dying.die() if number == 10 else None
    write(prompts, tmp_path / "out", [base_folder], servers=[dying.url, other.url])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert capsys.readouterr().out.count("is set aside") == 1
    assert 0 < dying.num_answered < 11


def test_when_all_servers_have_died_the_same_command_goes_on_from_what_is_safe(
    serve: Serve, base_folder: Path, tmp_path: Path
) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", mixed_rows(40))
    write(prompts, tmp_path / "whole", [base_folder], servers=[serve().url])
    server = serve(fault=lambda number: 500 if number >= 15 else None)
    with pytest.raises(UserError, match=r"no server of target is left: .*run the same command again") as error:
        write(prompts, tmp_path / "out", [base_folder], servers=[server.url])
    (safe,) = map(int, re.findall(r"(\d+) answers are in the cache", str(error.value)))
    assert safe == len(cached_keys(tmp_path / "out")) > 5
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    server.fault = lambda number: None
    num_before = len(server.requests)
    write(prompts, tmp_path / "out", [base_folder], servers=[server.url])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(set(server.prompts[num_before:])) == len(server.prompts[num_before:])


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_before_anything_is_asked(serve: Serve, base_folder: Path, tmp_path: Path) -> None:
    server = serve()
    prompts = write_rows(tmp_path / "prompts.jsonl", [*mixed_rows(3), {"messages": "Hi"}])
    with pytest.raises(UserError, match=r"prompts.jsonl:\d+: `messages` must be a non-empty list"):
        write(prompts, tmp_path / "out", [base_folder], servers=[server.url])
    assert not server.requests


def test_half_a_character_in_another_field_survives(serve: Serve, base_folder: Path, tmp_path: Path) -> None:
    rows = [{"id": "\ud800 世", "messages": [{"role": "user", "content": "Hi"}]}]
    written = write(write_rows(tmp_path / "p.jsonl", rows), tmp_path / "out", [base_folder], servers=[serve().url])
    assert [row["id"] for row in read_rows(written.path)] == ["\ud800 世"]


def test_answers_to_nothing_are_an_error(serve: Serve, base_folder: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"refuse {n}"}]} for n in range(3)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(UserError, match=r"no conversation of 3 was answered; the last: .*too long"):
        write(prompts, tmp_path / "out", [base_folder], servers=[serve().url])
    with pytest.raises(UserError, match="no conversation of 0 was answered"):
        write(write_rows(tmp_path / "none.jsonl", []), tmp_path / "out", [base_folder], servers=[serve().url])


def test_the_prompts_are_never_overwritten(serve: Serve, base_folder: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "answers.jsonl", mixed_rows(3))
    before = prompts.read_bytes()
    with pytest.raises(UserError, match="would be overwritten"):
        write(prompts, tmp_path, [base_folder], servers=[serve().url])
    assert prompts.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# A real engine
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_when_a_real_server_dies_another_writes_what_generation_in_this_process_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = ["cats", "dogs", "bread", "rain", "rivers", "chess", "tea", "the sun", "gold", "salt", "wool", "bees"]
    turns = ["Tell me about {}, in a few words.", "And its colour, in one word?", "Thanks, say goodbye."]
    rows = [{"messages": [{"role": "user", "content": t.format(topic)} for t in turns]} for topic in topics]
    model, too_long = unpack_model("SmolLM2-135M-Instruct"), {"messages": [{"role": "user", "content": "word " * 400}]}
    settings = {"max_new_tokens": 48, "timeout": 120.0}
    here = write(write_rows(tmp_path / "fit.jsonl", rows), tmp_path / "here", [model], **settings)
    assert here.manifest["counts"]["answers"] > len(topics)  # some conversations have several turns
    prompts = write_rows(tmp_path / "prompts.jsonl", [*rows, too_long])
    with (
        vllm_server(model, tmp_path / "first.log", max_model_len=256) as first,
        vllm_server(model, tmp_path / "second.log", max_model_len=256) as second,
    ):
        threading.Timer(3, os.killpg, (second.process.pid, signal.SIGKILL)).start()
        capsys.readouterr()
        write(prompts, tmp_path / "served", [model], servers=[first.url, second.url], concurrency=2, **settings)
    assert f"{second.url} is set aside: " in capsys.readouterr().out
    answers, whole = (tmp_path / folder / "answers.jsonl" for folder in ("served", "here"))
    assert answers.read_bytes() == whole.read_bytes()
    (reject,) = read_rows(tmp_path / "served" / "rejects.jsonl")
    assert "maximum context length is 256 tokens" in reject["reason"]
