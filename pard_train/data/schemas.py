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
from itertools import chain
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
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # vLLM's newer name, and that of gpt-oss
IDENTITIES = ("name", "tool_call_id")  # of messages; what else a message carries, templates do not read
# Content may be given in typed parts: OpenAI's have their text under `text`, LLaMA-Factory's (version 1) under `value`.
PARTS = {"text": "content", "reasoning": "reasoning_content", "tool_call": "tool_calls"}
PART_TEXTS = ("text", "value")

Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """One conversation."""

    messages: list[Message]  # checked (see `check_messages`); a prompt's end with a question
    tools: list[dict[str, Any]] | None = None  # functions for the model: {"type": "function", "function": JSON schema}
    finish_reason: str | None = None  # why the last answer ended; `length` if it hit a limit
    token_ids: TokenIds | None = None  # the answers as a target wrote them


@dataclass(frozen=True)
class TokenIds:
    """Answers of a target as its own token ids."""

    tokenizer: str  # fingerprint of the target's tokenizer
    turns: list[tuple[list[int], list[int]]]  # (prompt ids, answer ids)

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
    """Chat of a row, by the schema and column names of its source. Raises RowError if it has none, or a bad message."""
    row = _renamed(row, source.columns, origin)
    columns, read = SCHEMAS[_schema_of(row, source, origin)]
    messages = _with_system_prompt(read(row, columns, origin), _filled(row, SYSTEM_PROMPTS))
    check_messages(messages, origin)
    if messages[-1]["role"] == "system":
        raise RowError(origin, "ends with a system prompt, so nothing is asked")
    if fault := _not_storable(row.get("finish_reason")):
        raise RowError(origin, f"finish_reason has {fault}")
    ids = TokenIds.of(row.get("token_ids"), origin)
    if ids is not None and len(ids.turns) != sum(message["role"] == "assistant" for message in messages):
        raise RowError(origin, f"token_ids has {len(ids.turns)} turns, but the messages have another number of answers")
    return Chat(messages, _tools(_filled(row, ["tools"]), origin), row.get("finish_reason"), ids)


def check_messages(messages: Any, origin: str) -> None:
    """Check the roles, contents and order of one conversation. Raises RowError, naming the message."""
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
    match call:
        case {"function": {"name": str(), "arguments": Mapping()}}:
            return True
    return False


def _not_storable(value: Any) -> str | None:
    """The part of a value that JSON files cannot hold, if any."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "half a character (an unpaired surrogate)"
    except TypeError as error:  # columnar files may hold times and bytes
        return f"a value that is not JSON ({error}): store it as text"
    return None


# Schemas: (row, columns, origin) -> messages, not checked yet.


def _read_messages(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    return _each(_first(row, columns), lambda message: _message(message, origin))


def _read_sharegpt(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    return _each(_first(row, columns), lambda turn: _message(_from_speaker(turn, origin), origin))


def _read_alpaca(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    pairs = _parsed(_filled(row, ["history"]) or [], list, "`history`", origin)
    history: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(origin, f"`history` must be a list of [question, answer], found {pair!r:.80}")
        history += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    question = {"role": "user", "content": "\n".join(str(row[name]) for name in (*columns, "input") if row.get(name))}
    return [*history, question, *_messages_of("assistant", _first(row, ANSWERS), origin)]


def _read_prompt(row: Row, columns: tuple[str, ...], origin: str) -> Any:
    question = _messages_of("user", _first(row, columns), origin)
    return [*question, *_messages_of("assistant", _first(row, ANSWERS), origin)]


# The columns that tell a schema, of which one holds the chat or the question. `auto` takes the first that fits.
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Row, tuple[str, ...], str], Any]]] = {
    "messages": (("messages",), _read_messages),
    "sharegpt": (("conversations", "conversation"), _read_sharegpt),
    "alpaca": (("instruction",), _read_alpaca),
    "prompt": (QUESTIONS, _read_prompt),
}


def _schema_of(row: Row, source: SourceConfig, origin: str) -> str:
    candidates = {name: SCHEMAS[name][0] for name in (SCHEMAS if source.schema == "auto" else (source.schema,))}
    for given in ({name: row[name] for name in source.columns}, row):  # what the user names comes first
        for name, columns in candidates.items():
            if _first(given, columns) is not None:
                return name
    allowed, found = ", ".join(chain.from_iterable(candidates.values())), ", ".join(map(str, row)) or "(none)"
    advice = "name a column that bears another name, such as columns={prompt: NAME, response: NAME}"
    raise RowError(origin, f"no chat in the columns {found}: one of {allowed} is needed; {advice}")


def _renamed(row: Row, columns: Mapping[str, str], origin: str) -> Row:
    missing = [f"{name}: {column}" for name, column in columns.items() if column not in row]
    if missing:
        raise RowError(origin, f"columns={{{', '.join(missing)}}}, but the row's are {', '.join(map(str, row))}")
    return {**row, **{name: row[column] for name, column in columns.items()}}


def _with_system_prompt(messages: Any, system: Any) -> Any:
    """The messages after a system prompt of its own column, which one among the messages overrides."""
    if not isinstance(messages, list):
        return messages
    messages = [m for m in messages if m.get("role") != "system" or str(m.get("content")).strip()]  # blank: none
    if any(message.get("role") == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages] if system and str(system).strip() else messages


def _tools(tools: Any, origin: str) -> list[dict[str, Any]] | None:
    parsed = [_parsed(tool, dict, "a tool", origin) for tool in _parsed(tools or [], list, "tools", origin)]
    if fault := _not_storable(parsed):
        raise RowError(origin, f"tools have {fault}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in parsed] or None


def _message(message: Any, origin: str) -> Message:
    """A message with the fields that templates read, without nulls: columnar files have all fields."""
    if not isinstance(message, Mapping):
        return {}
    if isinstance(message.get("content"), list):
        message = {**message, "content": "", **_joined_parts(message["content"], origin)}
    result = {"role": message.get("role"), "content": message.get("content")}
    result |= {key: message[key] for key in IDENTITIES if message.get(key) is not None}
    if thought := _filled(message, THOUGHTS):
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
        if not isinstance(text, str) or part.get("type") not in [*PARTS]:  # a list is none, and has no hash
            allowed = f"{{type: {', '.join(PARTS)}; text: ...}}"
            raise RowError(origin, f"content has a part that is not {allowed}: {part!r:.80}")
        found.setdefault(PARTS[part["type"]], []).append(text)
    return {field: texts if field == "tool_calls" else "\n".join(texts) for field, texts in found.items()}


def _tool_call(call: Any, origin: str) -> dict[str, Any]:
    """A call whose arguments are an object, as engines pass them to templates; data sets have them as JSON text."""
    call = _parsed(call, dict, "a tool call", origin)
    function = _parsed(call.get("function") or call, dict, "a tool call's function", origin)
    arguments = _parsed(_filled(function, ["arguments"]) or {}, dict, "a tool call's arguments", origin)
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


def _messages_of(role: str, content: Any, origin: str) -> list[Message]:
    """Messages of a column that holds a text, a list of messages or nothing."""
    if isinstance(content, list):
        return [_message(message, origin) for message in content]
    return [] if content is None else [{"role": role, "content": content}]


def _each(values: Any, convert: Callable[[Any], Any]) -> Any:
    return [convert(value) for value in values] if isinstance(values, list) else values


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _filled(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((row[name] for name in names if row.get(name) and row[name] != "null"), None)


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
