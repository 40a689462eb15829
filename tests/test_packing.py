"""Packs are full, constant in size, planned once for a run, and say the same of a document in any company."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.data.chat import Document
from pard_train.data.packing import Member, PackedDataset, PardCollator, best_fit
from pard_train.errors import UserError
from pard_train.layout import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    DrawKey,
    SlotLayout,
    chain_limits,
    is_visible,
    max_slots,
    sample_chain_lengths,
    slot_bounds,
    supervised_runs,
)

MASK = 9999
BUDGET = 600
DTYPES = {"input_ids": torch.int64, "labels": torch.int64, "document": torch.int64, "anchor": torch.int64}
DTYPES |= {"depth": torch.int64, "weight": torch.float32}
few_examples = settings(deadline=None, max_examples=60)


def build_documents(lengths: list[int], *, seed: int = 0) -> list[Document]:
    """Documents of one to three turns with random tokens."""
    draw = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        mask = np.arange(length) * int(draw.integers(1, 4)) % length >= length // 3
        documents.append(Document(draw.integers(1, 9000, size=length).astype(np.int32), mask, f"file:{number + 1}"))
    return documents


def bounds_of(documents: list[Document]) -> np.ndarray:
    """Slots that each document takes at most."""
    runs = [supervised_runs(document.loss_mask) for document in documents]
    owner = np.repeat(np.arange(len(documents)), [len(run) for run in runs])
    lengths = np.array([len(document.input_ids) for document in documents])
    return slot_bounds(lengths, np.concatenate(runs), owner, DraftConfig())


def build_dataset(documents: list[Document], **settings: int) -> PackedDataset:
    """Two epochs over the documents."""
    defaults = {"slot_budget": BUDGET, "num_epochs": 2, "seed": 7}
    return PackedDataset(documents, bounds_of(documents), **(defaults | settings))


def plan_of(dataset: PackedDataset) -> list[list[DrawKey]]:
    """Names of the members of every pack."""
    return [[member.key for member in dataset[i]] for i in range(len(dataset))]


def build_collator(**settings: int) -> PardCollator:
    """PARD's own settings."""
    return PardCollator(DraftConfig(), ObjectiveConfig(depth_decay=0.8), MASK, settings.get("slot_budget", BUDGET))


def part(batch: dict[str, Tensor], document: int) -> dict[str, list[float]]:
    """What a pack says about one of its documents."""
    where = batch["document"][0] == document
    return {name: tensor[0][where].tolist() for name, tensor in batch.items() if name != "document"}


