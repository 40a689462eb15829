"""The (anchor, depth) algebra against brute force: every small document, every draw's promises."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pard_train.config import DraftConfig
from pard_train.layout import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    DrawKey,
    SlotLayout,
    chain_limits,
    count_at_depth,
    is_visible,
    lay_out_document,
    max_slots,
    sample_chain_lengths,
    slot_bounds,
    slot_labels,
    slot_tokens,
    supervised_runs,
)

MASK = 999
KEY = DrawKey(seed=3, epoch=1, example=4)
few_examples = settings(deadline=None, max_examples=60)


def keep_all(num_draft_tokens: int) -> DraftConfig:
    """K without COD."""
    return DraftConfig(num_draft_tokens=num_draft_tokens, retention_ratio=1.0, min_retention=1.0)


def small_masks(longest: int) -> list[np.ndarray]:
    """Every loss mask up to a length; the first token is never a label."""
    return [
        np.array([False, *rest])
        for length in range(1, longest + 1)
        for rest in product([False, True], repeat=length - 1)
    ]


def expected_slots(loss_mask: np.ndarray, num_draft_tokens: int) -> dict[tuple[int, int], int]:
    """Label position per slot (anchor, depth), or -1, straight from the definition."""
    length = len(loss_mask)
    slots = {(a, 0): a + 1 if a + 1 < length and loss_mask[a + 1] else -1 for a in range(length)}
    for anchor, depth in product(range(length), range(1, num_draft_tokens)):
        labels = range(anchor + 1, anchor + depth + 2)  # what the slots of this chain predict, up to this one
        if all(t < length and loss_mask[t] for t in labels):
            slots[anchor, depth] = anchor + depth + 1
    return slots


def seen_names(anchor: int, depth: int) -> set[tuple[int, int]]:
    """Slots that a slot sees in its own document: the text up to its anchor, its chain up to itself."""
    return {(a, 0) for a in range(anchor + 1)} | {(anchor, d) for d in range(depth + 1)}


def names(layout: SlotLayout) -> list[tuple[int, int]]:
    """(anchor, depth) of every slot."""
    return list(zip(layout.anchor.tolist(), layout.depth.tolist(), strict=True))


def join(*layouts: SlotLayout) -> SlotLayout:
    """Layouts one after another."""
    return SlotLayout(*(np.concatenate([getattr(x, f) for x in layouts]) for f in ("document", "anchor", "depth")))


@st.composite
def documents(draw: st.DrawFn) -> np.ndarray:
    """Loss masks of conversations: alternating prompts and answers."""
    runs = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20)), min_size=1, max_size=4))
    return np.array([value for prompt, answer in runs for value in [False] * prompt + [True] * answer])


@st.composite
def drafts(draw: st.DrawFn) -> DraftConfig:
    """Any K and COD fractions that validation lets through."""
    ratio = draw(st.floats(0.05, 1.0))
    most = draw(st.none() | st.integers(1, 30))
    return DraftConfig(draw(st.integers(1, 12)), ratio, draw(st.floats(0.0, ratio)), max_anchors=most)


keys = st.builds(DrawKey, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


def test_the_example_in_the_module_holds() -> None:
    loss_mask = np.array([False, True, True, True])
    layout = lay_out_document(sample_chain_lengths(loss_mask, keep_all(3), KEY))
    assert layout.anchor.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert layout.depth.tolist() == [0, 0, 0, 0, 1, 2, 1]
    assert layout.position.tolist() == [0, 1, 2, 3, 1, 2, 2]
    assert slot_labels(layout, np.arange(4), loss_mask).tolist() == [1, 2, 3, IGNORE_INDEX, 2, 3, 3]


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4])
def test_retention_one_gives_the_full_layout_of_every_small_document(num_draft_tokens: int) -> None:
    for loss_mask in small_masks(longest=6):
        tokens = np.arange(len(loss_mask)) + 10
        layout = lay_out_document(sample_chain_lengths(loss_mask, keep_all(num_draft_tokens), KEY))
        expected = expected_slots(loss_mask, num_draft_tokens)
        labels, inputs = slot_labels(layout, tokens, loss_mask), slot_tokens(layout, tokens, MASK)
        assert len(layout) == len(expected)
        for (anchor, depth), place, label, token in zip(names(layout), layout.position, labels, inputs, strict=True):
            target = expected[anchor, depth]
            assert place == anchor + depth
            assert label == (tokens[target] if target >= 0 else IGNORE_INDEX)
            assert token == (tokens[anchor] if depth == 0 else MASK)


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4])
def test_a_slot_sees_the_text_up_to_its_anchor_and_its_own_chain_up_to_itself(num_draft_tokens: int) -> None:
    for loss_mask in small_masks(longest=6):
        one = lay_out_document(sample_chain_lengths(loss_mask, keep_all(num_draft_tokens), KEY))
        layout = join(one, lay_out_document(np.array([1, 0]), document=1))
        visible = is_visible(layout, layout)
        where = list(zip(layout.document.tolist(), names(layout), strict=True))
        for (q_document, q), row in zip(where, visible, strict=True):
            seen = seen_names(*q)
            assert row.tolist() == [k_document == q_document and k in seen for k_document, k in where]


@pytest.mark.parametrize("window", [4, 5, 99])
def test_in_a_window_a_slot_sees_what_it_saw_less_than_so_many_positions_before_its_own(window: int) -> None:
    for loss_mask in small_masks(longest=6):
        one = lay_out_document(sample_chain_lengths(loss_mask, keep_all(4), KEY))
        layout = join(one, lay_out_document(np.array([1, 0]), document=1))
        expected = is_visible(layout, layout).copy()
        for q, k in np.argwhere(expected).tolist():
            expected[q, k] = layout.position[q] - window < layout.position[k] <= layout.position[q]
        assert np.array_equal(is_visible(layout, layout, window), expected)


def test_arrays_and_tensors_have_one_rule() -> None:
    chains = [lay_out_document(np.array(lengths), i) for i, lengths in enumerate([[0, 3, 1, 0], [2], [0, 0, 3]])]
    padding = SlotLayout(np.full(3, PADDING_DOCUMENT), np.arange(3), np.zeros(3, dtype=int))
    layout = join(*chains, padding)
    tensors = SlotLayout(*map(torch.from_numpy, (layout.document, layout.anchor, layout.depth)))
    for window in (None, 3):
        assert torch.equal(is_visible(tensors, tensors, window), torch.from_numpy(is_visible(layout, layout, window)))


@few_examples
@given(documents(), drafts(), keys)
def test_one_anchor_alone_is_plain_causal_order_as_when_serving(
    mask: np.ndarray, draft: DraftConfig, key: DrawKey
) -> None:
    lengths = sample_chain_lengths(mask, draft, key)
    layout = lay_out_document(lengths)
    anchor = int(lengths.argmax())
    served = layout[(layout.depth == 0) & (layout.anchor <= anchor) | (layout.anchor == anchor)]
    assert served.position.tolist() == list(range(anchor + 1 + lengths[anchor]))
    assert np.array_equal(is_visible(served, served), np.tri(len(served), dtype=bool))


@few_examples
@given(documents(), drafts(), keys)
def test_a_chain_never_runs_past_its_turn_and_every_mask_slot_has_a_label(
    mask: np.ndarray, draft: DraftConfig, key: DrawKey
) -> None:
    layout = lay_out_document(sample_chain_lengths(mask, draft, key))
    tokens = np.arange(len(mask))
    labels = slot_labels(layout, tokens, mask)
    for (anchor, depth), label in zip(names(layout), labels, strict=True):
        if depth:
            assert depth < draft.num_draft_tokens
            assert mask[anchor + 1 : anchor + depth + 2].all()
            assert label == anchor + depth + 1


@few_examples
@given(documents(), drafts(), keys)
def test_a_mask_slot_is_kept_only_if_the_one_before_it_in_its_chain_is(
    mask: np.ndarray, draft: DraftConfig, key: DrawKey
) -> None:
    slots = names(lay_out_document(sample_chain_lengths(mask, draft, key)))
    assert len(set(slots)) == len(slots)
    assert all((anchor, depth - 1) in set(slots) for anchor, depth in slots if depth)
    chains = [slot for slot in slots if slot[1]]
    assert chains == sorted(chains)


@few_examples
@given(documents(), drafts(), keys)
def test_no_draw_takes_more_slots_than_the_bound(mask: np.ndarray, draft: DraftConfig, key: DrawKey) -> None:
    layout = lay_out_document(sample_chain_lengths(mask, draft, key))
    assert len(layout) <= max_slots(len(mask), draft)


def test_the_count_at_each_depth_is_exact_until_the_floor_where_a_chain_may_end_with_its_turn() -> None:
    draft, length = DraftConfig(), 2001
    mask = np.arange(length) > 0
    limits = chain_limits(mask, draft.num_draft_tokens)
    kept = np.array(
        [
            [(sample_chain_lengths(mask, draft, DrawKey(seed, 0, 0)) >= d).sum() for d in range(draft.num_draft_tokens)]
            for seed in range(40)
        ]
    )
    for depth in range(1, draft.num_draft_tokens):
        count = count_at_depth(length - 1, depth, draft)
        is_floor = count == count_at_depth(length - 1, depth - 1, draft)
        num_short = int((limits[:-1] < depth).sum())  # anchors too near the end to reach this depth
        assert num_short == depth
        assert kept[:, depth].min() >= count - (num_short if is_floor else 0)
        assert kept[:, depth].max() == count


def test_cod_keeps_the_published_fractions() -> None:
    assert [count_at_depth(1000, d, DraftConfig()) for d in range(1, 8)] == [700, 490, 343, 240, 200, 200, 200]
    assert [count_at_depth(10, d, keep_all(8)) for d in range(1, 8)] == [10] * 7


def test_a_long_prompt_takes_one_slot_a_token_and_sampled_anchors_change_with_the_epoch() -> None:
    length, answer = 32_768, 64
    mask = np.arange(length) >= length - answer
    full = sample_chain_lengths(mask, keep_all(8), KEY)
    assert full.sum() <= 7 * answer  # not 7 * length
    assert not full[: length - answer - 1].any()
    draft, whole = DraftConfig(max_anchors=1000), np.arange(length) > 0
    epochs = [sample_chain_lengths(whole, draft, DrawKey(0, epoch, 0)) for epoch in range(2)]
    for lengths in epochs:
        assert [(lengths >= depth).sum() for depth in (1, 2, 7)] == [700, 490, 200]
        assert length + lengths.sum() == max_slots(length, draft) == length + 2373
    assert ((epochs[0] > 0) & (epochs[1] > 0)).sum() < 100  # two draws of 700 among 32,767 share about 15


def test_a_draw_follows_from_its_key_alone() -> None:
    mask = np.arange(300) % 50 > 9
    key = DrawKey(seed=1, epoch=2, example=3)
    draw = sample_chain_lengths(mask, DraftConfig(), key)
    np.random.seed(0)  # nothing outside the key counts
    assert np.array_equal(draw, sample_chain_lengths(mask.copy(), DraftConfig(), DrawKey(1, 2, 3)))
    for other in (DrawKey(0, 2, 3), DrawKey(1, 0, 3), DrawKey(1, 2, 0), DrawKey(2, 1, 3), DrawKey(3, 2, 1)):
        assert not np.array_equal(draw, sample_chain_lengths(mask, DraftConfig(), other))


def test_every_turn_has_chains_of_its_own() -> None:
    mask = np.array([False, False, True, True, True, False, True, True, False])
    assert chain_limits(mask, 8).tolist() == [-1, 2, 1, 0, -1, 1, 0, -1, -1]
    lengths = sample_chain_lengths(mask, keep_all(8), KEY)
    assert lengths.tolist() == [0, 2, 1, 0, 0, 1, 0, 0, 0]


def bound_of(loss_mask: np.ndarray, draft: DraftConfig) -> int:
    """The bound of one document."""
    runs = supervised_runs(loss_mask)
    return int(slot_bounds(np.array([len(loss_mask)]), runs, np.zeros(len(runs), dtype=int), draft)[0])


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 5])
def test_without_cod_the_bound_of_a_document_is_its_number_of_slots(num_draft_tokens: int) -> None:
    for mask in small_masks(8):
        for with_first in (mask, np.array([True, *mask])):  # also where the very first token is a label
            num_chain_slots = sum(depth > 0 for _, depth in expected_slots(with_first, num_draft_tokens))
            assert bound_of(with_first, keep_all(num_draft_tokens)) == len(with_first) + num_chain_slots


def test_no_draw_takes_more_slots_than_the_bound_and_the_bound_is_close() -> None:
    draft = DraftConfig()
    masks = [np.arange(length) % 170 >= 40 for length in (90, 200, 700)]
    for mask in [*small_masks(8), *masks]:
        for example in range(10):
            used = len(mask) + int(sample_chain_lengths(mask, draft, DrawKey(0, 0, example)).sum())
            assert used <= bound_of(mask, draft)
    for mask in masks:
        drawn = [sample_chain_lengths(mask, draft, DrawKey(0, 0, i)).sum() + len(mask) for i in range(50)]
        assert bound_of(mask, draft) < 1.03 * np.mean(drawn)


def test_the_bounds_of_many_documents_are_those_of_each() -> None:
    masks = small_masks(6)
    runs = [supervised_runs(mask) for mask in masks]
    owner = np.repeat(np.arange(len(masks)), [len(run) for run in runs])
    lengths = np.array([len(mask) for mask in masks])
    together = slot_bounds(lengths, np.concatenate(runs), owner, DraftConfig())
    assert together.tolist() == [bound_of(mask, DraftConfig()) for mask in masks]
