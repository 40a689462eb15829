"""From messages to token ids with an exact loss mask, by rendering the tokenizer's own chat template.

The label of an assistant turn continues the generation prompt: the template's text between that prompt and the end of
the turn, end-of-turn token included. Both ends are found by rendering, never by searching for one family's strings.
Text is tokenized in pieces cut at those ends, as an engine does: the prompt's ids first, then the model's own.

Rules for answers, each checked for every turn:
  * A template may trim or pad the ends of the content, and change nothing else.
  * One thought at most, at the start: `<think>...</think>` in content, or reasoning_content.
  * A generation prompt that opens a thought (DeepSeek-R1) is continued: the opening tag is stripped from the answer,
    and an answer without a thought closes it first. One that closes the thought (enable_thinking=false) allows none.
  * No special token of the tokenizer in an answer: it would end the turn, or never be generated.

Templates with a clock (`strftime_now` in Llama 3.2 and SmolLM3) receive the fixed date `DAY`, so that tokens and cached
answers stay the same tomorrow. Where a template takes it, data.template_kwargs={date_string: 24 Dec 2025} overrides it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from pard_train.data.schemas import check_messages
from pard_train.data.thoughts import (
    CLOSE,
    NO_THOUGHT,
    OPEN,
    continue_thought,
    cut_answer,
    split_thought,
    thought_of,
    without_blank_thought,
)
from pard_train.errors import RowError, UserError
from pard_train.runs import fingerprint

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
Piece = TypeVar("Piece", str, list[int])

DAY = datetime(2024, 7, 26)  # "today" of every template; Llama's name the same where they have no clock
_DATE_PARTS = [f"%{flag}{letter}" for letter in "aAbBcdDeFGhHIjklmMnpRsSTuUVwWxXyYzZ" for flag in ("", "-")]

_LOST = "the chat template leaves out this turn's {}: use a model whose template writes it, or take it out of the row"
_PROBE = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Probably blue"}]


@dataclass(frozen=True)
class Document:
    """Tokens of one conversation."""

    input_ids: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L]; True for every token of an assistant turn, its end-of-turn token included
    origin: str  # such as `chats.jsonl:17`
    is_rendered: bool = True  # tokenized from text, so tokenizing the whole text must give the same ids

    def part(self, tokens: slice) -> Document:
        """Some of the document's tokens."""
        return replace(self, input_ids=self.input_ids[tokens], loss_mask=self.loss_mask[tokens])


@dataclass(frozen=True)
class Pieces:
    """Text of one document, cut at both ends of every answer."""

    texts: list[str]  # prompt, answer, prompt, answer, ...
    origin: str
    num_altered: int = 0  # answers whose ends the template trims or pads


