"""Whatever the names of its columns, a row becomes the same checked chat; one that holds none says what it lacks."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import conversations

from pard_train.config import SourceConfig
from pard_train.data.rows import read_rows
from pard_train.data.schemas import SCHEMAS, Chat, to_chat
from pard_train.errors import RowError

Row = dict[str, Any]
PRESETS = sorted((Path(__file__).parents[1] / "conf" / "source").glob("*.yaml"))

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the cat"}
SEARCH = {"name": "search", "description": "Find", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"words": ["größe", 1.5], "deep": None}}}


def chat_of(row: Row, **settings: Any) -> Chat:
    """The chat of a row at `here:1`."""
    return to_chat(row, SourceConfig(path="chats.jsonl", **settings), "here:1")


def test_one_conversation_is_the_same_chat_in_every_schema() -> None:
    for messages in conversations(30, seed=5):
        texts = [message["content"] for message in messages]
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        pairs = [list(pair) for pair in zip(texts[:-2:2], texts[1:-2:2], strict=True)]
        rows: list[Row] = [
            {"messages": messages, "prompt": "another column", "id": 3},
            {"conversations": turns, "instruction": texts[0], "response": texts[1]},  # as in Magpie
            {"conversation": messages},
            {"instruction": texts[-2], "input": "", "output": texts[-1], "history": pairs, "text": "all of it"},
            {"prompt": messages[:-1], "completion": messages[-1:]},
            {"question": messages[:-1], "answer": texts[-1]},
        ]
        assert [chat_of(row) for row in rows] == [Chat(messages)] * len(rows)


@pytest.mark.parametrize("question", ["prompt", "question", "problem", "query"])
@pytest.mark.parametrize("answer", ["response", "answer", "completion", "output", "solution", "text", None])
def test_a_question_and_its_answer_go_by_many_names(question: str, answer: str | None) -> None:
    row = {question: "Hi", **({answer: "the cat"} if answer else {}), "source": "somewhere"}
    assert chat_of(row).messages == [USER, ASSISTANT][: 1 + bool(answer)]
    assert chat_of({"prompt": None, "response": None, **row}) == chat_of(row)


@pytest.mark.parametrize(
    "speaker, role",
    [
        *[(speaker, "user") for speaker in ("human", "user", "Human")],
        *[(speaker, "assistant") for speaker in ("gpt", "assistant", "chatgpt", "model", "bard", "bing")],
        *[(speaker, "tool") for speaker in ("observation", "tool", "function_response")],
        ("system", "system"),
    ],
)
def test_speakers_of_sharegpt_have_one_role_each(speaker: str, role: str) -> None:
    before = {"tool": ["human", "gpt"], "assistant": ["human"]}.get(role, [])
    turns = [{"from": name, "value": "x"} for name in [*before, speaker, "human"]]
    assert chat_of({"conversations": turns}).messages[len(before)] == {"role": role, "content": "x"}


def test_alpaca_joins_instruction_and_input_as_llama_factory_does() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["Hi", "the cat"]]}
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "the cat"), ("user", "Add\n1 2")]
    assert chat_of(row).messages == [{"role": r, "content": c} for r, c in [*expected, ("assistant", "3")]]
    assert chat_of({"instruction": "", "input": "1 2", "output": None}).messages == [{**USER, "content": "1 2"}]


def test_function_calls_of_llama_factory_become_tool_calls() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": '{"found": 3}'},
            {"from": "function_call", "value": json.dumps([CALL["function"]] * 2)},
            {"from": "observation", "value": "one"},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "the cat"},
        ],
        "tools": json.dumps([SEARCH]),
    }
    chat = chat_of(row)
    assert chat.tools == [{"type": "function", "function": SEARCH}]
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.messages[3]["tool_calls"] == [CALL, CALL]


@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], json.dumps(CALL["function"]["arguments"])])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": "I look."}])
def test_tool_calls_of_openai_have_their_arguments_as_an_object(arguments: Any, content: Row) -> None:
    call = {**CALL, "id": "c1", "function": {"name": "search", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c1", "name": "search", "content": "3"}
    given = [USER, {"role": "assistant", **content, "tool_calls": [call], "refusal": None}, result]
    expected = {"role": "assistant", "content": content.get("content") or "", "tool_calls": [{**CALL, "id": "c1"}]}
    tools = [{"type": "function", "function": SEARCH}]
    assert chat_of({"messages": given, "tools": tools}) == Chat([USER, expected, result], tools)
    no_arguments = {"id": "c1", "function": {"name": "now", "arguments": ""}}
    (_, message) = chat_of({"messages": [USER, {"role": "assistant", "tool_calls": [no_arguments]}]}).messages
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": {}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_and_the_finish_reason_are_kept(name: str) -> None:
    message = {**ASSISTANT, name: "It sees."}
    chat = chat_of({"messages": [USER, message], "finish_reason": "length"})
    assert chat == Chat([USER, {**ASSISTANT, "reasoning_content": "It sees."}], finish_reason="length")
    assert chat_of({"messages": [USER, {"reasoning_content": "", **message}]}).messages == chat.messages
    assert (
        chat_of({"messages": [USER, message], "system": "", "system_prompt": "Be kind."}).messages[1:] == chat.messages
    )
    cut = chat_of({"messages": [USER, {"role": "assistant", "content": None, name: "It se"}]}).messages[1]
    assert cut == {"role": "assistant", "content": "", "reasoning_content": "It se"}


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert chat_of({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "Hi\nthere"


def test_typed_parts_of_llama_factory_become_content_thoughts_and_calls() -> None:
    call = {"name": "search", "arguments": {"query": "cats"}}
    parts = [("reasoning", "It sees."), ("text", "I look."), *[("tool_call", json.dumps(call))] * 2]
    message = {"role": "assistant", "content": [{"type": kind, "value": text} for kind, text in parts]}
    (_, read) = chat_of({"messages": [USER, {**message, "loss_weight": 1.0}]}).messages
    calls = [{"type": "function", "function": call}] * 2
    assert read == {"role": "assistant", "content": "I look.", "reasoning_content": "It sees.", "tool_calls": calls}


def call_of(name: str, arguments: Any) -> Row:
    """An assistant's message that calls a tool."""
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": {"name": name, "arguments": arguments}}],
    }


