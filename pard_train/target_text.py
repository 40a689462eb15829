"""A target's own greedy text, written once in batches and cached line by line, so that a killed job loses nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pard_train.decoding import Limits

SAMPLE_BYTES = 1 << 20  # of each end of a weight file that go into a fingerprint


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of one prompt.

    Attributes:
        ids: the target's tokens, its end-of-turn token included.
        is_cut: it hit the length limit instead of ending.
    """

    ids: list[int]
    is_cut: bool


def fingerprint(value: Any) -> str:
    """Short name of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """Short name of a model's config and weights: a folder's file sizes and both ends of each, or a hub commit."""
    folder = Path(path)
    if not folder.is_dir():
        return fingerprint([path, revision])
    parts: list[Any] = []
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as data:
            head = data.read(SAMPLE_BYTES)
            data.seek(max(0, file.stat().st_size - SAMPLE_BYTES))
            parts.append([file.name, file.stat().st_size, hashlib.sha256(head + data.read()).hexdigest()])
    return fingerprint(parts)


def greedy_answers(
    load_target: Callable[[], PreTrainedModel],
    prompts: Sequence[list[int]],
    *,
    limits: Limits,
    batch_size: int,
    cache: Path,
    pad_token_id: int,
    description: str,
) -> list[Answer]:
    """The target's greedy answer to every prompt.

    Args:
        load_target: called once, and only if the cache lacks an answer.
        prompts: rendered prompts as ids.
        limits: when an answer ends.
        batch_size: prompts per batch; of similar length, left-padded.
        cache: JSONL file, one answer a line. Its name must tell target, prompts and limits apart.
        pad_token_id: fills up short prompts; never attended to.
        description: shown beside the progress bar.

    Returns:
        Answers in the order of `prompts`.
    """
    answers = _read_cache(cache)
    missing = sorted((i for i in range(len(prompts)) if i not in answers), key=lambda i: len(prompts[i]))
    if missing:
        model = load_target()
        cache.parent.mkdir(parents=True, exist_ok=True)
        with cache.open("a") as file, tqdm(total=len(prompts), initial=len(answers), desc=description) as bar:
            for start in range(0, len(missing), batch_size):
                batch = missing[start : start + batch_size]
                outputs = _generate(model, [prompts[i] for i in batch], limits, pad_token_id)
                for i, answer in zip(batch, outputs, strict=True):
                    answers[i] = answer
                    file.write(json.dumps({"prompt": i, "ids": answer.ids, "is_cut": answer.is_cut}) + "\n")
                file.flush()
                bar.update(len(batch))
    return [answers[i] for i in range(len(prompts))]


def _read_cache(cache: Path) -> dict[int, Answer]:
    """Answers of a cache file; a last line that a kill cut short is removed."""
    answers: dict[int, Answer] = {}
    if not cache.exists():
        return answers
    data = cache.read_bytes()
    os.truncate(cache, data.rfind(b"\n") + 1)
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        row = json.loads(line)
        answers[row["prompt"]] = Answer(row["ids"], row["is_cut"])
    return answers


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: list[list[int]], limits: Limits, pad_token_id: int) -> list[Answer]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=limits.max_new_tokens,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,  # a generation config that ships another one would not be greedy decoding
        eos_token_id=sorted(limits.end_ids),
        pad_token_id=pad_token_id,
    )
    answers = []
    for row in output[:, width:].tolist():
        tokens = limits.cut(row, 0)
        answers.append(Answer(tokens, is_cut=tokens[-1] not in limits.end_ids))
    return answers