class ChatEncoder:
    """Renders and tokenizes conversations for one tokenizer.

    Raises UserError without a chat template, if it cannot be rendered or never ends a turn, or if the tokenizer changes
    text when it is tokenized in pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        if not tokenizer.chat_template:
            fix = "use an instruct model, or put chat_template.jinja beside its tokenizer"
            raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: {fix}")
        self._special = re.compile("|".join(re.escape(_in_json(t)) for t in self._control_tokens()) or r"(?!)")
        self._has_thoughts = CLOSE in str(self.template_kwargs.get("chat_template") or tokenizer.chat_template)
        self.turn_suffix = self._find_turn_suffix()
        self.end_token = self._find_end_token()
        self.end_of_turn = "".join(self.turn_suffix.partition(self.end_token or "\0")[:2])  # all of it without a token
        self.padding = self._find_padding()
        self._check_pieces()

    @cached_property
    def _probe_prompt(self) -> str:
        return self.render(_PROBE[:1], generation_prompt=True)

    def _control_tokens(self) -> list[str]:
        """Special tokens, and tokens of the template that are not marked so (role headers of DeepSeek-R1)."""
        added = self.tokenizer.added_tokens_decoder.values()
        found = {str(t) for t in added if t.special or (str(t) in self._probe_prompt and str(t).strip())}
        return sorted((found | {*self.tokenizer.all_special_tokens}) - {OPEN, CLOSE}, key=len, reverse=True)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Content hash of the tokenizer, 12 hexadecimal digits."""
        return fingerprint(self.tokenizer.backend_tokenizer.to_str())

    @cached_property
    def end_ids(self) -> list[int]:
        """Ids of the end of a turn; of a text without a token of its own, several."""
        return self._ids([self.end_of_turn])[0]

    def render(self, messages: Messages, *, generation_prompt: bool = False, tools: Tools = None) -> str:
        """Render the conversation as text. Raises UserError where the template refuses it."""
        return self._render_all([messages], generation_prompt, tools)[0]

    def encode_prompt(self, messages: Messages, *, tools: Tools = None) -> list[int]:
        """Ids of the prompt that a serving engine sends to the model for `messages`."""
        return self._ids([self.render(messages, generation_prompt=True, tools=tools)])[0]

    def encode(self, messages: Messages, *, origin: str, is_cut: bool = False, tools: Tools = None) -> list[Document]:
        """Documents with exact loss masks: `pieces`, tokenized."""
        return self.tokenize(self.pieces(messages, origin=origin, is_cut=is_cut, tools=tools))

    def pieces(self, messages: Messages, *, origin: str, is_cut: bool = False, tools: Tools = None) -> list[Pieces]:
        """Render the documents of a conversation, every assistant turn supervised.

        They are one as long as the template renders a history as it rendered it when its turn was the last. Where it
        does not, a new document begins: reasoning templates drop the thoughts before the last question.

        Args:
            messages: dicts with `role` and `content`; an assistant's also `tool_calls` and `reasoning_content`.
            origin: named in errors.
            is_cut: the last answer hit its length limit, so its end-of-turn token is not supervised.
            tools: JSON schemas of the functions that the model may call.

        Raises RowError on an unknown role, no assistant turn, an empty answer, or a template that cannot be followed.
        """
        check_messages(messages, origin)
        stops = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not stops:
            raise RowError(origin, "no assistant turn, so it has no labels")
        try:
            prompts = self._render_all([messages[:stop] for stop in stops], True, tools)
            texts = self._render_all([messages[: stop + 1] for stop in stops], False, tools)
            for text, stop in zip(texts, stops, strict=True):
                self._check_calls(messages[: stop + 1], text, tools)
            answers = [
                self._answer(prompt, text, messages[stop], is_cut=is_cut and stop == stops[-1])
                for prompt, text, stop in zip(prompts, texts, stops, strict=True)
            ]
        except UserError as error:
            raise RowError(origin, str(error)) from error
        altered = sum(self._is_altered(messages[stop], answer) for stop, answer in zip(stops, answers, strict=True))
        first, *others = _join_turns(zip(prompts, answers, strict=True))
        return [Pieces(first, origin, altered), *(Pieces(document, origin) for document in others)]

    def tokenize(self, pieces: Sequence[Pieces | Document]) -> list[Document]:
        """Tokenize the pieces of many conversations in one call; documents stay as they are."""
        ids = iter(self._ids([text for part in pieces if isinstance(part, Pieces) for text in part.texts]))
        return [
            part if isinstance(part, Document) else _document([next(ids) for _ in part.texts], part.origin)
            for part in pieces
        ]

    def _render_all(self, chats: Sequence[Messages], generation_prompt: bool, tools: Tools) -> list[str]:
        template_kwargs = dict(self.template_kwargs)
        given = list(tools) if tools else None
        try:
            template = self.tokenizer.get_chat_template(template_kwargs.pop("chat_template", None), given)
            return self.tokenizer.apply_chat_template(
                [[without_blank_thought(message) for message in messages] for messages in chats],
                tools=given,
                chat_template=_with_fixed_day(template),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **template_kwargs,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            name = self.tokenizer.name_or_path
            raise UserError(f"the chat template of {name} cannot be rendered: {error}") from error

    def _check_calls(self, messages: Messages, text: str, tools: Tools) -> None:
        """Check that the last turn's text changes without any of its tool calls, or without its words before them."""
        for part, rest in _without_one(messages[-1]):
            try:
                is_lost = self.render([*messages[:-1], rest], tools=tools) == text
            except UserError:  # refused without it, so it was read
                continue
            if is_lost:
                raise UserError(_LOST.format(part))

    def _answer(self, prompt: str, text: str, message: Mapping[str, Any], *, is_cut: bool) -> str:
        """Label text after `prompt`, with its end of turn unless it was cut."""
        parts = (message["content"], message.get("reasoning_content") or "", message.get("tool_calls") or [])
        if found := self._special.search(_in_json(parts)):
            raise UserError(f"an answer holds the control token {found[0]}: end the answer there, or remove the row")
        opens, closes = prompt.rstrip().endswith(OPEN), prompt.rstrip().endswith(CLOSE)
        thought, words = split_thought(message, is_known=self._has_thoughts, opens=opens, is_cut=is_cut)
        if closes and thought:
            raise UserError("an answer holds a thought, but the generation prompt has closed it: remove the thought")
        if text.startswith(prompt):
            if not text.endswith(self.turn_suffix):
                raise UserError(f"the template does not end this turn with {self.turn_suffix!r} as it ends others")
            answer = text[len(prompt) : len(text) - len(self.turn_suffix)]
            if not (is_cut or message.get("tool_calls") or answer.strip().endswith(words.strip())):
                raise UserError(_LOST.format("content, or a part of it"))
        elif message.get("tool_calls"):
            raise UserError(_LOST.format("tool_calls"))
        else:
            answer = continue_thought(message, prompt) if opens else self._alone(message)
        if thought not in answer:
            raise UserError(
                "the chat template leaves out this turn's thought: use a model whose template writes it, or remove it"
            )
        if self.end_token and self.end_token in answer:
            raise UserError(f"an answer holds {self.end_token}, which ends a turn: end it there, or remove the row")
        if is_cut:
            return cut_answer(answer, message, prompt if opens else None, self.padding)
        return answer + self.end_of_turn

    def _alone(self, message: Mapping[str, Any]) -> str:
        """An answer as the template writes it after a plain question, if it rewrites histories (Mistral)."""
        text = self.render([_PROBE[0], message])
        if not (text.startswith(self._probe_prompt) and text.endswith(self.turn_suffix)):
            return message["content"]
        return text[len(self._probe_prompt) : len(text) - len(self.turn_suffix)]

    def _is_altered(self, message: Mapping[str, Any], answer: str) -> bool:
        """Whether a template trims or pads an answer that is plain content."""
        is_plain = not (message.get("tool_calls") or thought_of(message) or CLOSE in answer)
        return is_plain and answer.removesuffix(self.end_of_turn) != message["content"]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        settings = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **settings)["input_ids"]

    def _find_turn_suffix(self) -> str:
        text, content = self.render(_PROBE), _PROBE[-1]["content"]
        suffix = text[text.rindex(content) + len(content) :] if content in text else ""
        if not suffix:
            name = self.tokenizer.name_or_path
            raise UserError(f"the chat template of {name} writes nothing after an answer: a draft needs an end of turn")
        return suffix

    def _find_end_token(self) -> str | None:
        """The first special token after an answer, if any."""
        special = self.tokenizer.all_special_tokens + [str(t) for t in self.tokenizer.added_tokens_decoder.values()]
        found = [token for token in special if token in self.turn_suffix]
        return min(found, key=lambda token: self.turn_suffix.index(token) + len(token), default=None)

    def _find_padding(self) -> str:
        """Spaces that the template writes before an answer (Mistral); empty for most."""
        prompt, text = self._probe_prompt, self.render(_PROBE)
        before = text[len(prompt) : text.rindex(_PROBE[-1]["content"])] if text.startswith(prompt) else ""
        return "" if before.strip() else before

    def _check_pieces(self) -> None:
        content = _PROBE[-1]["content"]
        if self._probe_prompt.rstrip().endswith(OPEN):
            content = f"It is{NO_THOUGHT}{content}"  # an empty thought begins with line ends, which merge with others
        texts = self.pieces([_PROBE[0], {**_PROBE[1], "content": content}], origin="a first try")[0].texts
        if list(chain(*self._ids(texts))) != self._ids(["".join(texts)])[0]:
            supported = "supported are byte-level BPE tokenizers (Qwen2, Qwen3, Llama 3, SmolLM2, ...)"
            name = self.tokenizer.name_or_path
            raise UserError(f"the tokenizer of {name} changes text that is tokenized in pieces; {supported}")


