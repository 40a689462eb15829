"""Labels are what the target wrote, token for token, for the templates of every family; what cannot be is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_server import FakeServer
from templates import FAMILIES, build, build_encoder
from test_chat import QWEN25, calls
from tiny import build_model, build_tokenizer, config_for

from pard_train.config import DataConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import encode_corpus, encoder_identity
from pard_train.data.store import TokenStore
from pard_train.errors import RowError, UserError
from pard_train.model import load_tokenizer
from pard_train.targets.regeneration import write_answers

Message = dict[str, Any]
Run = tuple[list[int], list[int]]  # all ids before a run of labels, the labels
ALL = pytest.mark.parametrize("name", FAMILIES)
OPENED = [name for name, family in FAMILIES.items() if family.opens]
KEEP_THOUGHTS = ["qwen3", "qwen3-thinking-on"]  # and neither open nor close one
NO_THOUGHTS = [name for name, family in FAMILIES.items() if not family.thoughts]
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "one turn": ["Hi", "the cat runs"],
    "three turns": ["Hi\n\n", "the cat.\n\nIt runs", "why", "because 😀 世界", "why", "because 😀 世界"],
    "spaces": ["Hi", " the cat\n", " why ", "\tbecause "],
}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **fields: Any) -> Message:
    return {"role": "assistant", "content": text, **fields}


def chat(*contents: str) -> list[Message]:
    """User and assistant in turn."""
    return [(user, answer)[i % 2](text) for i, text in enumerate(contents)]


def runs(documents: list[Document]) -> list[Run]:
    """Every run of labels, with what stands before it in its document."""
    found = []
    for document in documents:
        ids, edges = (
            document.input_ids.tolist(),
            np.flatnonzero(np.diff(document.loss_mask, prepend=False, append=False)),
        )
        found += [(ids[:start], ids[start:stop]) for start, stop in edges.reshape(-1, 2)]
    return found


def label(name: str, message: Message, is_cut: bool = False) -> str:
    """Text of the labels of one answer to "Hi"."""
    encoder = build_encoder(name)
    ((_, ids),) = runs(encoder.encode([user("Hi"), message], origin="x", is_cut=is_cut))
    text = encoder.tokenizer.decode(ids)
    if is_cut:
        return text
    assert text.endswith(FAMILIES[name].end)
    return text.removesuffix(FAMILIES[name].end)


def refusal(name: str, message: Message, **settings: Any) -> str:
    """Why an answer to "Hi" is refused."""
    with pytest.raises(RowError) as error:
        build_encoder(name).encode([user("Hi"), message], origin="x", **settings)
    return error.value.reason


@ALL
@pytest.mark.parametrize("has_system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("contents", CHATS.values(), ids=CHATS)
def test_labels_are_the_answers_after_the_prompts_that_engines_read(
    name: str, has_system: bool, contents: list[str]
) -> None:
    encoder, family = build_encoder(name), FAMILIES[name]
    messages = [*([SYSTEM] if has_system else []), *chat(*contents)]
    if has_system and "System role" in family.template:
        with pytest.raises(RowError, match="System role not supported"):
            encoder.encode(messages, origin="x")
        return
    documents = encoder.encode(messages, origin="x")
    stops = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = runs(documents)
    assert [before for before, _ in found] == [encoder.encode_prompt(messages[:stop]) for stop in stops]
    for (_, ids), content in zip(found, contents[1::2], strict=True):
        text = content.strip() if family.trims else content
        if family.thoughts and not family.opens:
            text = text.lstrip("\n")
        assert encoder.tokenizer.decode(ids) == family.prefix + text + family.end
    if family.bos and family.bos != family.end:
        bos = encoder.tokenizer.bos_token_id
        assert encoder.tokenizer("the cat")["input_ids"].count(bos) == 1  # it adds one unless it is told not to
        assert {document.input_ids.tolist().count(bos) for document in documents} == {1}


@pytest.mark.parametrize("name", NO_THOUGHTS)
def test_a_cut_answer_has_the_first_labels_of_the_whole_one(name: str) -> None:
    encoder = build_encoder(name)
    (_, whole), (_, cut) = (
        runs(encoder.encode(chat("Hi", "the cat runs"), origin="x", is_cut=is_cut))[0] for is_cut in (False, True)
    )
    assert cut == whole[: len(cut)]
    assert encoder.tokenizer.decode(cut).strip() == "the cat runs"


@ALL
def test_a_control_token_within_an_answer_is_refused_and_within_a_question_is_not(name: str) -> None:
    encoder, family = build_encoder(name), FAMILIES[name]
    special = {str(token) for token in encoder.tokenizer.added_tokens_decoder.values() if token.special}
    assert special >= {family.end, *family.special}
    for token in special | set(family.headers):
        assert token in refusal(name, answer(f"the cat {token} runs"))
        assert token in refusal(name, answer(f"the cat {token}"), is_cut=True)
        assert token in refusal(name, answer("the cat", reasoning_content=f"hm {token}"))
        ((before, _),) = runs(encoder.encode([user(f"Is {token} a token?"), answer("the cat")], origin="x"))
        assert f"Is {token} a token?" in encoder.tokenizer.decode(before)


def test_a_control_token_within_a_tool_call_is_refused() -> None:
    encoder = ChatEncoder(build_tokenizer(QWEN25))
    for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        with pytest.raises(RowError, match=re.escape(token)):
            encoder.encode([user("Hi"), calls({"name": "f", "arguments": {"a": token}})], origin="x")


@pytest.mark.parametrize("name", OPENED)
def test_an_answer_continues_the_thought_that_its_prompt_opens(name: str) -> None:
    thought = "hm\n</think>\n\nYes"
    assert label(name, answer(f"<think>\n{thought}")) == thought
    assert label(name, answer("Yes", reasoning_content="hm")) == thought
    assert label(name, answer(thought)) == thought
    assert label(name, answer("Yes")) == "\n</think>\n\nYes"
    assert label(name, answer(f"<think>\n{thought}"), is_cut=True) == thought
    assert label(name, answer("<think>\nhm"), is_cut=True) == "hm"
    assert label(name, answer("hm"), is_cut=True) == "hm"
    assert label(name, answer("", reasoning_content="hm"), is_cut=True) == "hm"
    for content in (
        "<think>\nhm",
        f"<think>\n{thought} <think>a</think>",
        f"{thought} <think>a</think> b",
        "a <think> b",
    ):
        assert "think" in refusal(name, answer(content)) or "thought" in refusal(name, answer(content))
    assert "thought" in refusal(name, answer(thought, reasoning_content="hm"))


def test_no_thought_follows_one_that_the_prompt_closes() -> None:
    name = "qwen3-thinking-off"
    assert label(name, answer("Yes")) == "Yes"
    assert label(name, answer("Yes"), is_cut=True) == "Yes"
    for message in (
        answer("<think>\nhm\n</think>\n\nYes"),
        answer("Yes", reasoning_content="hm"),
        answer("hm</think>Yes"),
    ):
        assert "th" in refusal(name, message)
    for message in (answer("<think>\nhm\n</think>\n\nYes"), answer("<think>\nhm"), answer("", reasoning_content="hm")):
        assert "thought" in refusal(name, message, is_cut=True)


@pytest.mark.parametrize("name", KEEP_THOUGHTS)
def test_a_thought_in_content_is_the_thought_of_its_own_field(name: str) -> None:
    encoder, written = build_encoder(name), "<think>\nhm, the cat\n</think>\n\nYes"
    given = [answer(written), answer("<think>hm, the cat</think>Yes"), answer("Yes", reasoning_content="hm, the cat")]
    labels = [runs(encoder.encode([user("Hi"), message, *chat("why", "so")], origin="x")) for message in given]
    assert labels[0] == labels[1] == labels[2]
    assert encoder.tokenizer.decode(labels[0][0][1]) == written + "<|im_end|>"
    assert label(name, answer(written), is_cut=True) == written
    assert label(name, answer("<think>\nhm"), is_cut=True) == "<think>\nhm"
    assert label(name, answer("", reasoning_content="hm"), is_cut=True) == "<think>\nhm"


@pytest.mark.parametrize("name", KEEP_THOUGHTS)
@pytest.mark.parametrize(
    "content",
    [
        "<think>a</think> lost <think>b</think> Yes",
        "The tag </think> ends a thought.",
        "The tag <think> begins a thought.",
        "Yes. <think>hm</think> No.",
        "<think>hm</think> Yes. </think>",
        "<think>\nunclosed",
    ],
)
def test_content_that_a_template_drops_or_moves_is_refused(name: str, content: str) -> None:
    assert re.search("think|thought", refusal(name, answer(content)))
    with pytest.raises(RowError):  # also where it is not the last answer
        build_encoder(name).encode([user("Hi"), answer(content), *chat("why", "so")], origin="x")


@pytest.mark.parametrize("name", [*OPENED, *KEEP_THOUGHTS])
@pytest.mark.parametrize(
    "message",
    [
        answer("<think>\nhm\n</think>\n\nYes", reasoning_content=""),
        answer("Yes", reasoning_content="<think>hm</think>"),
        answer("Yes", reasoning_content="a </think> b"),
    ],
    ids=["empty field", "field with tags", "field with an end"],
)
def test_an_answer_has_one_thought_or_is_refused(name: str, message: Message) -> None:
    encoder = build_encoder(name)
    try:
        ((before, ids),) = runs(encoder.encode([user("Hi"), message], origin="x"))
    except RowError:
        return
    text = encoder.tokenizer.decode(before + ids)
    assert (text.count("<think>"), text.count("</think>")) == (1, 1)


@pytest.mark.parametrize("name", NO_THOUGHTS)
@pytest.mark.parametrize("content", ["<think>a</think> and <think>b</think> Yes", "The tag </think> ends.", "<think>a"])
def test_without_thoughts_in_a_template_their_tags_are_ordinary_text(name: str, content: str) -> None:
    encoder, family = build_encoder(name), FAMILIES[name]
    ((_, ids),) = runs(encoder.encode([user("Hi"), answer(content)], origin="x"))
    assert ids == encoder.tokenizer(family.prefix + content + family.end, add_special_tokens=False)["input_ids"]


def encode(rows: list[dict[str, Any]], encoder: ChatEncoder, folder: Path) -> TokenStore:
    """The store of some rows."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    encode_corpus(DataConfig(source=str(folder / "rows.jsonl"), num_workers=1), encoder, folder / "tokens")
    return TokenStore.open(folder / "tokens")


