"""Acceptance counted as a decoder would live it: step by step, with a verifier that stops at the first wrong draft."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_train.acceptance.counting import (
    Acceptance,
    Trace,
    accepted_by_step,
    count_as_vllm,
    group_traces,
    length_bucket,
    pool,
    walk,
)

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
    counted = count_as_vllm(count_matches(answer, drafts), num_draft_tokens)
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
    assert count_as_vllm(matches, 8) == (3, 1)


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


def test_the_interval_is_that_of_95_of_100_resamples() -> None:
    prompts = [Trace([a], a + 1) for a in (0, 0, 1, 1, 2, 3, 4, 4)] * 25
    result = pool(prompts, 4)
    assert (result.tau_low, result.tau_high) == pytest.approx((2.655, 3.095))
    spread = statistics.pstdev(trace.num_tokens for trace in prompts) / len(prompts) ** 0.5
    normal = (result.tau - 1.96 * spread, result.tau + 1.96 * spread)  # of means: 2.662 and 3.088
    assert (result.tau_low, result.tau_high) == pytest.approx(normal, abs=0.1 * spread)


def test_tau_is_pooled_over_tokens_not_averaged_over_prompts() -> None:
    result = pool([Trace([4], 5), Trace([0] * 5, 5)], 4)
    assert result.tau == pytest.approx(10 / 6)
    assert result.mean_prompt_tau == pytest.approx((5 + 1) / 2)


def test_a_prompt_without_an_answer_has_no_part_in_the_mean_over_prompts() -> None:
    result = pool([Trace([1], 2), Trace([], 0)], 4, prompts=["answered", "empty"])
    assert (result.num_prompts, result.tau, result.mean_prompt_tau) == (2, 2.0, 2.0)


@pytest.mark.parametrize("nothing", [[], [walk([], 4)]])
def test_no_step_at_all_is_an_error_rather_than_a_number(nothing: list[Trace]) -> None:
    with pytest.raises(ValueError, match="no decoding step"):
        pool(nothing, 4)


def test_vllms_counters_agree_with_a_table_of_its_own_figures() -> None:
    """Four drafts: 3, 0, 4 and 1 accepted. The last one runs past the six tokens that remain of the answer."""
    matches = [7, 3, 0, 0, 0, 0, 9, 0, 0, 0, 0, 1]
    assert accepted_by_step(matches, 4, num_prefilled=1) == [3, 0, 4, 1]
    assert count_as_vllm(matches, 4) == (4, 8)
    assert accepted_by_step(matches[:7], 4, num_prefilled=1) == [3, 0, 4]  # matches past the end count
    assert walk([*matches[:6], 9], 4).accepted == [4, 0, 1]  # not by our definition
    assert count_as_vllm([3], 4) == (0, 0)  # one token, from the prefill


@few_examples
@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 8))
def test_vllm_drafts_k_tokens_at_every_step_until_the_answer_ends(matches: list[int], num_draft_tokens: int) -> None:
    accepted, emitted = [], 1
    while emitted < len(matches):
        accepted.append(min(matches[emitted], num_draft_tokens))
        emitted += accepted[-1] + 1
    assert accepted_by_step(matches, num_draft_tokens, num_prefilled=1) == accepted


def test_transformers_leaves_a_token_of_the_targets_own_to_every_pass() -> None:
    assert accepted_by_step([5, 5, 5, 5, 5, 5], 3, num_prefilled=0, counts_past_end=False) == [
        3,
        1,
    ]  # 3 + 1 and 1 + 1 of 6 tokens
    assert accepted_by_step([0], 3, num_prefilled=0, counts_past_end=False) == [0]
    assert (
        accepted_by_step([], 3, num_prefilled=0, counts_past_end=False)
        == accepted_by_step([0], 3, num_prefilled=1)
        == []
    )


@few_examples
@given(traces, st.integers(1, 4))
def test_turns_of_one_prompt_are_one_prompt(some: list[Trace], turns: int) -> None:
    prompts = [str(i // turns) for i in range(len(some))]
    result = pool(some, LONGEST_DRAFT, prompts=prompts)
    merged = [
        Trace([a for t in some[i : i + turns] for a in t.accepted], sum(t.num_tokens for t in some[i : i + turns]))
        for i in range(0, len(some), turns)
    ]
    expected = pool(merged, LONGEST_DRAFT)
    assert result.num_turns == len(some)
    assert result.record() == {**expected.record(), "num_turns": len(some)}


def test_turns_that_are_alike_within_a_prompt_do_not_narrow_the_interval() -> None:
    """Ten prompts of which each says everything twice are ten observations, not twenty."""
    once = [Trace([a], a + 1) for a in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)]
    twice = [trace for trace in once for _ in range(2)]
    prompts = [str(i // 2) for i in range(20)]
    together, apart = pool(twice, 4, prompts=prompts), pool(twice, 4)
    expected = pool(once, 4)
    assert (together.tau_low, together.tau_high) == (expected.tau_low, expected.tau_high)
    assert apart.tau_high - apart.tau_low < 0.9 * (together.tau_high - together.tau_low)


@few_examples
@given(traces, st.integers(1, 9))
def test_every_division_into_groups_has_all_tokens_and_steps(some: list[Trace], width: int) -> None:
    prompts = [str(i // 2) for i in range(len(some))]
    names = {"category": ["ab"[i % 2] for i in range(len(some))], "turn": [str(i % 2 + 1) for i in range(len(some))]}
    lengths = [width * (i + 1) for i in range(len(some))]
    groups = group_traces(some, prompts=prompts, names=names, prompt_lengths=lengths, width=width)
    whole = pool(some, LONGEST_DRAFT)
    for by in ("category", "turn", "position", "context"):
        mine = [group for group in groups if group["by"] == by]
        assert sum(group["num_tokens"] for group in mine) == whole.num_tokens
        assert sum(group["num_steps"] for group in mine) == whole.num_steps
        for group in mine:
            assert group["tau"] == pytest.approx(group["num_tokens"] / group["num_steps"])
            assert group["tau_low"] - 1e-9 <= group["tau"] <= group["tau_high"] + 1e-9
    for name in set(names["category"]):
        mine = [(t, p) for t, p, n in zip(some, prompts, names["category"], strict=True) if n == name]
        alone = pool([t for t, _ in mine], LONGEST_DRAFT, prompts=[p for _, p in mine])
        (group,) = [group for group in groups if (group["by"], group["name"]) == ("category", name)]
        assert [group[key] for key in ("tau", "tau_low", "tau_high")] == [alone.tau, alone.tau_low, alone.tau_high]


def test_a_step_belongs_to_the_place_where_it_starts() -> None:
    trace = Trace([3, 0, 5], 11)  # steps start at tokens 0, 4 and 5
    groups = group_traces([trace], prompts=["a"], names={}, width=5)
    assert [(g["name"], g["num_tokens"], g["num_steps"]) for g in groups] == [("0-4", 5, 2), ("5-9", 6, 1)]
    assert groups[0]["tau"] == 2.5
    groups = group_traces([trace], prompts=["a"], names={}, prompt_lengths=[60], width=20)
    assert [(g["name"], g["num_tokens"], g["num_steps"]) for g in groups if g["by"] == "context"] == [
        ("32-63", 4, 1),
        ("64-127", 7, 2),
    ]


def test_a_step_that_accepts_up_to_the_end_of_the_answer_emits_no_token_of_the_targets_own() -> None:
    trace = walk([0, 3, 2, 1], 4)  # token 0, then the three that are left
    assert trace == Trace([0, 3], 4)
    groups = group_traces([trace], prompts=["a"], names={}, width=1)
    assert [(g["name"], g["num_tokens"], g["num_steps"]) for g in groups] == [("0-0", 1, 1), ("1-1", 3, 1)]


def test_groups_stand_in_the_order_of_their_numbers_and_nameless_answers_are_in_none() -> None:
    some = [Trace([0], 1)] * 4
    lengths = [length_bucket(n) for n in (130, 64, 9, 1000)]
    names = {"prompt_length": lengths, "category": ["", "writing", "coding", ""]}
    groups = group_traces(some, prompts=list("abcd"), names=names)
    assert [g["name"] for g in groups] == ["8-15", "64-127", "128-255", "512-1023", "coding", "writing", "0-63"]


@given(st.integers(1, 100_000))
def test_a_length_lies_in_its_bucket(length: int) -> None:
    low, high = map(int, length_bucket(length).split("-"))
    assert low <= length <= high == 2 * low - 1