def tool_of(name: str, *parameters: str) -> Row:
    """The schema of a tool, which leaves out what it does not say."""
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def read_columns(rows: list[Row], path: Path) -> list[Chat]:
    """The chats of rows that were written to a parquet file."""
    names = dict.fromkeys(name for row in rows for name in row)
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)
    source = SourceConfig(path=str(path))
    return [to_chat(row, source, origin) for row, origin in read_rows(source)]


@pytest.mark.parametrize(
    "arguments", [[{"city": "Paris"}, {"sum": {"a": 1}}, {"sum": {"b": [2]}, "unit": "m"}, {}], ["{}"] * 4]
)
def test_nulls_that_a_columnar_file_puts_in_leave_no_trace(tmp_path: Path, arguments: list[Any]) -> None:
    names = ["weather", "add", "scale", "now"]
    tools = [tool_of("weather", "city"), tool_of("add", "sum"), tool_of("scale", "sum", "unit"), tool_of("now")]
    rows = [
        {"messages": [USER, ASSISTANT], "conversations": None},
        {"messages": [USER, call_of("now", arguments[3])], "system": "Be brief."},
        *[{"messages": [USER, call_of(*call)], "tools": tools[:2]} for call in zip(names, arguments, strict=True)],
        {"messages": [USER, *map(call_of, names[:1], arguments[:1])], "tools": tools[2:]},
    ]
    read = read_columns(rows, tmp_path / "chats.parquet")
    assert read == [chat_of(row) for row in rows]
    assert json.dumps(read[0].messages) == json.dumps([USER, ASSISTANT])
    assert "null" not in json.dumps([dataclasses.asdict(chat)["messages"] for chat in read])


