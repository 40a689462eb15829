"""Acceptance counted as a decoder would live it: step by step, with a verifier that stops at the first wrong draft."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_train.acceptance import Acceptance, Trace, pool, walk, walk_as_vllm

few_examples = settings(deadline=None, max_examples=60)
LONGEST_DRAFT = 6
tokens = st.integers(0, 2)  # few, so that drafts are often right
answers = st.lists(tokens, max_size=20)
all_drafts = st.lists(st.lists(tokens, min_size=LONGEST_DRAFT, max_size=LONGEST_DRAFT), min_size=20, max_size=20)
traces = st.lists(
    st.lists(st.integers(0, LONGEST_DRAFT), min_size=1, max_size=9).map(lambda a: Trace(a, sum(a) + len(a))),
    min_size=1,
    max_size=8,
)


def count_matches(answer: list[int], drafts: list[list[int]]) -> list[int]:
    """What replay hands on: drafts in a row, from just before each answer token, that are the answer's."""
    matches = []
    for place in range(len(answer)):
        pairs = list(zip(drafts[place], answer[place:], strict=False))
        wrong = [i for i, (draft, token) in enumerate(pairs) if draft != token]
        matches.append(wrong[0] if wrong else len(pairs))
    return matches


def decode(answer: list[int], drafts: list[list[int]], num_draft_tokens: int) -> tuple[list[int], list[int]]:
    """(tokens emitted, drafts accepted per step) of draft-then-verify decoding, one token at a time."""
    emitted: list[int] = []
    accepted: list[int] = []
    while len(emitted) < len(answer):
        num_accepted, proposals = 0, drafts[len(emitted)][:num_draft_tokens]
        for proposal in proposals:
            if len(emitted) == len(answer) or proposal != answer[len(emitted)]:
                break  # past the end, or rejected
            emitted.append(proposal)
            num_accepted += 1
        accepted.append(num_accepted)
        if len(emitted) < len(answer):
            emitted.append(answer[len(emitted)])  # the target's own token
    return emitted, accepted


@few_examples
@given(answers, all_drafts, st.integers(1, LONGEST_DRAFT))
def test_walking_the_matches_is_decoding_step_by_step(
    answer: list[int], drafts: list[list[int]], num_draft_tokens: int
) -> None:
    emitted, accepted = decode(answer, drafts, num_draft_tokens)
    trace = walk(count_matches(answer, drafts), num_draft_tokens)
    assert trace == Trace(accepted, len(emitted))
    assert emitted == answer


@few_examples
@given(answers.filter(bool), all_drafts, st.integers(1, LONGEST_DRAFT))
def test_vllm_counts_the_same_after_the_first_token(
    answer: list[int], drafts: list[list[int]], num_draft_tokens: int
) -> None:
    _, accepted = decode(answer[1:], drafts[1:], num_draft_tokens)
    counted = walk_as_vllm(count_matches(answer, drafts), num_draft_tokens)
    assert counted == (len(accepted), sum(accepted))


@pytest.mark.parametrize(
    "matches, num_draft_tokens, accepted",
    [
        ([2, 0, 1, 0, 0], 8, [2, 0, 0]),  # tokens 0 1 (2), then (3), then (4)
        ([2, 0, 1, 0, 0], 1, [1, 1, 0]),  # tokens 0 (1), then 2 (3), then (4)
        ([5, 4, 3, 2, 1], 8, [5]),  # all at once: the target's own token would lie past the end
        ([5, 4, 3, 2, 1], 2, [2, 2]),
        ([0, 0, 0], 4, [0, 0, 0]),
        ([], 4, []),
    ],
)
def test_worked_examples(matches: list[int], num_draft_tokens: int, accepted: list[int]) -> None:
    assert walk(matches, num_draft_tokens) == Trace(accepted, len(matches))


def test_the_conventions_on_a_worked_example() -> None:
    matches = [2, 0, 1, 0, 0]
    result = pool([walk(matches, 8)], 8)
    assert result.tau == pytest.approx(5 / 3)  # five tokens, three passes; the first pass verifies a draft
    # vLLM: token 0 from the prefill; then (1), then 2 (3), then (4)
    assert walk_as_vllm(matches, 8) == (3, 1)


@pytest.mark.parametrize("length", [1, 2, 7, 10])
def test_a_perfect_draft_at_one_draft_token_is_always_accepted(length: int) -> None:
    matches = list(range(length, 0, -1))
    result = pool([walk(matches, 1)], 1)
    assert result.histogram == [0, (length + 1) // 2]
    assert result.survival == [1.0]


def rebuilt_tokens(result: Acceptance) -> float:
    """Tokens emitted, from survival alone."""
    return result.num_steps * (1 + sum(result.survival))


@few_examples
@given(traces)
def test_histogram_survival_and_tau_tell_one_story(traces: list[Trace]) -> None:
    result = pool(traces, LONGEST_DRAFT)
    accepted = [a for trace in traces for a in trace.accepted]
    assert result.histogram == [accepted.count(n) for n in range(LONGEST_DRAFT + 1)]
    assert result.num_steps == len(accepted)
    positions = range(1, LONGEST_DRAFT + 1)
    assert result.survival == pytest.approx([sum(a >= i for a in accepted) / len(accepted) for i in positions])
    assert result.tau == pytest.approx(rebuilt_tokens(result) / result.num_steps)  # no answer ends inside a step here
    reached = [sum(a >= i - 1 for a in accepted) for i in positions]
    expected = [sum(a >= i for a in accepted) / n if n else None for i, n in zip(positions, reached, strict=True)]
    assert result.conditional == [None if e is None else pytest.approx(e) for e in expected]
    assert result.mean_prompt_tau == pytest.approx(sum(t.num_tokens / len(t.accepted) for t in traces) / len(traces))
    assert result.record()["tau"] == result.tau


@few_examples
@given(st.integers(1, 4), st.integers(0, 4), st.integers(2, 30))
def test_the_interval_contains_tau_and_has_no_width_where_prompts_agree(good: int, bad: int, number: int) -> None:
    mixed = [Trace([a] * 5, 5 * (a + 1)) for i in range(number) for a in (good, bad)]
    result = pool(mixed, LONGEST_DRAFT)
    assert result.tau_low - 1e-9 <= result.tau <= result.tau_high + 1e-9
    assert min(good, bad) + 1 - 1e-9 <= result.tau_low
    assert result.tau_high <= max(good, bad) + 1 + 1e-9
    assert (result.tau_low == result.tau_high) == (good == bad)


def test_the_interval_shrinks_with_more_prompts_and_is_the_same_on_every_call() -> None:
    prompts = [Trace([a], a + 1) for a in (0, 1, 2, 3)]
    few, many = pool(prompts, 4), pool(prompts * 25, 4)
    assert few.tau == many.tau
    assert many.tau_high - many.tau_low < (few.tau_high - few.tau_low) / 3
    assert pool(prompts, 4) == few


def test_tau_is_pooled_over_tokens_not_averaged_over_prompts() -> None:
    result = pool([Trace([4], 5), Trace([0] * 5, 5)], 4)
    assert result.tau == pytest.approx(10 / 6)
    assert result.mean_prompt_tau == pytest.approx((5 + 1) / 2)


@pytest.mark.parametrize("nothing", [[], [walk([], 4)]])
def test_no_step_at_all_is_an_error_rather_than_a_number(nothing: list[Trace]) -> None:
    with pytest.raises(ValueError, match="no decoding step"):
        pool(nothing, 4)
