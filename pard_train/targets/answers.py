"""A target's own text: a cache that loses nothing to a kill, and generation in this process that fills it.

An answer is found by what was asked, not by where it stood: prompts may be added, shuffled or shared out among other
processes, and every answer that was ever written is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Dice, Sampling, draw, probabilities

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Continuation of one prompt.

    Attributes:
        ids: the target's tokens, its end-of-turn token included.
        is_cut: it hit the length limit instead of ending.
    """

    ids: list[int]
    is_cut: bool


@dataclass(frozen=True)
class Refusal:
    """A prompt that a server will not answer, and why."""

    reason: str


def prompt_key(prompt: Sequence[int]) -> str:
    """Name of a prompt by its ids: 16 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(prompt, dtype="<i4").tobytes(), digest_size=8).hexdigest()


class AnswerCache(Mapping[str, Answer]):
    """Answers by prompt key, in JSONL files with one answer a line. Memory holds where each stands, not its text.

    Every process appends to a file of its own and reads those of all. A line that a kill cut short does not count.

    Args:
        own: file that new answers are appended to; created if it does not exist.
        others: files that are read only. Where two files hold an answer, the first one's counts.
    """

    def __init__(self, own: Path, others: Iterable[Path] = ()):
        own.parent.mkdir(parents=True, exist_ok=True)
        paths = sorted({own, *others})
        self._files: list[BinaryIO] = [path.open("a+b" if path == own else "rb") for path in paths]
        self._own = paths.index(own)
        self._places: dict[str, tuple[int, int]] = {}  # key -> (number of the file, offset in bytes)
        self.num_new_tokens = 0
        for number, file in enumerate(self._files):
            end = self._read_places(number, file)
            if number == self._own and file.tell() > end:  # else another program may have written since
                file.truncate(end)

    def _read_places(self, number: int, file: BinaryIO) -> int:
        """Find every answer of a file; where its last whole line ends."""
        offset = file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            self._places.setdefault(json.loads(line)["key"], (number, offset))
            offset += len(line)
        return offset

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers in one piece: they are on their way to the disk when this returns."""
        lines = {
            k: json.dumps({"key": k, "ids": a.ids, "is_cut": a.is_cut}).encode() + b"\n" for k, a in answers.items()
        }
        file = self._files[self._own]
        file.seek(0, os.SEEK_END)
        file.write(b"".join(lines.values()))
        file.flush()
        place = file.tell()  # the end is known only now: another program may append to the same file
        for key, line in reversed(lines.items()):
            place -= len(line)
            self._places[key] = (self._own, place)
        self.num_new_tokens += sum(len(answer.ids) for answer in answers.values())

    def __getitem__(self, key: str) -> Answer:
        number, offset = self._places[key]
        self._files[number].seek(offset)
        row = json.loads(self._files[number].readline())
        return Answer(row["ids"], row["is_cut"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def cached_answers(
    load_target: Callable[[], PreTrainedModel],
    prompts: Sequence[list[int]],
    *,
    limits: Limits,
    batch_size: int,
    cache: Path,
    description: str,
    sampling: Sampling = GREEDY,
) -> list[Answer]:
    """The target's answer to every prompt, from the cache or, where it lacks one, from the target.

    Args:
        load_target: called once, and only if the cache lacks an answer.
        prompts: rendered prompts as ids.
        limits: when an answer ends.
        batch_size: prompts per batch.
        cache: JSONL file of answers. Its name must tell targets, limits and sampling apart.
        description: shown beside the progress bar.
        sampling: how tokens are chosen.

    Returns:
        Answers in the order of `prompts`.
    """
    with AnswerCache(cache) as known:
        missing = {key: prompt for prompt in prompts if (key := prompt_key(prompt)) not in known}
        if missing:
            model, batches = load_target(), split_batches(missing, batch_size)
            write_batches(model, missing, batches, known, limits=limits, sampling=sampling, description=description)
        return [known[prompt_key(prompt)] for prompt in prompts]


def split_batches(prompts: Mapping[str, list[int]], batch_size: int) -> list[list[str]]:
    """Keys of prompts in batches of similar length, longest first: what does not fit into memory shows at once.

    Batches are written whole, so the prompts that a kill leaves over fall into the very batches they were in before;
    answers do not depend on how often a job was cut off, nor on the number of processes.
    """
    keys = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def write_batches(
    model: PreTrainedModel,
    prompts: Mapping[str, list[int]],
    batches: Sequence[list[str]],
    cache: AnswerCache,
    *,
    limits: Limits,
    sampling: Sampling = GREEDY,
    description: str,
) -> None:
    """Generate the answers to batches of prompts into the cache, batch by batch.

    Args:
        model: the target.
        prompts: ids by key.
        batches: keys, from `split_batches`.
        cache: what answers are added to.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        description: shown beside the progress bar; without one, no bar.
    """
    with tqdm(total=sum(map(len, batches)), desc=description, unit="answer", disable=not description) as bar:
        for keys in batches:
            answers = _generate(model, [prompts[key] for key in keys], limits, sampling)
            cache.add(dict(zip(keys, answers, strict=True)))
            bar.update(len(keys))


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: list[list[int]], limits: Limits, sampling: Sampling) -> list[Answer]:
    """Answers to a batch, left-padded with a token that is never attended to."""
    width, padding = max(map(len, prompts)), min(limits.end_ids)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with _nothing_configured(model):
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limits.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([] if sampling.is_greedy else [DrawnToken(prompts, sampling)]),
            eos_token_id=sorted(limits.end_ids),
            pad_token_id=padding,
        )
    answers = [limits.cut(row, 0) for row in output[:, width:].tolist()]
    return [Answer(tokens, is_cut=tokens[-1] not in limits.end_ids) for tokens in answers]


