"""The first difference between what an engine did with one prompt and what replay expects, with a hint at its cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pard_train.engines.worker import Counters, EngineAnswer
from pard_train.generation.proposers import Drafter

# Legend: N tokens of an answer, K draft tokens, V vocabulary.

NEAR_TIE = 1e-3  # two float32 implementations may order logits differently that are closer than this

NOT_LOSSLESS = "the engine's text depends on the draft: a near tie (float32 has the fewest), or a fault of the engine"
NOT_K = "the engine did not draft K tokens at every step"
NOT_DRAFTED = "replay never drafts the mask token or a row that is no token, the engine may: train the draft further"
NOT_EXACT = "two implementations agree to the last counter in float32 only: set verify.dtype=float32"
FIRST_POSITION = "the first draft token depends on no mask token: the engine has other weights or other positions"
LATER_POSITION = "the first draft token is right and a later one is not: the engine has another mask token or mask"


@dataclass(frozen=True)
class Expectation:
    """What the engine should do with one prompt.

    Attributes:
        answer_ids: the target's greedy answer, [N].
        extra_ids: its continuation.
        num_prefilled: leading tokens of the answer that no draft predicts: 1 in vLLM, else 0.
        accepted: draft tokens accepted at every step.
    """

    prompt_id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    extra_ids: list[int]
    num_prefilled: int
    accepted: list[int]


@dataclass(frozen=True)
class Difference:
    """The first difference between engine and replay.

    Attributes:
        expected: by replay or plain decoding.
        hint: likely cause.
        step: number of the draft, from 0; None if the text or the totals differ.
        position: of the draft token within its draft, from 1; None likewise.
        token: number of the answer's token, from 0; None if the totals differ.
    """

    prompt_id: str
    expected: str
    observed: str
    hint: str
    step: int | None = None
    position: int | None = None
    token: int | None = None

    def __str__(self) -> str:
        numbers = {"step": self.step, "draft position": self.position, "token": self.token}
        where = [f"{name} {number}" for name, number in numbers.items() if number is not None]
        place = ", ".join([f"prompt {self.prompt_id}", *where])
        return f"{place}: expected {self.expected}; observed {self.observed}; {self.hint}"


def find_difference(
    drafter: Drafter, expectation: Expectation, answer: EngineAnswer, num_draft_tokens: int
) -> Difference | None:
    """The first difference in text, accepted draft tokens or counters of one prompt; None if all are equal."""
    name = expectation.prompt_id
    token = _first_difference(expectation.answer_ids, answer.token_ids)
    if token is not None:
        expected, observed = (_describe(drafter, ids, token) for ids in (expectation.answer_ids, answer.token_ids))
        return Difference(name, expected, observed, NOT_LOSSLESS, token=token)
    step = _first_difference(expectation.accepted, answer.accepted)
    if step is not None:
        return _draft_difference(drafter, expectation, answer, step, num_draft_tokens)
    counters = Counters.of(expectation.accepted, num_draft_tokens)
    if counters != answer.counters:
        expected, observed = (f"{c.num_draft_tokens} draft tokens" for c in (counters, answer.counters))
        return Difference(name, expected, observed, NOT_K)
    return None


def _first_difference(expected: Sequence[int], observed: Sequence[int]) -> int | None:
    """Index of the first difference; the shorter length if one sequence is the beginning of the other."""
    common = min(len(expected), len(observed))
    index = next((i for i in range(common) if expected[i] != observed[i]), common)
    return None if index == len(expected) == len(observed) else index


def _draft_difference(
    drafter: Drafter, expectation: Expectation, answer: EngineAnswer, step: int, num_draft_tokens: int
) -> Difference:
    """The draft token that only one of the two accepted."""
    # Token that this draft predicts.
    first = expectation.num_prefilled + sum(a + 1 for a in expectation.accepted[:step])
    ours, theirs = (steps[step] if step < len(steps) else 0 for steps in (expectation.accepted, answer.accepted))
    depth = min(ours, theirs)
    text = expectation.answer_ids + expectation.extra_ids
    draft, margins = _propose(drafter, expectation.prompt_ids + text[:first], num_draft_tokens)
    observed = answer.drafts[step][depth] if step < len(answer.drafts) else None
    says = f"the target writes {_describe(drafter, text, first + depth)}"
    drafted = "" if observed is None else f" (the engine drafts {_describe(drafter, [observed], 0)})"
    return Difference(
        expectation.prompt_id,
        expected=f"{ours} accepted (replay drafts {_describe(drafter, draft, depth)}, {says})",
        observed=f"{theirs} accepted{drafted}",
        hint=_hint(drafter, depth, observed, margins[depth]),
        step=step,
        position=depth + 1,
        token=first + depth,
    )


def _hint(drafter: Drafter, depth: int, observed: int | None, margin: float) -> str:
    if observed is not None and (observed == drafter.mask_token_id or observed >= len(drafter.tokenizer)):
        return NOT_DRAFTED
    if drafter.model.dtype != torch.float32:
        return f"{NOT_EXACT} (the draft's two best logits are {margin:.2g} apart)"
    if margin < NEAR_TIE:
        return f"a near tie: the draft's two best logits are {margin:.1e} apart"
    return LATER_POSITION if depth else FIRST_POSITION


def _describe(drafter: Drafter, ids: Sequence[int], index: int) -> str:
    """A token of a text, for people."""
    if index >= len(ids):
        return "the end"
    return f"{drafter.tokenizer.decode([ids[index]])!r} (id {ids[index]})"


@torch.inference_mode()
def _propose(drafter: Drafter, text_ids: list[int], num_draft_tokens: int) -> tuple[list[int], list[float]]:
    """One draft by a plain causal forward pass, as in engines: K draft tokens, and the margin of each one's logit."""
    masks = [drafter.mask_token_id] * (num_draft_tokens - 1)
    ids = torch.tensor([text_ids + masks], device=drafter.model.device)
    logits = drafter.model(ids, logits_to_keep=num_draft_tokens).logits[0]  # [K, V]
    best = logits.float().topk(2, dim=-1).values
    return drafter.choose(logits).tolist(), (best[:, 0] - best[:, 1]).tolist()
