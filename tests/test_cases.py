"""What a target answers to a benchmark: turn by turn, cached under everything that decides it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, scripted
from tiny import CHATML, build_model, config_for, conversations, with_settings
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config
from pard_train.data.benchmarks import Benchmark, Prompt, load_benchmark
from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.runs import fingerprint
from pard_train.targets.answers import Answer
from pard_train.targets.cases import (
    Case,
    Turn,
    answer_prompt,
    case_identity,
    longest_text,
    write_case,
)
from pard_train.targets.conversation import answer_text
from pard_train.targets.target import Target, load_targets

LIMITS = Limits(12, frozenset({2}))


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    """Two conversations of two turns and three of one."""
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    texts = [chat[0]["content"] for chat in conversations(7, seed=4)]
    rows: list[dict[str, Any]] = [{"turns": texts[:2]}, {"turns": texts[2:4]}, *({"prompt": t} for t in texts[4:])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_benchmark(str(path))


def settings(base: Path, **changes: Any) -> Config:
    """Answers of at most 12 tokens."""
    return config_for("evaluate", **{"target": base, "max_new_tokens": 12, "batch_size": 4, **changes})


def open_target(base: Path, config: Config) -> Target:
    """The base model as a target."""
    (target,) = (target for target in load_targets(config) if target.name == str(base))
    return target


def written(target: Target, benchmark: Benchmark, config: Config, folder: Path, sampling: Sampling = GREEDY) -> Case:
    """The case with these settings."""
    limit, system = config.evaluate.max_new_tokens, config.evaluate.system_prompt
    return write_case(target, benchmark, folder, max_new_tokens=limit, system_prompt=system, sampling=sampling)


def carried_on(
    prompts: Sequence[Prompt], encoder: ChatEncoder, answer: Callable[[list[int]], Answer], system: str | None = None
) -> list[Turn]:
    """The turns of every prompt's conversation, one conversation after another."""
    turns: list[Turn] = []
    for prompt in prompts:
        conversation = answer_prompt(prompt, encoder, LIMITS, system)
        try:
            ids = next(conversation)
            while True:
                ids = conversation.send(answer(ids))
        except StopIteration as end:
            turns += end.value
    return turns


def test_a_second_turn_is_asked_after_the_targets_own_answer_to_the_first(
    tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark
) -> None:
    encoder = ChatEncoder(tokenizer)

    def answer(prompt: list[int]) -> Answer:
        return Answer([*tokenizer(f"answer {len(prompt)}")["input_ids"], 2], False)

    turns = carried_on(benchmark.prompts, encoder, answer)
    assert [turn.number for turn in turns] == [0, 1, 0, 1, 0, 0, 0]
    first, second = turns[:2]
    messages = [
        *benchmark.prompts[0].turns[0],
        {"role": "assistant", "content": answer_text(first.answer, encoder, LIMITS)},
        *benchmark.prompts[0].turns[1],
    ]
    assert second.prompt_ids == encoder.encode_prompt(messages)
    assert second.question == benchmark.prompts[0].turns[1][-1]["content"]


def test_a_system_prompt_stands_before_every_conversation_that_has_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"messages": own}) + "\n" + json.dumps({"prompt": "hi"}) + "\n")
    prompts, encoder = load_benchmark(str(path)).prompts, ChatEncoder(tokenizer)
    turns = carried_on(prompts, encoder, lambda ids: Answer([5, 2], False), "be")
    systems = [tokenizer.decode(turn.prompt_ids).split("\n")[1] for turn in turns]
    assert systems == ["mine<|im_end|>", "be<|im_end|>"]


@pytest.mark.parametrize("system_prompt", [None, "the cat " * 60])
def test_the_longest_text_is_never_below_what_a_target_can_write(
    base_folder: Path, benchmark: Benchmark, system_prompt: str | None
) -> None:
    encoder = open_target(base_folder, settings(base_folder)).encoder
    turns = carried_on(benchmark.prompts, encoder, lambda ids: Answer(list(range(40, 52)), True), system_prompt)
    longest = max(len(turn.prompt_ids) + len(turn.answer.ids) for turn in turns)
    bound = longest_text(benchmark.prompts, encoder, 12, system_prompt=system_prompt)
    assert longest <= bound < longest + 40


