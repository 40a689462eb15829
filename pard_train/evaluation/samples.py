"""Annotated sample outputs for people."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from pard_train.acceptance.counting import walk
from pard_train.evaluation.measurement import Draft
from pard_train.targets.cases import Case
from pard_train.targets.compatibility import Model

NUM_SAMPLES = 3  # answers of each draft and case that the page shows
SAMPLE_K = 8  # K of the samples, or the largest one measured


def sample_answers(
    draft: Draft, case: Case, matches: list[list[int]], num_draft_tokens: Collection[int]
) -> Iterator[dict[str, Any]]:
    """Some answers, step by step: the accepted draft tokens and the target's own token."""
    k = SAMPLE_K if SAMPLE_K in num_draft_tokens else max(num_draft_tokens)
    for turn, match in list(zip(case.turns, matches, strict=True))[:NUM_SAMPLES]:
        steps, place, ids = [], 0, turn.answer.ids
        texts = _growing_texts(draft.model, ids)
        for accepted in walk(match, k).accepted:
            end = min(place + accepted + 1, len(ids))
            middle = place + accepted
            steps.append(
                {"accepted": texts[middle][len(texts[place]) :], "target_token": texts[end][len(texts[middle]) :]}
            )
            place = end
        yield {
            "draft": draft.name,
            "target": case.target,
            "benchmark": case.benchmark.name,
            "prompt_id": turn.prompt_id,
            "num_draft_tokens": k,
            "question": turn.question,
            "steps": steps,
        }


def _growing_texts(model: Model, ids: list[int]) -> list[str]:
    """Text of the first 0, 1, ... tokens; half a character belongs to the token that completes it."""
    texts = [""]
    for stop in range(1, len(ids) + 1):
        text = model.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        texts.append(texts[-1] if text.endswith("\ufffd") else text)
    return texts
