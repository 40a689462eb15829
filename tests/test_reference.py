"""The dense reference: what it keeps and sees, and that our packed step learns what it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import (
    build_dense_batch,
    dense_loss,
    dense_losses,
    dense_mask,
    draw_kept,
    kept_of_chains,
    prepare_reference_model,
)
from tiny import NUM_ROWS, build_model
from torch import Tensor
from transformers import PreTrainedModel

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS
from pard_train.core.objectives import PackLoss
from pard_train.data.chat import Document
from pard_train.data.packing import Member, PardCollator
from pard_train.layout import IGNORE_INDEX, DrawKey, sample_chain_lengths

MASK = 300


def build_documents() -> list[Document]:
    """Two documents of random tokens, of two turns and of one."""
    draw = np.random.default_rng(5)
    masks = [np.arange(44) % 22 >= 7, np.arange(30) >= 9]
    return [Document(draw.integers(NUM_ROWS, size=len(m)), m, f"document {i}") for i, m in enumerate(masks)]


def dense_sums(model: PreTrainedModel, documents: list[Document], draft: DraftConfig) -> tuple[Tensor, Tensor]:
    """(sum of cross entropies, supervised slots) by the reference, a sample at a time, with our chains."""
    total, num_slots = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    for number, document in enumerate(documents):
        lengths = sample_chain_lengths(document.loss_mask, draft, DrawKey(0, 0, number))
        kept = kept_of_chains(lengths, len(document.input_ids) + 6, draft.num_draft_tokens)  # with padding
        batch = build_dense_batch([document], kept, MASK)
        total = total + dense_losses(model, batch).sum()
        num_slots = num_slots + (batch.labels != IGNORE_INDEX).sum()
    return total, num_slots


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # the reference has no windows
@pytest.mark.parametrize("num_draft_tokens", [1, 4, 8])
def test_our_packed_step_has_the_loss_and_the_gradients_of_the_dense_reference(
    family: str, num_draft_tokens: int
) -> None:
    draft, documents = DraftConfig(num_draft_tokens=num_draft_tokens), build_documents()
    reference = prepare_reference_model(build_model(family, seed=1))
    total, num_slots = dense_sums(reference, documents, draft)
    total.backward()
    members = [Member(document, DrawKey(0, 0, number)) for number, document in enumerate(documents)]
    inputs = PardCollator(draft, ObjectiveConfig(), MASK, 400)([members])
    ours = build_model(family, seed=1)
    ours.set_attn_implementation(IMPLEMENTATIONS["split"])
    loss, statistics = PackLoss(ours, "split", num_draft_tokens)(ours, inputs, 1.0)
    loss.backward()
    assert int(statistics.slots.sum()) == int(num_slots) > 0
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4 * float(theirs.grad.abs().max()), rtol=0)


def test_a_slot_of_the_reference_sees_its_text_and_its_chain() -> None:
    num_tokens, num_depths = 5, 3
    mask = dense_mask(num_tokens, num_depths)
    assert mask.dtype == torch.float32
    assert mask.shape == (15, 15)
    sees = [
        {(int(k) // num_tokens, int(k) % num_tokens) for k in torch.nonzero(row == 0).squeeze(1)} for row in mask
    ]  # of each slot, (depth, position) of what it sees
    assert sees[3] == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert sees[2 * num_tokens + 4] == {(0, 0), (0, 1), (0, 2), (1, 3), (2, 4)}
    assert sees[2 * num_tokens + 1] == {(1, 0), (2, 1)}  # without any context
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_the_reference_draws_once_for_all_tokens_and_wraps_around() -> None:
    draft = DraftConfig(num_draft_tokens=8)
    kept = [draw_kept(100, draft, np.random.default_rng(seed)) for seed in range(30)]
    assert all(k.sum(axis=1).tolist() == [100, 70, 48, 34, 24, 20, 20, 20] for k in kept)  # 100 * 0.7 ** 2 is 48.99..
    for k in kept:
        for depth in range(2, 8):  # every slot has a predecessor in its chain, the first position the last one
            assert not (k[depth] & ~np.roll(k[depth - 1], 1)).any()
    assert any(k[2:, 0].any() for k in kept)


def test_labels_are_those_of_the_loss_mask_and_never_the_first_tokens_of_a_depth() -> None:
    document = Document(np.array([10, 11, 12, 13, 14]), np.array([False, True, True, False, True]), "")
    batch = build_dense_batch([document], np.ones((3, 7), dtype=bool), MASK)
    labels = batch.labels.view(3, 7).tolist()
    none = IGNORE_INDEX
    assert labels[0] == [11, 12, none, 14, none, none, none]
    assert labels[1] == [11, 12, none, 14, none, none, none]  # 11 from anchor -1
    assert labels[2] == [none, 12, none, 14, none, none, none]
    assert batch.input_ids.view(3, 7).tolist() == [[10, 11, 12, 13, 14, 0, 0], [MASK] * 7, [MASK] * 7]
    assert batch.position_ids.view(3, 7).tolist() == [list(range(7))] * 3
    assert batch.mask.shape == (1, 1, 21, 21)


def test_the_loss_of_the_reference_is_the_mean_over_the_supervised_slots_of_its_batch() -> None:
    documents = build_documents()
    model = prepare_reference_model(build_model("qwen2", seed=2))
    assert model.is_gradient_checkpointing
    kept = draw_kept(44, DraftConfig(), np.random.default_rng(0))
    both = build_dense_batch(documents, kept, MASK)
    assert both.mask.shape == (2, 1, kept.sum(), kept.sum())
    losses = dense_losses(model, both).detach()
    alone = [dense_losses(model, build_dense_batch([document], kept, MASK)).detach()[0] for document in documents]
    torch.testing.assert_close(losses, torch.stack(alone), atol=1e-4, rtol=1e-4)
    num_slots = [int((build_dense_batch([d], kept, MASK).labels != IGNORE_INDEX).sum()) for d in documents]
    expected = sum(float(x.sum()) for x in alone) / sum(num_slots)
    assert float(dense_loss(model, both).detach()) == pytest.approx(expected, rel=1e-5)