def test_nulls_of_a_row_of_json_are_its_own(tmp_path: Path) -> None:
    messages = [USER, call_of("weather", {"city": None, "days": [None, {"day": None}]})]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    chat = chat_of({"messages": messages, "tools": tools})
    assert chat == Chat(messages, tools)
    as_text = [USER, call_of("weather", json.dumps(messages[1]["tool_calls"][0]["function"]["arguments"]))]
    assert read_columns([{"messages": as_text, "tools": json.dumps(tools)}], tmp_path / "chats.parquet") == [chat]


@pytest.mark.parametrize("value", [datetime(2024, 1, 1), b"\xff", Decimal("1.5")], ids=["time", "bytes", "decimal"])
def test_a_value_of_a_columnar_file_that_is_not_json_is_refused_by_its_row(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "chats.parquet"
    kind = type(value).__name__
    reason = rf"\(Object of type {kind} is not JSON serializable\): store it as text"
    with pytest.raises(RowError, match=rf"chats\.parquet\[0\]: message 1 \(assistant\) has a value .*{reason}"):
        read_columns([{"messages": [USER, call_of("f", {"when": {"is": [value]}})]}], path)
    tool = {"name": "f", "parameters": {"default": value}}
    with pytest.raises(RowError, match=rf"chats\.parquet\[0\]: tools have a value that is not JSON {reason}"):
        read_columns([{"messages": [USER], "tools": [tool]}], path)
    assert read_columns([{"messages": [USER], "crawled": value}], path) == [Chat([USER])]  # no part of the chat


def test_columns_of_other_names_are_named_by_the_source() -> None:
    row = {"prompt": "not this", "problem": "Hi", "generation": "the cat", "instructions": "Be brief."}
    columns = {"prompt": "problem", "response": "generation", "system": "instructions"}
    assert chat_of(row, columns=columns).messages == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]
    with pytest.raises(RowError, match=r"columns=\{response: gen\}, but the row's are prompt, problem, generation"):
        chat_of(row, columns={"prompt": "problem", "response": "gen"})


def test_columns_that_the_source_names_go_before_the_schema_that_others_would_have() -> None:
    row = {"messages": [{**USER, "content": "old"}], "instruction": "Be brief.", "asked": "Hi", "written": "the cat"}
    columns = {"prompt": "asked", "response": "written", "system": "instruction"}
    assert chat_of(row, columns=columns).messages == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]


def test_a_source_may_name_the_schema_that_auto_would_not_take() -> None:
    row = {"messages": [USER], "problem": "why", "solution": "because", "answer": "b"}
    assert chat_of(row).messages == [USER]
    assert [message["content"] for message in chat_of(row, schema="prompt").messages] == ["why", "because"]
    with pytest.raises(RowError, match=r"no chat in the columns messages, problem, solution, answer: .*instruction"):
        chat_of(row, schema="alpaca")


@pytest.mark.parametrize("system", [None, "", " \n"])
def test_an_empty_system_prompt_is_none(system: str | None) -> None:
    assert chat_of({"system_prompt": system, "prompt": "Hi"}).messages == [USER]
    given = [{"role": "system", "content": system or ""}, USER]
    assert chat_of({"messages": given}).messages == [USER]
    assert chat_of({"messages": given, "system": "mine"}).messages == [{"role": "system", "content": "mine"}, USER]


