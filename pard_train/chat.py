"""From messages to token ids with an exact loss mask, by rendering the tokenizer's own chat template.

The supervised part of an assistant turn is what the template puts between the generation prompt and the end of the
turn, including the end-of-turn token. Both ends are found by rendering, never by searching for one family's strings.
Text is tokenized in pieces cut at those ends, because that is how it comes to be when a model writes it: first the
prompt's ids, then its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from pard_train.errors import UserError

ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, str]]

_PROBE = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Probably blue"}]


@dataclass(frozen=True)
class Document:
    """Tokens of one conversation.

    Attributes:
        input_ids: int32 [L].
        loss_mask: bool [L]; True for every token of an assistant turn, its end-of-turn token included.
        origin: where it came from, such as `chats.jsonl:17`.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    origin: str


class ChatEncoder:
    """Renders and tokenizes conversations for one tokenizer.

    Raises:
        UserError: if the tokenizer has no chat template, its template cannot be rendered or never ends a turn, or the
            tokenizer changes text when it is tokenized in pieces.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template: use an instruct model, "
                "or put chat_template.jinja beside its tokenizer"
            )
        self.turn_suffix = self._find_turn_suffix()
        self.end_of_turn = self._find_end_of_turn()
        self._check_pieces()

    def render(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        """The conversation as text. Raises UserError where the template refuses it."""
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self.template_kwargs
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} cannot be rendered: {error}"
            ) from error

    def encode_prompt(self, messages: Messages) -> list[int]:
        """Ids that a serving engine feeds to the model to have `messages` answered."""
        return self._ids(self.render(messages, generation_prompt=True))

    def encode(self, messages: Messages, *, origin: str, is_cut: bool = False) -> list[Document]:
        """Documents with exact loss masks.

        One document with every assistant turn supervised, if the template renders a history just as it rendered it
        when the turn was last; else (reasoning templates drop earlier thoughts) one document per assistant turn.

        Args:
            messages: dicts with `role` and `content`.
            origin: named in errors.
            is_cut: the last answer hit its length limit: its end-of-turn token is not taught.

        Raises:
            UserError: on an unknown role, no assistant turn, an empty answer, or a template that cannot be followed.
        """
        check_messages(messages, origin)
        try:
            turns = [self._render_turn(messages[: i + 1]) for i, m in enumerate(messages) if m["role"] == "assistant"]
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        is_history_stable = all(later[0].startswith(prompt + answer) for (prompt, answer), later in pairwise(turns))
        groups = [turns] if is_history_stable else [[turn] for turn in turns]
        cut = [is_cut and i == len(groups) - 1 for i in range(len(groups))]
        return [self._encode_turns(group, origin, c) for group, c in zip(groups, cut, strict=True)]

    def _render_turn(self, messages: Messages) -> tuple[str, str]:
        """(prompt, answer with end of turn) of the last message."""
        prompt, text = self.render(messages[:-1], generation_prompt=True), self.render(messages)
        if not text.startswith(prompt):
            # A reasoning template that opens the thought itself (DeepSeek-R1) or drops it when it renders an answer:
            # what the model writes after the prompt is the content as it stands.
            return prompt, messages[-1]["content"] + self.end_of_turn
        if not text.endswith(self.turn_suffix):
            raise UserError(f"the template does not end this turn with {self.turn_suffix!r} as it ends others")
        return prompt, text[len(prompt) : len(text) - len(self.turn_suffix)] + self.end_of_turn

    def _encode_turns(self, turns: list[tuple[str, str]], origin: str, is_cut: bool) -> Document:
        ids: list[int] = []
        mask: list[bool] = []
        done = 0  # characters already encoded
        for prompt, answer in turns:
            for text, is_supervised in ((prompt[done:], False), (answer, True)):
                piece = self._ids(text)
                ids += piece
                mask += [is_supervised] * len(piece)
            done = len(prompt) + len(answer)
        if is_cut:
            num_end = len(self._ids(self.end_of_turn))
            ids, mask = ids[:-num_end], mask[:-num_end]
        return Document(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool), origin)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _find_turn_suffix(self) -> str:
        text, content = self.render(_PROBE), _PROBE[-1]["content"]
        suffix = text[text.rindex(content) + len(content) :] if content in text else ""
        if not suffix:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} puts nothing after an answer, so a draft could "
                "never learn where a turn ends"
            )
        return suffix

    def _find_end_of_turn(self) -> str:
        """The suffix up to its first special token; all of it if there is none."""
        special = self.tokenizer.all_special_tokens + [str(t) for t in self.tokenizer.added_tokens_decoder.values()]
        ends = [self.turn_suffix.index(token) + len(token) for token in special if token in self.turn_suffix]
        return self.turn_suffix[: min(ends)] if ends else self.turn_suffix

    def _check_pieces(self) -> None:
        prompt, answer = self._render_turn(_PROBE)
        if self._ids(prompt) + self._ids(answer) != self._ids(prompt + answer):
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} changes text that is tokenized in pieces; "
                "supported are byte-level BPE tokenizers (Qwen2, Qwen3, Llama 3, SmolLM2, ...)"
            )


def check_messages(messages: Any, origin: str) -> None:
    """Check roles and contents of one conversation.

    Raises:
        UserError: naming `origin`, the message and what is allowed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"{origin}: `messages` must be a non-empty list of {{role, content}}, found {messages!r:.80}")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise UserError(f"{origin}: message {number} has role {role!r}: allowed are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{origin}: message {number} ({role}) must have a text `content`")
        if not _is_unicode(message["content"]):
            raise UserError(f"{origin}: message {number} ({role}) has half a character (an unpaired surrogate)")
        if role == "assistant" and (number == 0 or messages[number - 1].get("role") != "user"):
            raise UserError(f"{origin}: message {number} is an answer without a user's message before it")
        if role == "assistant" and not message["content"].strip():
            raise UserError(f"{origin}: message {number} is an empty answer: remove the row or have it written again")
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{origin}: no assistant turn, so nothing would be learnt from it")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
