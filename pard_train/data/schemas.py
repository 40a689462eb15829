"""A row of any chat corpus becomes one checked chat: the columns and names of the common schemas, as tables.

    messages   messages: [{role, content, tool_calls, reasoning_content}]        (OpenAI)
    sharegpt   conversations: [{from, value}]                                    (ShareGPT, LLaMA-Factory)
    alpaca     instruction, input, output, history                               (Alpaca, LLaMA-Factory)
    prompt     a question and its answer, under any of their usual names

Every schema may have a system prompt (`system`), `tools`, `finish_reason` and `token_ids` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from pard_train.config import SourceConfig
from pard_train.data.rows import Row
from pard_train.errors import RowError

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bard", "bing", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
SHAREGPT_FIELDS = (("from", "role"), ("value", "content"))  # of either kind a turn may be
QUESTIONS = ("prompt", "question", "problem", "query")
ANSWERS = ("response", "completion", "output", "solution", "answer", "text")  # the first that a row has
SYSTEM_PROMPTS = ("system", "system_prompt")
THOUGHTS = ("reasoning_content", "reasoning")  # the second is vLLM's newer name
IDENTITIES = ("name", "tool_call_id")  # of messages; what else a message carries, templates do not read
# Content may be given in typed parts: OpenAI's have their text under `text`, LLaMA-Factory's (version 1) under `value`.
PARTS = {"text": "content", "reasoning": "reasoning_content", "tool_call": "tool_calls"}
PART_TEXTS = ("text", "value")

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        messages: checked (see `check_messages`). They may end with a question, as a prompt that awaits its answer.
        tools: JSON schemas of the functions that the model may call, each {"type": "function", "function": {...}}.
        finish_reason: why the last answer ended; `length` if it hit a limit.
        token_ids: the ids that a target was given and wrote, if the row has them.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    token_ids: TokenIds | None = None


@dataclass(frozen=True)
class TokenIds:
    """Answers of a target as its own token ids.

    Attributes:
        tokenizer: fingerprint of the target's tokenizer.
        turns: (prompt ids, answer ids) of every turn.
    """

    tokenizer: str
    turns: list[tuple[list[int], list[int]]]

    @classmethod
    def of(cls, value: Any, origin: str) -> TokenIds | None:
        """The `token_ids` of a row. Raises RowError if they are malformed."""
        if value is None:
            return None
        try:
            turns = [(list(map(index, prompt)), list(map(index, answer))) for prompt, answer in value["turns"]]
            is_complete = bool(turns) and all(prompt and answer for prompt, answer in turns)
        except (KeyError, TypeError, ValueError):
            is_complete = False
        if not is_complete or not isinstance(value.get("tokenizer"), str):
            raise RowError(origin, "token_ids must be {tokenizer: FINGERPRINT, turns: [[prompt ids, answer ids], ...]}")
        return cls(value["tokenizer"], turns)


def to_chat(row: Row, source: SourceConfig, origin: str) -> Chat:
    """The chat that a row holds.

    Args:
        row: as it was read.
        source: its schema, and the columns that bear other names.
        origin: named in errors.

    Raises:
        RowError: if there is no chat in the row, or a message of it is not as it must be.
    """
    row = _renamed(row, source.columns, origin)
    columns, read = SCHEMAS[_schema_of(row, source.schema, origin)]
    messages = _with_system_prompt(read(row, columns, origin), _first(row, SYSTEM_PROMPTS))
    check_messages(messages, origin)
    if messages[-1]["role"] == "system":
        raise RowError(origin, "ends with a system prompt, so nothing is asked")
    if fault := _not_storable(row.get("finish_reason")):
        raise RowError(origin, f"finish_reason has {fault}")
    ids = TokenIds.of(row.get("token_ids"), origin)
    if ids is not None and len(ids.turns) != sum(message["role"] == "assistant" for message in messages):
        raise RowError(origin, f"token_ids has {len(ids.turns)} turns, but the messages have another number of answers")
    return Chat(messages, _tools(row.get("tools"), origin), row.get("finish_reason"), ids)


def check_messages(messages: Any, origin: str) -> None:
    """Check the roles, contents and order of one conversation.

    Raises:
        RowError: naming the message and what is allowed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError(origin, f"`messages` must be a non-empty list of {{role, content}}, found {messages!r:.80}")
    before = None
    for number, message in enumerate(messages):
        if fault := _fault(message if isinstance(message, Mapping) else {}, before):
            raise RowError(origin, f"message {number} {fault}")
        before = message["role"]


