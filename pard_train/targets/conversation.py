"""Conversations with a target: each turn is asked after the target's own answers to the turns before.

A conversation is a generator that yields the ids of a prompt and receives the answer. It is replayed from a cache of
answers at any time, so nothing but the cache has to survive a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.targets.answers import Answer, AnswerCache, prompt_key
from pard_train.targets.target import Target

Messages = list[dict[str, Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """A prompt that a server refuses, and why."""

    reason: str


Conversation = Generator[list[int], Answer | Refusal, T]


class OpenTurn(NamedTuple):
    """Where a conversation waits for an answer."""

    number: int  # of the turn, from 0
    prompt: list[int]


@dataclass
class Conversations(Generic[T]):
    """Conversations that one target carries on, and the cache of its answers.

    Attributes:
        target: who answers.
        start: begins every conversation anew.
        limits: when an answer ends.
        open_cache: the answers of all processes; new ones go to the file of this rank.
        description: of progress bars.
        sampling: how the target chooses its tokens.
        needs_ids: text alone from a server will not do, since tokenizing it may give other ids than the target's.
        refusals: by prompt key, of this process; another server may accept these prompts.
    """

    target: Target
    start: Callable[[], Iterator[Conversation[T]]]
    limits: Limits
    open_cache: Callable[[int], AnswerCache]
    description: str
    sampling: Sampling = GREEDY
    needs_ids: bool = False
    refusals: dict[str, Refusal] = field(default_factory=dict)

    def follow(self, conversation: Conversation[T], cache: Mapping[str, Answer]) -> OpenTurn | T:
        """The first turn of a conversation without a known answer, or what the conversation returns at its end."""
        number = 0
        try:
            prompt = next(conversation)
            while reply := self.refusals.get(key := prompt_key(prompt)) or cache.get(key):
                prompt, number = conversation.send(reply), number + 1
        except StopIteration as end:
            return end.value
        return OpenTurn(number, prompt)

    def results(self) -> list[T] | None:
        """What every conversation returns; None if the cache lacks an answer."""
        with self.open_cache(0) as cache:
            found = [self.follow(conversation, cache) for conversation in self.start()]
        return None if any(isinstance(result, OpenTurn) for result in found) else found  # type: ignore[return-value]


def ask_in_turn(
    turns: Sequence[Sequence[dict[str, Any]]], encoder: ChatEncoder, limits: Limits, tools: Any = None
) -> Generator[list[int], Answer, None]:
    """Multi-turn chat: yields the prompt of every turn, in which the earlier answers are the target's own.

    Args:
        turns: the messages put before each answer.
        encoder: of the target's tokenizer.
        limits: when an answer ends.
        tools: JSON schemas of functions.

    Raises:
        UserError: if the chat template refuses the messages.
    """
    messages: Messages = []
    for turn in turns:
        messages += turn
        answer = yield encoder.encode_prompt(messages, tools=tools)
        messages.append({"role": "assistant", "content": answer_text(answer, encoder, limits)})


@dataclass(frozen=True)
class AnsweredChat:
    """A chat whose answers are the target's, up to where it got.

    Attributes:
        messages: up to the last answer; empty if there is none.
        is_cut: the last answer hit the length limit.
        reason: why the chat has no further answer.
        turns: (prompt ids, answer ids) of every answer.
    """

    messages: Messages
    is_cut: bool
    reason: str
    turns: list[tuple[list[int], list[int]]]


def answer_chat(
    row: Mapping[str, Any], encoder: ChatEncoder, limits: Limits, context: int | None = None
) -> Conversation[AnsweredChat]:
    """A conversation in which the target answers a chat of a data set anew.

    It ends early at a prompt that is too long, a refusal, an empty answer, or one that hits the length limit.

    Args:
        row: `messages`, and `tools` if there are any.
        encoder: of the target's tokenizer.
        limits: when an answer ends.
        context: positions that prompt and answer may take; None for no limit.
    """
    messages: Messages = []
    ids: list[tuple[list[int], list[int]]] = []
    turns = question_turns(row["messages"])
    chat, reply = ask_in_turn(turns, encoder, limits, row.get("tools")), None
    for question in turns:
        try:
            prompt = chat.send(reply)  # type: ignore[arg-type]  # None starts it
        except UserError as error:
            return AnsweredChat(messages, False, str(error), ids)
        if context and len(prompt) + limits.max_new_tokens > context:
            reason = f"{len(prompt)} tokens and an answer of {limits.max_new_tokens} exceed {context} positions"
            return AnsweredChat(messages, False, reason, ids)
        reply = yield prompt
        if isinstance(reply, Refusal):
            return AnsweredChat(messages, False, f"refused by the server: {reply.reason}", ids)
        text = answer_text(reply, encoder, limits)
        if not text.strip():
            return AnsweredChat(messages, False, "the answer is empty", ids)
        messages += [*question, {"role": "assistant", "content": text}]
        ids.append((prompt, reply.ids))
        if reply.is_cut:
            return AnsweredChat(messages, True, "cut by the length limit", ids)
    return AnsweredChat(messages, False, "no user message", ids)


def question_turns(messages: Messages) -> list[Messages]:
    """The messages put before each answer: a user message and those since the answer before.

    Assistant messages are left out. A tool message ends the list: it is the result of a call that is made anew.

    >>> chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    >>> [[message["content"] for message in turn] for turn in question_turns(chat)]
    [['s', 'u'], ['u']]
    """
    turns: list[Messages] = [[]]
    for message in messages:
        if message["role"] == "tool":
            break
        if message["role"] != "assistant":
            turns[-1].append(message)
        if message["role"] == "user":
            turns.append([])
    return turns[:-1]


def answer_text(answer: Answer, encoder: ChatEncoder, limits: Limits) -> str:
    """An answer as message content: special tokens such as <think> stay, the end-of-turn token does not."""
    has_end = bool(answer.ids) and answer.ids[-1] in limits.end_ids
    ids = answer.ids[:-1] if has_end else answer.ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if answer.is_cut else text  # the limit may fall within a character