def by_letter(encoder: ChatEncoder, text: str) -> list[int]:
    """Ids that no tokenizer gives: one letter at a time."""
    return [i for letter in text for i in encoder.tokenizer(letter, add_special_tokens=False)["input_ids"]]


def test_rows_with_the_ids_of_a_target_are_encoded_as_these_unless_they_are_of_another_tokenizer(
    tmp_path: Path,
) -> None:
    encoder = build_encoder("qwen2.5")
    messages = chat("Hi", "the cat", "why", "the dog")
    first, second = by_letter(encoder, "one"), by_letter(encoder, "two the")
    own = encoder_identity(encoder)["tokenizer"]
    joined = [[first, second], [first + second + first, second]]
    apart = [[first, second], [first + first, second]]
    rows = [
        {"messages": messages, "token_ids": {"tokenizer": tokenizer, "turns": turns}}
        for tokenizer, turns in [(own, joined), (own, apart), ("of another", joined)]
    ] + [{"messages": messages}]
    store = encode(rows, encoder, tmp_path / "a")
    rendered = runs(encoder.encode(messages, origin="x"))
    assert runs(list(store)) == [(prompt, ids) for turns in (joined, apart) for prompt, ids in turns] + 2 * rendered
    assert [document.origin.rpartition(":")[2] for document in store] == ["1", "2", "2", "3", "4"]
    counts = store.manifest["counts"]
    assert (counts["from_token_ids"], counts["altered"], counts["turns"]) == (4, 0, 8)