@contextmanager
def _nothing_configured(model: PreTrainedModel) -> Iterator[None]:
    """A model without its generation config, whose penalties, beams and stop strings would not be greedy decoding.

    `generate` fills up whatever config it is given from the model's own, so that one has to go.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class DrawnToken(LogitsProcessor):
    """Makes greedy decoding draw: the one token left to it is drawn from a stream that each prompt has of its own.

    Sampling of `generate` draws for a batch as a whole, so an answer would change with whatever is asked beside it.
    """

    def __init__(self, prompts: list[list[int]], sampling: Sampling):
        self._dice, self._rows, self._sampling = Dice(prompts, sampling), list(range(len(prompts))), sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of which one a row is not minus infinity."""
        rolls = self._dice.roll(self._rows, 1)[:, 0].to(scores.device)
        tokens = draw(probabilities(scores, self._sampling), rolls)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversation:
    """A conversation as far as it got.

    Attributes:
        messages: up to the last answer; empty if there is none.
        is_cut: the last answer hit the length limit.
        reason: why there is no further answer, if that is not because all is answered.
    """

    messages: Messages
    is_cut: bool
    reason: str


def questions(messages: Messages) -> list[Messages]:
    """What is put to a target before each of its answers: a user's message and those since the answer before.

    Assistant messages are left out. Nothing follows a tool's message: it is the result of a call that is made anew.

    >>> chat = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")]
    >>> [[message["content"] for message in question] for question in questions(chat)]
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


def converse(
    row: Mapping[str, Any], encoder: ChatEncoder, limits: Limits
) -> Generator[list[int], Answer | Refusal, Conversation]:
    """One conversation with a target, answered anew turn by turn.

    Args:
        row: `messages`, and `tools` if there are any.
        encoder: of the target's tokenizer.
        limits: when an answer ends.

    Yields:
        The ids of a prompt, in which the earlier answers are the new ones; its answer must be sent.

    Returns:
        What became of the conversation.
    """
    messages: Messages = []
    for question in questions(row["messages"]):
        try:
            prompt = encoder.encode_prompt([*messages, *question], tools=row.get("tools"))
        except UserError as error:
            return Conversation(messages, False, str(error))
        reply = yield prompt
        if isinstance(reply, Refusal):
            return Conversation(messages, False, f"refused by the server: {reply.reason}")
        text = answer_text(reply, encoder, limits)
        if not text.strip():
            return Conversation(messages, False, "the target answers with nothing")
        messages += [*question, {"role": "assistant", "content": text}]
        if reply.is_cut:
            return Conversation(messages, True, "cut by the length limit")
    return Conversation(messages, False, "no user's message")


def answer_text(answer: Answer, encoder: ChatEncoder, limits: Limits) -> str:
    """An answer as the content of a message: special tokens such as <think> stay, the end of the turn does not."""
    has_end = bool(answer.ids) and answer.ids[-1] in limits.end_ids
    ids = answer.ids[:-1] if has_end else answer.ids
    text = encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if answer.is_cut else text  # the limit may fall within a character