def test_a_case_is_read_from_the_cache_and_anything_that_decides_the_text_gives_another_file(
    base_folder: Path, benchmark: Benchmark, tmp_path: Path
) -> None:
    config = settings(base_folder)
    case = written(open_target(base_folder, config), benchmark, config, tmp_path)
    assert [len(turn.answer.ids) <= 12 for turn in case.turns] == [True] * 7

    again = open_target(base_folder, config)
    again.name = "nowhere"  # loading its weights would fail: all answers are there
    assert written(again, benchmark, config, tmp_path) == case

    for changes in (
        {"max_new_tokens": 13},
        {"system_prompt": "x"},
        {"template_kwargs": {"a": 1}},
        {"dtype": "bfloat16"},
    ):
        other = with_settings(config, "evaluate", **changes)
        written(open_target(base_folder, other), benchmark, other, tmp_path)
    assert len(list((tmp_path / "target_text").iterdir())) == 5


def test_a_target_needs_no_server_but_its_own_and_none_at_all_where_its_text_is_there(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, tmp_path: Path
) -> None:
    names = [str(shutil.copytree(base_folder, tmp_path / name)) for name in ("first", "second")]

    def write(number: int, *servers: FakeServer) -> Case:
        urls = [server.url for server in servers]
        config = settings(base_folder, servers=urls, max_retries=0, targets=names)
        return written(open_target(Path(names[number]), config), benchmark, config, tmp_path)

    first, second = (FakeServer(scripted(tokenizer), models=({"id": name},)) for name in ("first", "second"))
    with first:
        case = write(0, first)
    with second:  # the first is over
        for servers in ((second,), (first, second)):
            assert write(0, *servers) == case
            assert len(write(1, *servers).turns) == len(case.turns)
        with pytest.raises(UserError, match=r"serves .*third"):
            names.append(str(shutil.copytree(base_folder, tmp_path / "third")))
            write(2, second)


def test_a_server_that_returns_text_alone_is_refused(base_folder: Path, benchmark: Benchmark, tmp_path: Path) -> None:
    with FakeServer(lambda prompt: {"text": "the cat", "finish_reason": "stop"}) as server:
        config = settings(base_folder, servers=[server.url])
        with pytest.raises(UserError, match=rf"servers: {server.url} returns no token ids, .* return_token_ids"):
            written(open_target(base_folder, config), benchmark, config, tmp_path)


def test_everything_that_decides_a_text_is_in_its_identity_and_a_batch_size_is_not(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, tmp_path: Path
) -> None:
    def folder(name: str, file: str, content: str) -> Path:
        target = tmp_path / name / base_folder.name  # the label stays the same
        shutil.copytree(base_folder, target)
        (target / file).write_text(content)
        return target

    def name(
        base: Path = base_folder, asked: Benchmark = benchmark, sampling: Sampling = GREEDY, **changes: Any
    ) -> str:
        config = settings(base, **changes)
        target = open_target(base, config)
        limits = Limits(config.evaluate.max_new_tokens, target.end_ids)
        return fingerprint(case_identity(target, asked, limits, config.evaluate.system_prompt, sampling))

    other_weights = tmp_path / "weights" / base_folder.name
    shutil.copytree(base_folder, other_weights)
    build_model("qwen2", seed=5).save_pretrained(other_weights)
    shorter = replace(benchmark, prompts=benchmark.prompts[:-1])
    servers = {"servers": ["http://localhost:8000/v1"]}
    names = [
        name(),
        name(other_weights),
        name(folder("ends", "generation_config.json", json.dumps({"eos_token_id": [2, 7]}))),
        name(folder("template", "chat_template.jinja", CHATML.replace("assistant", "user"))),
        name(asked=shorter),
        name(system_prompt="x"),
        name(template_kwargs={"a": 1}),
        name(max_new_tokens=13),
        name(dtype="bfloat16"),
        name(**servers),
        *(name(sampling=Sampling(*values)) for values in ((0.7, 1.0, 1), (0.8, 1.0, 1), (0.7, 0.9, 1), (0.7, 1.0, 2))),
    ]
    assert len(set(names)) == len(names)
    assert name(batch_size=1) == name(concurrency=1) == names[0]
    assert name(**servers, dtype="bfloat16") == name(**servers)  # which is the server's own affair


def test_servers_write_what_generation_in_this_process_writes(
    base_folder: Path, benchmark: Benchmark, tmp_path: Path
) -> None:
    here = settings(base_folder)
    own = written(open_target(base_folder, here), benchmark, here, tmp_path / "here")
    by_prompt = {tuple(turn.prompt_ids): turn.answer for turn in own.turns}

    def reply(prompt: list[int]) -> dict[str, Any]:
        answer = by_prompt[tuple(prompt)]
        return {"text": "", "token_ids": answer.ids, "finish_reason": "length" if answer.is_cut else "stop"}

    with FakeServer(reply) as server:
        there = with_settings(here, "evaluate", servers=[server.url])
        case = written(open_target(base_folder, there), benchmark, there, tmp_path / "there")
    assert case.turns == own.turns