@pytest.mark.parametrize("odd", [-1, 301, 2**31, 2**70])
def test_an_id_that_no_token_has_is_an_error_of_its_row(odd: int, tmp_path: Path) -> None:
    encoder = build_encoder("qwen2.5")
    ids = {"tokenizer": encoder_identity(encoder)["tokenizer"], "turns": [[[1, 2], [3, odd]]]}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: token_ids must be from 0 to 300,"):
        encode([{"messages": chat("Hi", "the cat"), "token_ids": ids}], encoder, tmp_path / "a")


@pytest.mark.parametrize(
    "name, altered", [("llama3.1", 2), ("mistral-v0.1", 3), ("smollm2", 0), ("qwen3-thinking-off", 0)]
)
def test_rendered_answers_that_differ_from_their_rows_are_counted(name: str, altered: int, tmp_path: Path) -> None:
    rows = [{"messages": chat("Hi", "the cat\n", "why", " so")}, {"messages": chat("Hi", "the dog")}]
    counts = encode(rows, build_encoder(name), tmp_path / "a").manifest["counts"]
    assert (counts["from_token_ids"], counts["altered"]) == (0, altered)


@pytest.mark.parametrize(
    "name, said",
    [("mistral-v0.1", " Yes"), ("llama3.1", "Yes\n"), ("qwen3", "<think>hm</think> Yes"), ("qwen3", "a </think> b")],
)
def test_regenerated_rows_are_encoded_as_the_ids_that_the_target_was_given_and_wrote(
    name: str, said: str, tmp_path: Path
) -> None:
    tokenizer, target = build(name), tmp_path / "target"
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    build_model("qwen2", seed=0, eos_token_id=end).save_pretrained(target)
    tokenizer.save_pretrained(target)
    encoder = ChatEncoder(load_tokenizer(str(target)), FAMILIES[name].template_kwargs)
    asked: list[list[list[int]]] = []

    def reply(prompt: list[int]) -> dict[str, Any]:
        """The same words to everything, letter by letter; a question that names it is cut."""
        is_cut = "cut" in tokenizer.decode(prompt)
        asked.append([prompt, by_letter(encoder, said) + ([] if is_cut else [end])])
        return {"text": said, "token_ids": asked[-1][1], "finish_reason": "length" if is_cut else "stop"}

    questions = [["Hi"], ["one", "two"], ["three", "cut"]]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"messages": list(map(user, texts))}) + "\n" for texts in questions))
    with FakeServer(reply) as server:
        settings = {"servers": [server.url], "dtype": "float32", "max_retries": 0, "max_new_tokens": 32}
        config = config_for("regenerate", targets=[str(target)], **settings)
        written = write_answers(config, prompts, tmp_path / "out")
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    turns = [turn for row in rows for turn in row["token_ids"]["turns"]]
    assert sorted(asked) == sorted(turns)
    assert len(turns) == 5
    assert [row["token_ids"]["tokenizer"] for row in rows] == 3 * [encoder_identity(encoder)["tokenizer"]]
    store = encode(rows, encoder, tmp_path / "a")
    assert [list(run) for run in runs(list(store))] == turns
    assert store.manifest["counts"]["from_token_ids"] == 5