def _fault(message: Mapping[str, Any], before: str | None) -> str | None:
    """What is wrong with a message after one of the role `before`."""
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return f"has role {role!r:.80}: allowed are {', '.join(ROLES)}"
    if not isinstance(content, str):
        return f"({role}) must have a text `content`"
    if calls and not (isinstance(calls, Sequence) and all(map(_is_call, calls))):
        return f"({role}) must have tool_calls of the form {{function: {{name, arguments: {{...}}}}}}"
    thought = message.get("reasoning_content") or ""
    if not isinstance(thought, str):
        return f"({role}) must have a text `reasoning_content`"
    others = [message[key] for key in ("tool_calls", *IDENTITIES) if message.get(key)]
    if fault := _not_storable([content, thought, others]):
        return f"({role}) has {fault}"
    if role == "tool" and before not in ("assistant", "tool"):
        return "is a tool's result without an assistant's message before it"
    if role == "assistant" and before not in ("user", "tool"):
        return "is an answer without a user's message before it"
    if role == "assistant" and not (content.strip() or thought.strip() or calls):
        return "is an empty answer: remove the answer, so that a target can write one, or the row"
    return None


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return (
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), Mapping)
    )


def _not_storable(value: Any) -> str | None:
    """What in a value no file of JSON can hold, None if there is nothing such."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character (an unpaired surrogate)"
    except TypeError as error:  # columnar files may hold times and bytes
        return f"a value that is not JSON ({error}): store it as text"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Schemas: (row, columns, origin) -> messages, yet to be checked
# ---------------------------------------------------------------------------------------------------------------------


def _read_messages(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    return _each(_first(row, columns), lambda message: _message(message, origin))


def _read_sharegpt(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    return _each(_first(row, columns), lambda turn: _message(_from_speaker(turn, origin), origin))


def _read_alpaca(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    pairs = _parsed(row.get("history") or [], list, "`history`", origin)
    history = [message for pair in pairs for message in _pair(pair, origin)]
    question = "\n".join(str(row[name]) for name in (*columns, "input") if row.get(name))
    return [*history, _said("user", question), *_said_or_given("assistant", _first(row, ANSWERS), origin)]


def _read_prompt(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    question = _said_or_given("user", _first(row, columns), origin)
    return [*question, *_said_or_given("assistant", _first(row, ANSWERS), origin)]


# The columns that tell a schema, of which one holds the chat or the question. `auto` takes the first that fits.
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Row, tuple[str, ...], str], Any]]] = {
    "messages": (("messages",), _read_messages),
    "sharegpt": (("conversations", "conversation"), _read_sharegpt),
    "alpaca": (("instruction",), _read_alpaca),
    "prompt": (QUESTIONS, _read_prompt),
}


def _schema_of(row: Row, wanted: str, origin: str) -> str:
    candidates = {name: SCHEMAS[name][0] for name in (SCHEMAS if wanted == "auto" else (wanted,))}
    for name, columns in candidates.items():
        if _first(row, columns) is not None:
            return name
    allowed = ", ".join(column for columns in candidates.values() for column in columns)
    raise RowError(
        origin,
        f"no chat in the columns {', '.join(map(str, row)) or '(none)'}: one of {allowed} is needed; "
        "name a column that bears another name, such as columns={prompt: NAME, response: NAME}",
    )


def _renamed(row: Row, columns: Mapping[str, str], origin: str) -> Row:
    missing = [f"{name}: {column}" for name, column in columns.items() if column not in row]
    if missing:
        raise RowError(origin, f"columns={{{', '.join(missing)}}}, but the row's are {', '.join(map(str, row))}")
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _with_system_prompt(messages: Any, system: Any) -> Any:
    """One that stands among the messages goes before the one in its own column."""
    is_needed = isinstance(messages, list) and not any(message.get("role") == "system" for message in messages)
    return [_said("system", system), *messages] if is_needed and system and str(system).strip() else messages


def _tools(tools: Any, origin: str) -> list[dict[str, Any]] | None:
    found = [_tool(tool, origin) for tool in _parsed(tools or [], list, "tools", origin)]
    if fault := _not_storable(found):
        raise RowError(origin, f"tools have {fault}")
    return found or None


def _tool(tool: Any, origin: str) -> dict[str, Any]:
    tool = _parsed(tool, dict, "a tool", origin)
    return tool if "function" in tool else {"type": "function", "function": tool}


# ---------------------------------------------------------------------------------------------------------------------
# Messages
# ---------------------------------------------------------------------------------------------------------------------


def _message(message: Any, origin: str) -> Message:
    """A message with the fields that templates read. Those with null are left out: columnar files have them all."""
    if not isinstance(message, Mapping):
        return {}
    if isinstance(message.get("content"), list):
        message = {**message, "content": "", **_joined_parts(message["content"], origin)}
    result = {"role": message.get("role"), "content": message.get("content")}
    result |= {key: message[key] for key in IDENTITIES if message.get(key) is not None}
    if thought := _first(message, THOUGHTS):
        result["reasoning_content"] = thought
    if calls := message.get("tool_calls"):
        result["tool_calls"] = [_tool_call(call, origin) for call in _parsed(calls, list, "tool_calls", origin)]
    if result["content"] is None and (thought or calls):
        result["content"] = ""
    return result


def _joined_parts(parts: list[Any], origin: str) -> dict[str, Any]:
    """Fields of a message whose content is given in parts; texts are joined as vLLM joins them."""
    found: dict[str, list[str]] = {}
    for part in parts:
        text = _first(part, PART_TEXTS) if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type") not in PARTS:
            kinds = ", ".join(PARTS)
            raise RowError(origin, f"content has a part that is not {{type: {kinds}; text: ...}}: {part!r:.80}")
        found.setdefault(PARTS[part["type"]], []).append(text)
    return {field: texts if field == "tool_calls" else "\n".join(texts) for field, texts in found.items()}


def _tool_call(call: Any, origin: str) -> dict[str, Any]:
    """A call whose arguments are an object, as engines hand them to templates; data sets have them as JSON text."""
    call = _parsed(call, dict, "a tool call", origin)
    function = _parsed(call.get("function") or call, dict, "a tool call's function", origin)
    arguments = _parsed(function.get("arguments") or {}, dict, "a tool call's arguments", origin)
    identity = {"id": call["id"]} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": function.get("name"), "arguments": arguments}}


def _from_speaker(turn: Any, origin: str) -> Any:
    """A ShareGPT turn as a message."""
    if not isinstance(turn, Mapping):
        return turn
    speaker, text = (_first(turn, names) for names in SHAREGPT_FIELDS)
    name = str(speaker).lower()
    if name not in SPEAKERS:
        raise RowError(origin, f"a turn is from {speaker!r:.80}: allowed are {', '.join(SPEAKERS)}")
    role = SPEAKERS[name]
    if name == "function_call":
        calls = _parsed(text, (dict, list), "a function call", origin)
        return {"role": role, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**turn, "role": role, "content": text}


def _pair(pair: Any, origin: str) -> list[Message]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise RowError(origin, f"`history` must be a list of [question, answer], found {pair!r:.80}")
    return [_said("user", pair[0]), _said("assistant", pair[1])]


def _said(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _said_or_given(role: str, content: Any, origin: str) -> list[Message]:
    """Messages of a column that holds a text, a list of messages or nothing."""
    if isinstance(content, list):
        return [_message(message, origin) for message in content]
    return [] if content is None else [_said(role, content)]


def _each(values: Any, convert: Callable[[Any], Any]) -> Any:
    return [convert(value) for value in values] if isinstance(values, list) else values


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _parsed(value: Any, kind: type | tuple[type, ...], what: str, origin: str) -> Any:
    """A value, or what its JSON text says, of the kind wanted."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(origin, f"{what} is not JSON ({error}): {value!r:.80}") from error
    if not isinstance(value, kind):
        raise RowError(origin, f"{what} must be a JSON object or list, found {value!r:.80}")
    return value