def _in_json(value: Any) -> str:
    """As it stands within JSON text."""
    return json.dumps(value, ensure_ascii=False)[1:-1]


def _with_fixed_day(template: str) -> str:
    """A template whose `strftime_now` is a macro that returns DAY: as an argument, transformers allows only JSON."""
    if "strftime_now" not in template:
        return template
    parts = "".join(f".replace({part!r}, {DAY.strftime(part)!r})" for part in _DATE_PARTS)
    # Jinja removes the line end, so the macro adds nothing to the text.
    return f"{{% macro strftime_now(format) %}}{{{{ format{parts} }}}}{{% endmacro %}}\n{template}"


def _without_one(message: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, the message without it) of every tool call and, beside tool calls, of the words after a thought."""
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        rest = [*calls[:number], *calls[number + 1 :]]
        yield f"tool_calls[{number}] ({call['function']['name']})", {**message, "tool_calls": rest}
    thought, end_of_thought, words = message["content"].rpartition(CLOSE)
    if calls and words.strip():
        yield "content beside its tool_calls", {**message, "content": thought + end_of_thought}


def _join_turns(turns: Iterable[tuple[Piece, Piece]]) -> list[list[Piece]]:
    """Pieces per document of (prompt, answer): a turn whose prompt begins with the document before continues it."""
    documents: list[list[Piece]] = []
    done = None
    for prompt, answer in turns:
        if done is not None and prompt[: len(done)] == done:
            documents[-1] += [prompt[len(done) :], answer]
        else:
            documents.append([prompt, answer])
        done = prompt + answer
    return documents


def documents_of_ids(turns: Sequence[tuple[list[int], list[int]]], origin: str) -> list[Document]:
    """Documents whose labels are a target's own token ids, from the (prompt ids, answer ids) of every turn."""
    return [_document(pieces, origin, is_rendered=False) for pieces in _join_turns(turns)]


def _document(ids: list[list[int]], origin: str, *, is_rendered: bool = True) -> Document:
    is_written = np.arange(len(ids)) % 2 == 1
    input_ids = np.fromiter(chain.from_iterable(ids), dtype=np.int32)
    return Document(input_ids, np.repeat(is_written, [len(piece) for piece in ids]), origin, is_rendered)
