"""Weights, losses and statistics per depth against sums written out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_ROWS, build_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core import head as slot_head
from pard_train.core.head import SlotHead, score_slots
from pard_train.core.objectives import DepthStatistics, PackLoss, slot_weights
from pard_train.core.terms import SlotTargets
from pard_train.layout import IGNORE_INDEX, DrawKey, SlotLayout, lay_out_document, sample_chain_lengths, slot_labels

NUM_DRAFT_TOKENS = 8


def supervised_slots(num_documents: int, *, seed: int) -> SlotLayout:
    """The supervised slots of a pack of documents with two turns each."""
    mask = np.arange(40) % 20 >= 6
    parts = []
    for number in range(num_documents):
        lengths = sample_chain_lengths(mask, DraftConfig(), DrawKey(seed, 0, number))
        layout = lay_out_document(lengths, number)
        parts.append(layout[slot_labels(layout, np.arange(40), mask) != IGNORE_INDEX])
    names = ("document", "anchor", "depth")
    return SlotLayout(*(torch.from_numpy(np.concatenate([getattr(p, name) for p in parts])) for name in names))


def slots_of_chains(*chains: list[bool]) -> tuple[SlotLayout, Tensor]:
    """Anchors 0, 1, ... of one document with chains of given outcomes."""
    anchor = [a for a, chain in enumerate(chains) for _ in chain]
    depth = [d for chain in chains for d in range(len(chain))]
    layout = SlotLayout(*map(torch.tensor, ([0] * len(anchor), anchor, depth)))
    return layout, torch.tensor([outcome for chain in chains for outcome in chain])


def statistics_of(*chains: list[bool], losses: float = 0.5, num_draft_tokens: int = 3) -> DepthStatistics:
    """Statistics of chains with given outcomes."""
    layout, is_correct = slots_of_chains(*chains)
    return DepthStatistics.of_slots(layout, is_correct, torch.full((len(layout),), losses), num_draft_tokens)


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.5])
def test_a_supervised_slot_weighs_the_decay_to_the_power_of_its_depth(decay: float) -> None:
    depth = torch.tensor([0, 1, 2, 3, 0, 7])
    labels = torch.tensor([5, 0, IGNORE_INDEX, 2, IGNORE_INDEX, 9])  # token 0 is a label like any other
    weights = slot_weights(depth, labels, ObjectiveConfig(depth_decay=decay))
    assert weights.tolist() == pytest.approx([1, decay, 0, decay**3, 0, decay**7])
    assert weights.dtype == torch.float32


def test_statistics_are_those_of_a_loop_over_chains() -> None:
    layout = supervised_slots(3, seed=2)
    generator = torch.Generator().manual_seed(1)
    is_correct = torch.rand(len(layout), generator=generator) < 0.7
    losses = torch.rand(len(layout), generator=generator)
    shuffle = torch.randperm(len(layout), generator=generator)  # order says nothing
    stats = DepthStatistics.of_slots(layout[shuffle], is_correct[shuffle], losses[shuffle], NUM_DRAFT_TOKENS)
    rows = zip(layout.document.tolist(), layout.anchor.tolist(), layout.depth.tolist(), strict=True)
    outcome = {row: (bool(c), float(x)) for row, c, x in zip(rows, is_correct, losses, strict=True)}
    expected = torch.zeros(4, NUM_DRAFT_TOKENS, dtype=torch.float64)
    for (document, anchor, depth), (correct, loss) in outcome.items():
        is_accepted = all(outcome[document, anchor, d][0] for d in range(depth + 1))
        expected[:, depth] += torch.tensor([1, correct, is_accepted, loss], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(stats), expected)
    assert (expected[2, 1:] < expected[1, 1:]).any()  # the loop tells accepted from correct


def test_accepted_length_of_a_worked_example() -> None:
    # P(depth 0 right) = 3/4; P(first two right) = 2/3 of the chains that long; P(all three) = 0/2
    metrics = statistics_of([True, True, False], [True, True], [False, True, True], [True]).metrics()
    assert metrics["accepted_length"] == pytest.approx(1 + 3 / 4 + 2 / 3 + 0)
    assert metrics["accuracy/depth_0"] == pytest.approx(3 / 4)
    assert metrics["accuracy/depth_1"] == 1.0
    assert metrics["accuracy/depth_2"] == pytest.approx(1 / 2)
    assert [metrics[f"loss/depth_{d}"] for d in range(3)] == pytest.approx([0.5] * 3)
    assert metrics["supervised_slots"] == 9


@pytest.mark.parametrize("is_right, expected", [(True, 4.0), (False, 1.0)])
def test_a_draft_that_is_always_right_is_expected_to_emit_k_plus_one_tokens(is_right: bool, expected: float) -> None:
    stats = statistics_of(*[[is_right] * 3] * 5)
    assert stats.metrics()["accepted_length"] == pytest.approx(expected)


def test_a_depth_that_no_chain_reached_is_left_out() -> None:
    metrics = statistics_of([True], [False], num_draft_tokens=3).metrics()
    assert metrics["accepted_length"] == pytest.approx(1.5)
    assert not any("depth_1" in name or "depth_2" in name for name in metrics)
    empty = DepthStatistics.zeros(3).metrics()
    assert empty == {"accepted_length": 1.0, "supervised_slots": 0.0}


def test_statistics_of_steps_add_up_to_those_of_all_slots_at_once() -> None:
    chains = [[True, False], [True, True, True], [False], [True, True]]
    total = DepthStatistics.zeros(3)
    for chain in chains:
        total.add(statistics_of(chain))
    for summed, at_once in zip(total, statistics_of(*chains), strict=True):
        torch.testing.assert_close(summed, at_once)


# ---------------------------------------------------------------------------------------------------------------------
# The head, a chunk of slots at a time
# ---------------------------------------------------------------------------------------------------------------------

CHUNK_SLOTS = 7  # does not divide the numbers of slots below


@pytest.fixture(params=[CHUNK_SLOTS, 1000], ids=["chunks", "one chunk"])
def chunk_slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many slots at a time through a head of NUM_ROWS rows."""
    monkeypatch.setattr(slot_head, "CHUNK_SLOTS_CPU", request.param)
    return request.param


