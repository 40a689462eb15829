"""A pool of servers asks each prompt as our encoder rendered it, keeps to its limits and outlives a server's faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from fake_server import FakeServer, scripted
from transformers import PreTrainedTokenizerBase

from pard_train.config import InferenceConfig
from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.targets.answers import Answer, prompt_key
from pard_train.targets.conversation import Refusal
from pard_train.targets.servers import NoServerLeftError, ServerPool, open_servers, run_together

LIMITS = Limits(24, frozenset({0, 2}))
Serve = Callable[..., FakeServer]


@pytest.fixture
def serve(tokenizer: PreTrainedTokenizerBase) -> Iterator[Serve]:
    """Starts servers that stop with the test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(FakeServer(scripted(tokenizer), **settings))


def prompts_of(tokenizer: PreTrainedTokenizerBase, *contents: str) -> list[list[int]]:
    """A prompt per question."""
    encoder = ChatEncoder(tokenizer)
    return [encoder.encode_prompt([{"role": "user", "content": content}]) for content in contents]


def ask(
    servers: list[FakeServer],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling = GREEDY,
    **settings: Any,
) -> list[Answer | Refusal]:
    """Replies of a pool of all servers to all prompts, asked at the same time."""
    config = InferenceConfig(servers=[s.url for s in servers], **{"max_retries": 0, "concurrency": 2, **settings})

    async def run() -> list[Answer | Refusal]:
        async with open_servers(config, ["target"], ["target"]) as found:
            pool = ServerPool(found["target"], tokenizer, LIMITS, sampling, config.concurrency)
            return await asyncio.gather(*map(pool.ask, prompts))

    return asyncio.run(run())


def found_models(servers: list[FakeServer], targets: Sequence[str], **settings: Any) -> dict[str, dict[str, str]]:
    """Per target: the address of each of its servers, with the model's name there."""
    config = InferenceConfig(servers=[server.url for server in servers], **settings)

    async def run() -> dict[str, dict[str, str]]:
        async with open_servers(config, targets, targets) as found:
            return {name: {server.url: server.model for server in servers} for name, servers in found.items()}

    return asyncio.run(run())


def expected(server: FakeServer, prompts: list[list[int]]) -> list[Answer]:
    """What a server that does not fail would answer."""
    choices = map(server.reply, prompts)
    return [Answer(choice["token_ids"], choice["finish_reason"] == "length") for choice in choices]


