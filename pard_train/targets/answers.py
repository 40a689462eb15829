"""A target's answers: their cache on disk, and generation in this process.

The key of an answer is a hash of its prompt's ids. Prompts may be added, shuffled or shared among processes: every
answer is reused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from pard_train.errors import UserError
from pard_train.generation.decoding import Limits
from pard_train.generation.sampling import GREEDY, Sampling, SequenceRandom, draw, probabilities

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """Continuation of one prompt.

    Attributes:
        ids: the target's tokens, its end-of-turn token included.
        is_cut: the length limit ended it.
    """

    ids: list[int]
    is_cut: bool


def prompt_key(prompt: Sequence[int]) -> str:
    """Hash of a prompt's ids, 16 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(prompt, dtype="<i4").tobytes(), digest_size=8).hexdigest()


def _line_of(key: str, answer: Answer) -> bytes:
    """A line of the cache, with a checksum of its other fields."""
    row = {"key": key, "ids": answer.ids, "is_cut": answer.is_cut}
    return json.dumps({**row, "crc": zlib.crc32(json.dumps(row).encode())}).encode() + b"\n"


def _key_of(line: bytes) -> str | None:
    """Key of a line, None if the line is damaged. Lines of version 0.2.0 and earlier have no checksum."""
    try:
        row = json.loads(line)
        checksum = row.pop("crc", None)
        is_whole = checksum is None or zlib.crc32(json.dumps(row).encode()) == checksum
        return row["key"] if is_whole and "ids" in row and "is_cut" in row else None
    except (ValueError, KeyError, AttributeError):
        return None


class AnswerCache(Mapping[str, Answer]):
    """Answers by prompt key, one per line of JSONL files. Memory holds file offsets, not answers.

    Every process appends to its own file and reads all files. A truncated last line is ignored; a damaged one is
    reported and its prompt answered again.

    Args:
        own: file that new answers are appended to; created if missing.
        others: files to read. If two files hold an answer, the first file's counts.
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
        """Index every answer of a file. Returns where its last complete line ends."""
        offset = file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                break
            if (key := _key_of(line)) is not None:
                self._places.setdefault(key, (number, offset))
            else:
                logger.warning("%s: the line at byte %d is damaged: skipped", file.name, offset)
            offset += len(line)
        return offset

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Append answers in one write, and flush."""
        lines = {key: _line_of(key, answer) for key, answer in answers.items()}
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


def split_batches(prompts: Mapping[str, Sequence[int]], batch_size: int) -> list[list[str]]:
    """Keys of prompts in batches of similar length, longest first, so that running out of memory happens at once.

    A batch is cached as a whole, so the prompts left after an interruption form the same batches: answers depend
    neither on interruptions nor on the number of processes.
    """
    keys = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


def write_batches(
    model: PreTrainedModel,
    prompts: Mapping[str, Sequence[int]],
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
        cache: receives the answers.
        limits: when an answer ends.
        sampling: how tokens are chosen.
        description: of the progress bar; empty for none.
    """
    with tqdm(total=sum(map(len, batches)), desc=description, unit="answer", disable=not description) as bar:
        for keys in batches:
            answers = _generate(model, [list(prompts[key]) for key in keys], limits, sampling)
            cache.add(dict(zip(keys, answers, strict=True)))
            bar.update(len(keys))


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: list[list[int]], limits: Limits, sampling: Sampling) -> list[Answer]:
    """Answers to a batch, left-padded; attention masks the padding."""
    rows, padding = [torch.tensor(prompt) for prompt in prompts], min(limits.end_ids)
    ids = pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    sampled = [] if sampling.is_greedy else [_SampledToken(prompts, sampling)]
    with _plain_generation_config(model):
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=limits.max_new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([_NoNaN(), *sampled]),
            eos_token_id=sorted(limits.end_ids),
            pad_token_id=padding,
        )
    answers = [limits.cut(row, 0) for row in output[:, ids.shape[1] :].tolist()]
    return [Answer(tokens, is_cut=tokens[-1] not in limits.end_ids) for tokens in answers]


class _NoNaN(LogitsProcessor):
    """Refuses NaN, whose arg max is token 0."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.amax(dim=-1).isnan().any():
            raise UserError("the target's logits are NaN: take dtype=float32 or bfloat16, or another target")
        return scores


@contextmanager
def _plain_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Replace a model's generation config: it may set penalties, beams and stop strings.

    `generate` fills gaps of any other config from the model's own.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _SampledToken(LogitsProcessor):
    """Draws the next token with one random generator per prompt, and leaves only that token to greedy decoding.

    The sampling of `generate` draws for the whole batch: an answer would depend on the other prompts of its batch.
    """

    def __init__(self, prompts: list[list[int]], sampling: Sampling):
        self._random, self._rows, self._sampling = SequenceRandom(prompts, sampling), [*range(len(prompts))], sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V]: 0 for the drawn token of each row, minus infinity elsewhere."""
        uniforms = self._random.uniform(self._rows, 1)[:, 0].to(scores.device)
        tokens = draw(probabilities(scores, self._sampling), uniforms)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)
