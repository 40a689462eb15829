"""No answer is lost, repeated or mixed up, wherever a kill fell and however prompts are shared out."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from tiny import build_model, conversations
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits, decode
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.model import load_causal_lm
from pard_train.targets.answers import Answer, AnswerCache, prompt_key, split_batches, write_batches
from pard_train.targets.conversation import AnsweredChat, Refusal, answer_chat, answer_text, question_turns

LIMITS = Limits(12, frozenset(range(2, 300, 17)))  # so many ends that some answers come to one


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A target that ends some answers and runs into the limit with others."""
    return build_model("qwen2", seed=3)


@pytest.fixture(scope="module")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Prompts of many lengths."""
    encoder = ChatEncoder(tokenizer)
    return [encoder.encode_prompt(chat[:1]) for chat in conversations(21, seed=5)]


def decoded(model: PreTrainedModel, prompt: list[int], sampling: Sampling = GREEDY) -> Answer:
    """The answer, one prompt and one token at a time."""
    ids = [token for step in decode(model, prompt, LIMITS, sampling=sampling) for token in step.tokens]
    return Answer(ids, is_cut=ids[-1] not in LIMITS.end_ids)


def answered(
    model: PreTrainedModel, prompts: list[list[int]], path: Path, *, batch_size: int, sampling: Sampling = GREEDY
) -> list[Answer]:
    """The answer to every prompt, from the cache or the model."""
    with AnswerCache(path) as cache:
        missing = {key: prompt for prompt in prompts if (key := prompt_key(prompt)) not in cache}
        batches = split_batches(missing, batch_size)
        write_batches(model, missing, batches, cache, limits=LIMITS, sampling=sampling, description="")
        return [cache[prompt_key(prompt)] for prompt in prompts]


def random_answers(number: int, seed: int = 0) -> dict[str, Answer]:
    """Answers by key."""
    draw = random.Random(seed)
    return {prompt_key([seed, n]): Answer(draw.choices(range(300), k=n % 5), bool(n % 2)) for n in range(number)}


def test_whatever_byte_a_kill_cut_a_file_at_only_whole_answers_count_and_the_rest_can_be_added(tmp_path: Path) -> None:
    answers = random_answers(6)
    file = tmp_path / "rank-0.jsonl"
    with AnswerCache(file) as cache:
        for key, answer in answers.items():
            cache.add({key: answer})
    whole = file.read_bytes()
    ends = [0, *itertools.accumulate(len(line) for line in whole.splitlines(keepends=True))]
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        with AnswerCache(file) as cache:
            num_whole = sum(end <= size for end in ends) - 1
            assert dict(cache) == dict(list(answers.items())[:num_whole])
            cache.add({key: answer for key, answer in answers.items() if key not in cache})
            assert file.read_bytes() == whole  # at once: the next kill may come now
            assert dict(cache) == answers


def test_a_process_reads_the_files_of_all_and_leaves_the_torn_line_of_another_alone(tmp_path: Path) -> None:
    parts = [random_answers(4, seed) for seed in range(3)]
    files = [tmp_path / f"rank-{rank}.jsonl" for rank in range(3)]
    for file, part in zip(files, parts, strict=True):
        with AnswerCache(file) as cache:
            cache.add(part)
    torn = files[1].read_bytes()[:-3]
    files[1].write_bytes(torn)
    lost = list(parts[1])[-1]
    with AnswerCache(files[2], files) as cache:
        assert dict(cache) == {k: v for part in parts for k, v in part.items() if k != lost}
        cache.add({lost: parts[1][lost]})
    assert files[1].read_bytes() == torn
    with AnswerCache(files[0], files) as cache:
        assert dict(cache) == {k: v for part in parts for k, v in part.items()}


def add_and_read(path: Path, answers: dict[str, Answer], start: Barrier) -> dict[str, Answer]:
    """Add answers one by one, as a program of its own, and read them again."""
    with AnswerCache(path) as cache:
        start.wait()
        for key, answer in answers.items():
            cache.add({key: answer})
        return {key: cache[key] for key in answers}


def test_programs_that_write_to_one_file_at_the_same_time_read_each_its_own_answers(tmp_path: Path) -> None:
    parts = [random_answers(3000, seed) for seed in range(2)]
    path, context = tmp_path / "cache.jsonl", multiprocessing.get_context("fork")
    with context.Manager() as manager, ProcessPoolExecutor(2, context) as programs:
        start = manager.Barrier(2)
        assert list(programs.map(add_and_read, [path] * 2, parts, [start] * 2)) == parts
    with AnswerCache(path) as cache:
        assert dict(cache) == parts[0] | parts[1]


def test_of_two_answers_to_one_prompt_all_processes_take_the_same(tmp_path: Path) -> None:
    files = [tmp_path / f"rank-{rank}.jsonl" for rank in range(2)]
    for rank, file in enumerate(files):
        with AnswerCache(file) as cache:
            cache.add({"0123456789abcdef": Answer([rank], False)})
    for file in files:
        with AnswerCache(file, reversed(files)) as cache:
            assert cache["0123456789abcdef"] == Answer([0], False)


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_answers_in_batches_are_those_of_decoding_one_by_one(
    model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path, batch_size: int
) -> None:
    asked = [*prompts, *prompts[:3]]
    answers = answered(model, asked, tmp_path / "cache.jsonl", batch_size=batch_size)
    assert answers == [decoded(model, prompt) for prompt in asked]
    assert {answer.is_cut for answer in answers} == {True, False}
    assert (tmp_path / "cache.jsonl").read_bytes().count(b"\n") == len(prompts)  # the same question is answered once


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, seed=1)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "min_p": 0.9},
        {"num_beams": 3, "length_penalty": 2.0},
        {"min_new_tokens": 9},
        {"suppress_tokens": list(range(40, 300))},
        {"guidance_scale": 3.0},
        {"stop_strings": ["a", "e"]},
        {"cache_implementation": "static"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_targets_own_generation_config_changes_no_token(
    model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path, settings: dict[str, Any], sampling: Sampling
) -> None:
    model.save_pretrained(tmp_path / "target")
    file = tmp_path / "target" / "generation_config.json"
    file.write_text(json.dumps(settings | {"eos_token_id": 2, "pad_token_id": 0}))
    target = load_causal_lm(str(tmp_path / "target"))
    name, value = next(iter(settings.items()))
    assert getattr(target.generation_config, name) == value
    asked = prompts[:6]
    answers = answered(target, asked, tmp_path / "c.jsonl", batch_size=3, sampling=sampling)
    assert answers == [decoded(model, prompt, sampling) for prompt in asked]
    assert getattr(target.generation_config, name) == value


def test_prompts_that_are_added_or_shuffled_find_the_answers_of_before(
    model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    def answers(asked: list[list[int]]) -> list[Answer]:
        return answered(model, asked, tmp_path / "cache.jsonl", batch_size=4)

    answers(prompts[5:15])
    before = (tmp_path / "cache.jsonl").read_bytes()
    shuffled = random.Random(0).sample(prompts, len(prompts))
    assert answers(shuffled) == [decoded(model, prompt) for prompt in shuffled]
    after = (tmp_path / "cache.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == len(prompts)


def test_a_target_of_nan_writes_nothing(prompts: list[list[int]], tmp_path: Path) -> None:
    broken = build_model("qwen2", seed=3)
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="the target's logits are NaN"), AnswerCache(tmp_path / "answers") as cache:
        asked = {prompt_key(prompt): prompt for prompt in prompts[:2]}
        write_batches(broken, asked, [list(asked)], cache, limits=LIMITS, sampling=GREEDY, description="")
    with AnswerCache(tmp_path / "answers") as cache:
        assert not list(cache)


def test_the_batches_that_a_kill_leaves_over_are_the_ones_of_before(prompts: list[list[int]]) -> None:
    asked = {prompt_key(prompt): prompt for prompt in prompts}
    batches = split_batches(asked, 4)
    assert sorted(key for batch in batches for key in batch) == sorted(asked)
    for is_done in itertools.product([True, False], repeat=len(batches)):  # any that other processes had finished
        left = [batch for batch, done in zip(batches, is_done, strict=True) if not done]
        assert split_batches({key: asked[key] for batch in left for key in batch}, 4) == left


def test_sampled_answers_depend_on_prompts_and_seed_alone(
    model: PreTrainedModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    asked = {prompt_key(prompt): prompt for prompt in prompts}
    batches = split_batches(asked, 4)

    def sampled(name: str, *parts: list[list[str]], sampling: Sampling) -> dict[str, Answer]:
        for part in parts:
            with AnswerCache(tmp_path / name) as cache:
                write_batches(model, asked, part, cache, limits=LIMITS, sampling=sampling, description="")
        with AnswerCache(tmp_path / name) as cache:
            return dict(cache)

    warm = Sampling(temperature=1.0, top_p=0.9, seed=1)
    once = sampled("once", batches, sampling=warm)
    assert sampled("in parts", batches[3:], batches[:3], sampling=warm) == once
    assert sampled("alone", split_batches(asked, 1), sampling=warm) == once
    assert sampled("all at once", split_batches(asked, len(asked)), sampling=warm) == once
    assert sampled("other seed", batches, sampling=Sampling(temperature=1.0, top_p=0.9, seed=2)) != once
    assert sampled("greedy", batches, sampling=GREEDY) != once


def said(*texts: str) -> list[dict[str, str]]:
    """Messages from texts like `user: Hi`."""
    return [dict(zip(("role", "content"), text.split(": "), strict=True)) for text in texts]


def talk(row: dict, replies: list[Answer | Refusal], encoder: ChatEncoder) -> tuple[AnsweredChat, list[list[int]]]:
    """A conversation with a target that gives these replies, and the prompts it was asked."""
    conversation, prompts = answer_chat(row, encoder, LIMITS), []
    try:
        prompts.append(next(conversation))
        for reply in replies:
            prompts.append(conversation.send(reply))
    except StopIteration as end:
        return end.value, prompts
    raise AssertionError("asks for more")


def test_each_turn_is_asked_after_the_new_answers_not_the_old_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = ChatEncoder(tokenizer)
    row = {"messages": said("system: Be brief", "user: Hi", "assistant: old", "user: why", "assistant: older")}
    replies = [Answer([*tokenizer(text)["input_ids"], 2], False) for text in ("the cat", " \nit runs ")]
    conversation, prompts = talk(row, replies, encoder)
    new = said("system: Be brief", "user: Hi", "assistant: the cat", "user: why", "assistant:  \nit runs ")
    assert (conversation.messages, conversation.is_cut) == (new, False)
    assert conversation.turns == list(zip(prompts, [reply.ids for reply in replies], strict=True))
    assert prompts == [encoder.encode_prompt(new[:2]), encoder.encode_prompt(new[:4])]


@pytest.mark.parametrize(
    "texts, expected",
    [
        (("user: a", "assistant: b"), ["a"]),
        (("system: s", "user: a", "user: b"), ["sa", "b"]),
        (("user: a", "assistant: b", "user: c"), ["a", "c"]),
        (("user: a", "assistant: call", "tool: result", "assistant: b", "user: c"), ["a"]),
        (("user: a", "assistant: b", "user: c", "assistant: call", "tool: result", "user: d"), ["a", "c"]),
        (("user: a", "tool: result", "user: d"), ["a"]),
        (("system: s",), []),
        (("tool: result", "user: a"), []),
    ],
)
def test_questions_are_the_users_turns_up_to_the_first_result_of_a_tool(
    texts: tuple[str, ...], expected: list[str]
) -> None:
    assert ["".join(m["content"] for m in question) for question in question_turns(said(*texts))] == expected


@pytest.mark.parametrize(
    "reply, num_messages, is_cut, reason",
    [
        (Answer([40, 41], True), 4, True, "cut by the length limit"),
        (Answer([2], False), 2, False, "the answer is empty"),
        (Answer([], True), 2, False, "the answer is empty"),
        (Refusal("too long"), 2, False, "too long"),
    ],
    ids=["cut", "ended at once", "no token", "refused"],
)
def test_a_conversation_ends_with_a_cut_answer_and_before_one_that_does_not_come(
    tokenizer: PreTrainedTokenizerBase, reply: Answer | Refusal, num_messages: int, is_cut: bool, reason: str
) -> None:
    row = {"messages": said("user: a", "user: b", "user: c")}
    conversation, prompts = talk(row, [Answer([40, 2], False), reply], ChatEncoder(tokenizer))
    assert len(prompts) == 2
    assert len(conversation.messages) == num_messages
    assert conversation.is_cut == is_cut
    assert reason in conversation.reason


def test_text_keeps_special_tokens_but_not_the_end_of_turn_nor_half_a_character(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder = ChatEncoder(tokenizer)
    ids = tokenizer("<|unused|>the cat , it 's 世")["input_ids"]
    assert answer_text(Answer([*ids, 2], False), encoder, LIMITS) == "<|unused|>the cat , it 's 世"
    assert answer_text(Answer(ids, True), encoder, LIMITS) == "<|unused|>the cat , it 's 世"
    assert answer_text(Answer(ids[:-1], True), encoder, LIMITS) == "<|unused|>the cat , it 's "


def test_a_flipped_bit_costs_its_answer_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    answers, path = random_answers(12), tmp_path / "answers.jsonl"
    with AnswerCache(path) as cache:
        cache.add(answers)
    whole, draw = path.read_bytes(), random.Random(1)
    for place in draw.sample(range(len(whole)), 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        with AnswerCache(path) as cache:
            found = {key: cache[key] for key in cache}
        assert found.items() <= answers.items(), place
        assert len(found) >= len(answers) - 2, place  # a damaged line break costs two lines
    assert "is damaged: skipped" in caplog.text


def test_a_cache_of_an_earlier_version_has_no_checksums(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "ids": [1, 2], "is_cut": false}\n')
    with AnswerCache(path) as cache:
        assert dict(cache) == {"a": Answer([1, 2], is_cut=False)}