def test_ids_go_out_and_come_back_and_every_setting_is_named(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    server = serve()
    prompts = prompts_of(tokenizer, "the cat", "please cut", "empty")
    assert ask([server], tokenizer, prompts) == expected(server, prompts)
    assert sorted(server.prompts) == sorted(map(tuple, prompts))
    for request in server.requests:
        assert request["model"] == "target"
        assert request["max_tokens"] == 24
        assert request["stop_token_ids"] == [0, 2]
        assert request["return_token_ids"] is True
        assert request["skip_special_tokens"] is False
        # What a model's generation config would else decide, such as the penalty of 1.05 that Qwen2.5 ships.
        neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {name: request[name] for name in neutral} == neutral
        assert request["frequency_penalty"] == request["presence_penalty"] == 0.0


def test_a_prompt_is_sampled_with_a_seed_of_its_own_that_others_do_not_change(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    server, prompts = serve(), prompts_of(tokenizer, "a", "b", "c")
    warm = Sampling(temperature=0.7, top_p=0.9, seed=5)
    ask([server], tokenizer, prompts, warm)
    ask([server], tokenizer, prompts[::-1], warm)
    seeds = {(tuple(request["prompt"]), request["seed"]) for request in server.requests}
    assert len(seeds) == len({seed for _, seed in seeds}) == 3
    assert {(request["temperature"], request["top_p"]) for request in server.requests} == {(0.7, 0.9)}
    assert warm.seed_of(prompt_key(prompts[0])) != Sampling(0.7, 0.9, seed=6).seed_of(prompt_key(prompts[0]))


def test_a_server_that_returns_no_ids_is_taken_by_its_text(tokenizer: PreTrainedTokenizerBase) -> None:
    def reply(prompt: list[int]) -> dict[str, Any]:
        return {"text": "<|unused|>the cat", "finish_reason": "stop"}

    with FakeServer(reply) as server:
        (answer,) = ask([server], tokenizer, prompts_of(tokenizer, "a"))
    assert answer == Answer(tokenizer("<|unused|>the cat")["input_ids"], False)


def test_every_server_works_at_most_so_many_requests_at_a_time(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    servers = [serve(seconds=0.05), serve(seconds=0.05)]
    prompts = prompts_of(tokenizer, *(f"question {n}" for n in range(30)))
    assert ask(servers, tokenizer, prompts, concurrency=3) == expected(servers[0], prompts)
    assert [server.most_under_way for server in servers] == [3, 3]
    assert sorted(servers[0].prompts + servers[1].prompts) == sorted(map(tuple, prompts))


def test_a_slow_server_gets_fewer_requests(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    slow, fast = serve(seconds=0.5), serve(seconds=0.01)
    ask([slow, fast], tokenizer, prompts_of(tokenizer, *(f"question {n}" for n in range(30))))
    assert len(slow.requests) < 6 < len(fast.requests)


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_a_passing_fault_is_tried_again(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, fault: int | str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(fault=lambda number: fault if number == 1 else None)
    prompts = prompts_of(tokenizer, "a", "b", "c")
    assert ask([server], tokenizer, prompts, max_retries=2) == expected(server, prompts)
    assert len(server.requests) == 4
    assert "set aside" not in capsys.readouterr().out


@pytest.mark.parametrize("fault", [500, 401, 404, "drop", "hang", "abort"])
def test_a_server_that_fails_is_set_aside_in_one_line_and_the_others_take_its_requests(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, fault: int | str, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = serve(), serve(fault=lambda number: fault if number >= 2 else None)
    prompts = prompts_of(tokenizer, *(f"question {n}" for n in range(20)))
    assert ask([bad, good], tokenizer, prompts, timeout=1.0) == expected(good, prompts)
    asked = [request for request in bad.requests if request["max_tokens"] > 1]  # the others try the server
    assert 3 <= len(asked) <= 4  # those under way with the first that failed
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line.startswith(f"{bad.url} is set aside: ")


def test_a_server_that_was_set_aside_is_asked_no_more_though_it_goes_on_answering(
    serve: Serve, tokenizer: PreTrainedTokenizerBase
) -> None:
    good, bad = serve(seconds=0.05), serve(seconds=0.05, fault=lambda number: "abort" if number == 4 else None)
    prompts = prompts_of(tokenizer, *(f"question {n}" for n in range(40)))
    assert ask([bad, good], tokenizer, prompts, concurrency=4) == expected(good, prompts)
    assert 5 <= len(bad.requests) <= 8


@pytest.mark.parametrize("fault, reason", [(500, "fault 500"), ("hang", "no answer within inference.timeout")])
def test_a_prompt_that_a_healthy_server_fails_at_is_refused_and_the_server_goes_on(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, fault: int | str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(fault=lambda number: fault if number == 2 else None)
    prompts = prompts_of(tokenizer, *"abcd")
    replies = ask([server], tokenizer, prompts, timeout=1.0, concurrency=1)
    assert replies.count(Refusal(reason)) == 1
    assert [r for r, e in zip(replies, expected(server, prompts), strict=True) if r != e] == [Refusal(reason)]
    assert "set aside" not in capsys.readouterr().out


def test_the_run_ends_with_the_last_server(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    servers = [serve(fault=lambda number: 500 if number >= 3 else None) for _ in range(2)]
    with pytest.raises(NoServerLeftError, match=r"no server of target is left: .*fault 500"):
        ask(servers, tokenizer, prompts_of(tokenizer, *(f"question {n}" for n in range(20))))


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_request_that_is_refused_blames_the_prompt_not_the_server(
    tokenizer: PreTrainedTokenizerBase, code: int
) -> None:
    def reply(prompt: list[int]) -> dict[str, Any]:
        return {"error": f"{len(prompt)} tokens are too many", "code": code}

    prompts = prompts_of(tokenizer, "a", "the cat runs")
    with FakeServer(reply) as server:
        replies = ask([server], tokenizer, prompts, max_retries=3)
        assert replies == [Refusal(f"{len(prompt)} tokens are too many") for prompt in prompts]
        assert len(server.requests) == 2  # and is not repeated


TARGETS = {"org/big-7b": "org/big-7b", "pypi:small": "/cache/small"}


@pytest.mark.parametrize(
    "models, targets, expected_models",
    [
        ([{"id": "org/big-7b"}], ["org/big-7b"], {"org/big-7b": "org/big-7b"}),
        ([{"id": "other"}, {"id": "org/big-7b"}], TARGETS, {"org/big-7b": "org/big-7b"}),
        ([{"id": "alias", "root": "org/big-7b"}], TARGETS, {"org/big-7b": "alias"}),
        ([{"id": "/data/models/small"}], TARGETS, {"pypi:small": "/data/models/small"}),
        ([{"id": "big-7b"}, {"id": "small", "root": None}], TARGETS, {"org/big-7b": "big-7b", "pypi:small": "small"}),
        ([{"id": "a", "root": "org/big-7b"}, {"id": "b", "root": "org/big-7b"}], TARGETS, {"org/big-7b": "a"}),
        ([{"id": "whatever"}], ["org/big-7b"], {"org/big-7b": "whatever"}),
    ],
    ids=["id", "one of several", "root", "folder", "both", "two names of one model", "a single target"],
)
def test_a_server_is_known_by_the_models_it_lists(
    serve: Serve, models: list[dict[str, Any]], targets: list[str], expected_models: dict[str, str]
) -> None:
    server, full = serve(models=tuple(models)), serve(models=({"id": "big-7b"}, {"id": "small"}))
    found = found_models([server, full], targets)
    assert {name: models[server.url] for name, models in found.items() if server.url in models} == expected_models
    assert all(full.url in models for models in found.values())


def test_targets_with_the_same_last_part_are_told_apart_by_their_whole_names(serve: Serve) -> None:
    servers = [serve(models=({"id": f"{place}/final"},)) for place in ("v1", "v2")]
    found = found_models(servers, ["v1/final", "v2/final"])
    assert found == {
        f"{place}/final": {s.url: f"{place}/final"} for place, s in zip(("v1", "v2"), servers, strict=True)
    }


def test_a_server_of_no_target_and_a_target_of_no_server_are_refused(serve: Serve) -> None:
    stranger, big = serve(models=({"id": "stranger"},)), serve(models=({"id": "big-7b"},))
    with pytest.raises(UserError, match=f"{stranger.url} serves stranger, which is none of targets"):
        found_models([big, stranger], TARGETS)
    with pytest.raises(UserError, match="serves pypi:small"):
        found_models([big], TARGETS)


def test_a_server_that_does_not_answer_is_named_before_anything_is_asked(serve: Serve) -> None:
    big, dead = serve(models=({"id": "big-7b"},)), serve(models=({"id": "small"},))
    dead.die()
    with pytest.raises(
        UserError, match=f"serves pypi:small: .*{dead.url} does not list its models \\(Connection error"
    ):
        found_models([big, dead], TARGETS, max_retries=0)
    assert not big.requests


def test_an_address_that_is_dead_is_set_aside_in_one_line_while_another_serves_the_same_target(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    good, dead = serve(), serve()
    dead.die()
    for question in ("a", "b"):
        prompts = prompts_of(tokenizer, question)
        assert ask([dead, good], tokenizer, prompts) == expected(good, prompts)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line.startswith(f"skipped: inference.servers: {dead.url} does not list its models (Connection error")


def test_the_key_comes_from_the_environment_and_is_printed_nowhere(
    serve: Serve,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    good, bad = serve(), serve(fault=lambda number: 401)
    ask([good, bad], tokenizer, prompts_of(tokenizer, "a", "b", "c", "d"))
    assert set(good.credentials) == {"Bearer a-secret"}
    monkeypatch.delenv("OPENAI_API_KEY")
    ask([good], tokenizer, prompts_of(tokenizer, "e"))
    assert good.credentials[-1] == "Bearer none"
    assert "a-secret" not in "".join([*capsys.readouterr(), caplog.text])


def test_a_request_is_no_news(
    serve: Serve, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")  # as the programs set it
    ask([serve()], tokenizer, prompts_of(tokenizer, "a", "b"))
    assert not caplog.records


def test_a_request_that_takes_too_long_is_given_up(serve: Serve, tokenizer: PreTrainedTokenizerBase) -> None:
    server, start = serve(fault=lambda number: "hang"), time.time()
    with pytest.raises(NoServerLeftError, match=r"no answer within inference\.timeout"):
        ask([server], tokenizer, prompts_of(tokenizer, "a"), timeout=0.3)
    assert time.time() - start < 20


def test_when_one_work_fails_the_others_are_over_before_its_error_arrives() -> None:
    ended = []

    async def last() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            ended.append("last")

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise UserError("first")

    async def run() -> None:
        with pytest.raises(UserError, match="first"):
            await run_together([last(), fail()])
        assert ended == ["last"]

    start = time.time()
    asyncio.run(run())
    assert time.time() - start < 30