@pytest.mark.parametrize("nothing", [None, "", "null", "[]", []])
def test_tools_and_arguments_may_be_given_as_nothing(nothing: Any) -> None:
    assert chat_of({"messages": [USER], "tools": nothing}).tools is None
    call = {"function": {"name": "f", "arguments": nothing if nothing not in ("[]", []) else {}}}
    (_, answer) = chat_of({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}).messages
    assert answer["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_a_system_prompt_among_the_messages_goes_before_the_one_in_a_column() -> None:
    own = {"role": "system", "content": "mine"}
    assert chat_of({"messages": [own, USER], "system": "theirs"}).messages == [own, USER]


TURN = {"from": "human", "value": "x"}


@pytest.mark.parametrize(
    "row, reason",
    [
        ({}, "no chat in the columns (none): one of messages, conversations, conversation, instruction, prompt"),
        ({"chat": [USER], "id": 3}, "no chat in the columns chat, id"),
        ({"messages": None}, "no chat in the columns messages"),
        ({"messages": []}, "must be a non-empty list"),
        ({"messages": "Hi"}, "must be a non-empty list"),
        ({"messages": ["Hi"]}, "message 0 has role None"),
        ({"messages": [{**USER, "role": "human"}]}, "message 0 has role 'human': allowed are system, user"),
        ({"messages": [{**USER, "content": {"a": 1}}]}, "message 0 (user) must have a text `content`"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}]}, "content has a part that is not {type: text"),
        ({"messages": [{**USER, "content": [{"type": "text", "text": 3}]}]}, "content has a part that is not"),
        ({"messages": [{**USER, "content": [{"type": [], "text": "a"}]}]}, "content has a part that is not"),
        ({"messages": [{"role": "system", "content": "x"}]}, "ends with a system prompt, so nothing is asked"),
        ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "message 1 is an empty answer"),
        ({"messages": [USER, {**ASSISTANT, "content": None}]}, "message 1 (assistant) must have a text `content`"),
        ({"messages": [USER, {**ASSISTANT, "content": "\ud83d"}]}, "message 1 (assistant) has half a character"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": "x"}]}, "tool_calls is not JSON"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": {"name": "f"}}]}, "tool_calls must be a JSON object or list"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": ["f"]}]}, "a tool call is not JSON"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"arguments": {}}]}]}, "must have tool_calls of the form"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "arguments must be"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments is not JSON"),
        ({"messages": [USER, {**ASSISTANT, "reasoning": 3}]}, "must have a text `reasoning_content`"),
        ({"messages": [USER], "tools": "search"}, "tools is not JSON"),
        ({"messages": [USER], "tools": {"name": "f"}}, "tools must be a JSON object or list"),
        ({"messages": [USER], "tools": [{"name": "\ud83d"}]}, "tools have half a character"),
        ({"messages": [USER], "finish_reason": "\ud83d"}, "finish_reason has half a character"),
        ({"conversations": [{"from": "gpt", "value": "x"}, TURN]}, "message 0 is an answer without a user's message"),
        ({"conversations": [TURN, {"from": "narrator", "value": "x"}]}, "a turn is from 'narrator': allowed are"),
        ({"conversations": [{"value": "x"}]}, "a turn is from None"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "a turn is from ['human']"),
        ({"conversations": [TURN, {"from": "function_call", "value": "f(x)"}]}, "a function call is not JSON"),
        ({"conversations": [TURN, {"from": "tool", "value": "x"}]}, "message 1 is a tool's result without"),
        ({"instruction": "Hi", "output": ""}, "message 1 is an empty answer"),
        ({"instruction": "Hi", "history": [["x"]]}, "`history` must be a list of [question, answer], found ['x']"),
        ({"instruction": "Hi", "history": 3}, "`history` must be"),
        ({"prompt": 3}, "message 0 (user) must have a text `content`"),
        ({"prompt": "Hi", "answer": ["a", "b"]}, "message 1 has role None"),
    ],
)
def test_a_row_without_a_whole_chat_is_refused_by_its_origin(row: Row, reason: str) -> None:
    with pytest.raises(RowError) as error:
        chat_of(row)
    assert error.value.origin == "here:1"
    assert reason in error.value.reason
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_a_source_by_settings_that_exist(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# @package prepare.sources.{path.stem}\n# ")
    source = SourceConfig(**yaml.safe_load(text))
    assert source.path
    assert source.schema in {"auto", *SCHEMAS}
    assert source.license
    default = SourceConfig(path=source.path)
    given = {name for name in yaml.safe_load(text) if name != "path"}
    assert given == {f.name for f in dataclasses.fields(source) if getattr(source, f.name) != getattr(default, f.name)}