def random_slots(num_slots: int, *, has_bias: bool, scale: float = 1.0) -> tuple[Tensor, nn.Linear, SlotTargets]:
    """Hidden states, head, labels and weights."""
    torch.manual_seed(4)
    hidden, head = torch.randn(num_slots, 16) * scale, nn.Linear(16, NUM_ROWS, bias=has_bias)
    targets = SlotTargets(torch.randint(NUM_ROWS, (num_slots,)), torch.rand(num_slots))
    return hidden.requires_grad_(), head, targets


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of every slot, by PyTorch's own function."""
    return nn.functional.cross_entropy(logits.float(), labels, reduction="none")


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "num_slots, scale", [(0, 1.0), (1, 1.0), (40, 1.0), (40, 100.0)]
)  # the last overflow plain exponents
def test_chunks_give_the_loss_and_the_gradients_of_all_logits_at_once(
    chunk_slots: int, num_slots: int, scale: float, has_bias: bool
) -> None:
    hidden, head, targets = random_slots(num_slots, has_bias=has_bias, scale=scale)
    logits, labels = head(hidden), targets.labels
    losses = cross_entropies(logits, labels)
    parameters = [hidden, *head.parameters()]
    expected = torch.autograd.grad((losses * targets.weight).sum() * 3, parameters)
    scores = score_slots(hidden, head, targets, ObjectiveConfig())
    torch.testing.assert_close(scores.loss, (losses * targets.weight).sum())
    torch.testing.assert_close(scores.losses, losses.detach())
    assert torch.equal(scores.is_correct, logits.argmax(dim=-1) == labels)
    for mine, theirs in zip(torch.autograd.grad(scores.loss * 3, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * scale, rtol=1e-5)


def test_chunks_under_autocast_are_as_near_to_the_exact_gradients_as_all_logits_at_once(chunk_slots: int) -> None:
    hidden, head, targets = random_slots(60, has_bias=False)
    labels, weight = targets.labels, targets.weight
    exact = torch.autograd.grad((cross_entropies(head(hidden), labels) * weight).sum(), [hidden, head.weight])
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(hidden)
        assert logits.dtype == torch.bfloat16
        at_once = torch.autograd.grad((cross_entropies(logits, labels) * weight).sum(), [hidden, head.weight])
        scores = score_slots(hidden, head, targets, ObjectiveConfig())
    chunked = torch.autograd.grad(scores.loss, [hidden, head.weight])
    torch.testing.assert_close(scores.losses, cross_entropies(logits, labels).detach())
    for mine, theirs, truth in zip(chunked, at_once, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_a_chunk_is_all_the_logits_that_are_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_head, "CHUNK_SLOTS_CPU", CHUNK_SLOTS)
    hidden, head, targets = random_slots(500, has_bias=False)
    sizes = LargestTensor()
    with sizes:
        score_slots(hidden, head, targets, ObjectiveConfig()).loss.backward()
    assert sizes.largest == max(CHUNK_SLOTS * NUM_ROWS, hidden.numel(), head.weight.numel())


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_a_pack_through_the_head_in_chunks_is_the_pack_with_all_logits(
    family: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, gradients of every parameter, and statistics per depth."""
    monkeypatch.setattr(slot_head, "CHUNK_SLOTS_CPU", CHUNK_SLOTS)
    batch = random_pack()
    results = []
    for is_chunked in (True, False):
        model = build_model(family, seed=3, tied=tied)
        pack_loss = PackLoss(model, "dense", NUM_DRAFT_TOKENS)
        assert pack_loss.head is not None
        if not is_chunked:
            pack_loss.head = None
        loss, statistics = pack_loss(model, batch, 0.01)
        loss.backward()
        results.append((loss.detach(), statistics, dict(model.named_parameters())))
    (loss, statistics, mine), (all_loss, all_statistics, theirs) = results
    torch.testing.assert_close(loss, all_loss)
    assert ("lm_head.weight" in mine) is not tied
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-4)
    for summed, at_once in zip(statistics, all_statistics, strict=True):
        torch.testing.assert_close(summed, at_once, atol=1e-5, rtol=1e-6)


def random_pack() -> dict[str, Tensor]:
    """Two documents of random tokens in the form of PardCollator."""
    draw, mask = np.random.default_rng(0), np.arange(40) % 20 >= 6
    layouts, labels = [], []
    for number in range(2):
        layout = lay_out_document(sample_chain_lengths(mask, DraftConfig(), DrawKey(0, 0, number)), number)
        layouts.append(layout)
        labels.append(slot_labels(layout, draw.integers(NUM_ROWS, size=40), mask))
    names = ("document", "anchor", "depth")
    batch = {name: torch.from_numpy(np.concatenate([getattr(x, name) for x in layouts])) for name in names}
    batch["labels"] = torch.from_numpy(np.concatenate(labels))
    batch["input_ids"] = torch.from_numpy(draw.integers(NUM_ROWS, size=len(batch["labels"])))
    batch["weight"] = slot_weights(batch["depth"], batch["labels"], ObjectiveConfig(depth_decay=0.8))
    return {name: tensor[None] for name, tensor in batch.items()}


def test_a_head_gives_logits_again_once_the_loss_is_taken_also_after_an_error() -> None:
    hidden, head, targets = random_slots(5, has_bias=False)
    logits = head(hidden)
    scorer = SlotHead(head)
    with scorer.scoring(targets, ObjectiveConfig()):
        assert head(hidden[None]).ndim == 0
    assert torch.equal(head(hidden), logits)
    with pytest.raises(KeyError), scorer.scoring(targets, ObjectiveConfig()):
        raise KeyError
    assert torch.equal(head(hidden), logits)