def slow_best_fit(sizes: list[int], budget: int) -> list[int]:
    """Loads of bins when every item, largest first, goes into the fullest one that holds it; sorted."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [load for load in loads if load + size <= budget]
        if fitting:
            loads.remove(max(fitting))
        loads.append(max(fitting, default=0) + size)
    return sorted(loads)


DOCUMENTS = build_documents(np.random.default_rng(1).integers(4, 120, size=60).tolist())


@few_examples
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_best_fit_places_each_item_once_and_never_exceeds_the_budget(sizes: list[int], budget: int) -> None:
    descending = np.array(sorted(sizes, reverse=True), dtype=np.int64)
    bins = best_fit(descending, budget)
    loads = np.bincount(bins, weights=descending).astype(int).tolist()
    assert all(0 < load <= budget for load in loads)
    assert sorted(loads) == slow_best_fit(sizes, budget)


def test_packs_of_chats_of_usual_lengths_are_over_97_percent_full() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(180), 0.7, size=1500), 16, 512).astype(int)
    documents = [Document(np.zeros(n, dtype=np.int32), np.arange(n) >= n // 4, "") for n in lengths]
    dataset = build_dataset(documents, slot_budget=16384, num_epochs=1)
    num_slots = sum(
        len(d.input_ids) + int(sample_chain_lengths(d.loss_mask, DraftConfig(), DrawKey(7, 0, i)).sum())
        for i, d in enumerate(documents)
    )
    assert num_slots / (len(dataset) * 16384) > 0.97


def test_the_plan_is_the_same_on_every_call_and_another_for_another_seed() -> None:
    plan = plan_of(build_dataset(DOCUMENTS))
    assert plan == plan_of(build_dataset(DOCUMENTS))
    assert plan != plan_of(build_dataset(DOCUMENTS, seed=8))


def test_a_document_too_large_for_a_pack_is_named() -> None:
    largest = int(bounds_of(DOCUMENTS).argmax())
    with pytest.raises(UserError, match=rf"data\.slot_budget=200 cannot hold file:{largest + 1}, which needs up to"):
        build_dataset(DOCUMENTS, slot_budget=200)


@pytest.mark.parametrize("packs_per_step", [1, 4, 7])
def test_every_epoch_holds_each_document_once_in_whole_steps(packs_per_step: int) -> None:
    dataset = build_dataset(DOCUMENTS, num_epochs=3, packs_per_step=packs_per_step)
    plan = plan_of(dataset)
    assert len(plan) % packs_per_step == 0
    members = [Counter() for _ in range(3)]
    for start in range(0, len(plan), packs_per_step):
        keys = [key for pack in plan[start : start + packs_per_step] for key in pack]
        assert len({key.epoch for key in keys}) == 1  # no step mixes epochs, and none is all padding
        members[keys[0].epoch].update(key.example for key in keys)
    assert all(counts == Counter(range(len(DOCUMENTS))) for counts in members)


def test_every_epoch_has_an_order_and_chains_of_its_own() -> None:
    dataset = build_dataset(DOCUMENTS)
    orders = [
        [m.document.origin for pack in range(len(dataset)) for m in dataset[pack] if m.key.epoch == e] for e in (0, 1)
    ]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    keys = [m.key for pack in range(len(dataset)) for m in dataset[pack]]
    assert len(set(keys)) == len(keys)
    assert {(k.seed, k.epoch) for k in keys} == {(7, 0), (7, 1)}


def test_packs_are_shuffled_and_filled_otherwise_in_every_epoch() -> None:
    dataset = build_dataset(DOCUMENTS, num_epochs=2)
    bounds = bounds_of(DOCUMENTS)
    packs: dict[int, list[list[int]]] = {0: [], 1: []}
    for number in range(len(dataset)):
        if members := dataset[number]:
            packs[members[0].key.epoch].append([member.key.example for member in members])
    for epoch in packs.values():  # not in the order in which they were planned, the largest documents first
        largest = [max(bounds[example] for example in pack) for pack in epoch]
        assert largest != sorted(largest, reverse=True)
    partners = [{frozenset(pack) for pack in epoch if len(pack) > 1} for epoch in packs.values()]
    assert partners[0] != partners[1]  # documents of equal size change places


def test_every_batch_has_the_same_shape_and_types() -> None:
    dataset, collate = build_dataset(DOCUMENTS, packs_per_step=7), build_collator()
    assert [] in [dataset[i] for i in range(len(dataset))]  # a pack of padding among them
    for index in range(len(dataset)):
        batch = collate([dataset[index]])
        assert {name: tensor.dtype for name, tensor in batch.items()} == DTYPES
        assert {tensor.shape for tensor in batch.values()} == {(1, BUDGET)}


def test_padding_teaches_nothing_and_is_seen_by_nobody() -> None:
    for members in ([], [Member(DOCUMENTS[0], DrawKey(0, 0, 0))]):
        batch = {name: tensor[0] for name, tensor in build_collator()([members]).items()}
        is_padding = batch["document"] <= PADDING_DOCUMENT
        assert (batch["anchor"] + batch["depth"])[is_padding].max() < 128  # models with few positions have as many
        assert is_padding.any()
        assert (batch["labels"][is_padding] == IGNORE_INDEX).all()
        assert (batch["weight"][is_padding] == 0).all()
        layout = SlotLayout(batch["document"], batch["anchor"], batch["depth"])
        visible = is_visible(layout, layout)
        assert not visible[~is_padding][:, is_padding].any()
        assert visible.any(dim=1).all()  # no row is empty, so that softmax stays finite


def test_a_pack_trains_just_the_slots_that_its_draws_name() -> None:
    dataset, collate, draft = build_dataset(DOCUMENTS), build_collator(), DraftConfig()
    for index in range(len(dataset)):
        batch, members = collate([dataset[index]]), dataset[index]
        limits = [chain_limits(m.document.loss_mask, draft.num_draft_tokens) for m in members]
        lengths = [sample_chain_lengths(m.document.loss_mask, draft, m.key) for m in members]
        expected = sum(int((limit >= 0).sum() + length.sum()) for limit, length in zip(limits, lengths, strict=True))
        is_supervised = batch["labels"] != IGNORE_INDEX
        assert int(is_supervised.sum()) == expected
        assert torch.equal(batch["weight"] > 0, is_supervised)
        assert torch.equal(batch["input_ids"] == MASK, batch["depth"] > 0)


def test_a_document_says_the_same_in_whatever_pack_it_is() -> None:
    collate = build_collator(slot_budget=5000)
    members = [Member(document, DrawKey(1, 0, i)) for i, document in enumerate(DOCUMENTS[:9])]
    alone = [part(collate([[member]]), 0) for member in members]
    together, turned = collate([members]), collate([members[::-1]])
    assert [part(together, i) for i in range(9)] == alone
    assert [part(turned, i) for i in range(9)] == alone[::-1]


def test_the_number_of_loader_workers_changes_nothing() -> None:
    dataset = build_dataset(DOCUMENTS[:25])
    runs = [list(DataLoader(dataset, collate_fn=build_collator(), num_workers=n)) for n in (0, 2)]
    assert len(runs[0]) == len(runs[1]) == len(dataset)
    for first, second in zip(*runs, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in DTYPES)


@few_examples
@given(st.lists(st.integers(4, 60), min_size=1, max_size=12), st.integers(0, 99))
def test_any_corpus_fits_a_budget_that_validation_lets_through(lengths: list[int], seed: int) -> None:
    budget = max_slots(60, DraftConfig())
    dataset = build_dataset(build_documents(lengths, seed=seed), slot_budget=budget, num_epochs=1, seed=seed)
    batches = [build_collator(slot_budget=budget)([dataset[i]]) for i in range(len(dataset))]
    num_text = sum(int(((b["document"] >= 0) & (b["depth"] == 0)).sum()) for b in batches)
    assert num_text == sum(lengths)


def test_a_pack_over_the_budget_is_an_error_rather_than_cut() -> None:
    members = [Member(document, DrawKey(0, 0, i)) for i, document in enumerate(DOCUMENTS)]
    with pytest.raises(ValueError, match=f"over the budget {BUDGET}"):
        build_collator()([members])
