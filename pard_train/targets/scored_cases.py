"""Scored cases: texts that a target has drawn at a temperature, with what it thinks of every token of them.

From these `estimate.py` tells the acceptance of any draft at that temperature, with no target loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from pard_train.acceptance.estimate import ScoredText
from pard_train.config import EvaluateConfig
from pard_train.data.benchmarks import Benchmark
from pard_train.data.chat import Document
from pard_train.data.scores import score_documents
from pard_train.generation.sampling import Sampling
from pard_train.runs import fingerprint, unfinished
from pard_train.targets.cases import TARGET_TEXT_FOLDER, Case, Target, Turn, write_case

TOP_K = 64  # tokens of every place that are kept: what lies outside counts as refused


@dataclass(frozen=True)
class ScoredCase:
    """A case drawn at a temperature, and its answers with the target's scores in the order of its turns."""

    case: Case
    sampling: Sampling
    texts: list[ScoredText]


def write_scored_case(
    target: Target, benchmark: Benchmark, config: EvaluateConfig, folder: Path, sampling: Sampling
) -> ScoredCase:
    """Have a target draw its answers and score them, or read both from the cache.

    Args:
        target: who answers.
        benchmark: the prompts.
        config: limits and system prompt.
        folder: where the cache goes.
        sampling: how the target draws.

    Raises:
        UserError: if the chat template refuses a prompt.
    """
    case = write_case(target, benchmark, config, folder, sampling)
    path = folder / TARGET_TEXT_FOLDER / f"scores-{fingerprint([case.identity, TOP_K])}.npz"
    if not path.exists():
        _write_scores(target, case, path)
    with np.load(path, allow_pickle=False) as scores:
        parts = [scores[name] for name in ("label_logprobs", "top_ids", "top_logprobs")]
    stops = np.cumsum([len(turn.answer.ids) for turn in case.turns])[:-1]
    texts = [
        ScoredText(turn.prompt_ids, turn.answer.ids, label_logprobs, top_ids, top_logprobs, turn.prompt_id)
        for turn, label_logprobs, top_ids, top_logprobs in zip(
            case.turns, *(np.split(part, stops) for part in parts), strict=True
        )
    ]
    return ScoredCase(case, sampling, texts)


def _write_scores(target: Target, case: Case, path: Path) -> None:
    """Arrays over all answer tokens of a case, turn by turn; the file is whole or not there."""
    turns = tqdm(case.turns, desc=f"{case.target} scores {case.benchmark.name}", unit="answer")
    parts = [score_documents(target.weights(), [_document(turn)], TOP_K) for turn in turns]
    label_logprobs, top_ids, top_logprobs = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    partial = unfinished(path)
    with partial.open("wb") as file:
        np.savez(file, label_logprobs=label_logprobs, top_ids=top_ids, top_logprobs=top_logprobs)
    partial.replace(path)


def _document(turn: Turn) -> Document:
    ids = np.array(turn.prompt_ids + turn.answer.ids, dtype=np.int32)
    return Document(ids, np.arange(len(ids)) >= len(turn.prompt_ids), turn.prompt_id)
