"""Every objective through the head, a chunk of slots at a time, is that objective on all logits at once."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_objectives import CHUNK_SLOTS, NUM_DRAFT_TOKENS, LargestTensor, supervised_slots
from test_terms import table_loss
from tiny import NUM_ROWS, build_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GraniteConfig, PreTrainedModel

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core import head as slot_head
from pard_train.core.attention import IMPLEMENTATIONS, attention_inputs
from pard_train.core.head import Reweigh, score_slots
from pard_train.core.objectives import DepthStatistics, PackLoss, cat_weights, dpace_weights, slot_weights
from pard_train.core.terms import SlotTargets
from pard_train.layout import (
    IGNORE_INDEX,
    DrawKey,
    SlotLayout,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
)
from pard_train.training.throughput import num_compilations

TOP_K = 6
OBJECTIVES = {
    "ce": ObjectiveConfig(),
    "kd": ObjectiveConfig(ce=0.0, kd=1.0),
    "lk": ObjectiveConfig(ce=0.0, lk=1.0),
    "pard2": ObjectiveConfig(ce=0.1, kd=1.0, cat=True),
    "dpace": ObjectiveConfig(dpace=True),
    "all": ObjectiveConfig(ce=0.2, kd=0.7, lk=0.5, depth_decay=0.8, cat=True, dpace=True, dpace_alpha=0.3),
}
all_objectives = pytest.mark.parametrize("name", OBJECTIVES)


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_head, "CHUNK_SLOTS_CPU", CHUNK_SLOTS)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


def test_cat_weighs_a_slot_by_the_product_of_the_labels_before_its_own() -> None:
    draw, mask = np.random.default_rng(0), np.arange(60) % 20 >= 6
    probability = draw.uniform(0.1, 1.0, size=60)
    layout = lay_out_document(sample_chain_lengths(mask, DraftConfig(), DrawKey(0, 0, 0)))
    layout = layout[slot_labels(layout, np.arange(60), mask) != IGNORE_INDEX]
    label = (np.cumsum(mask) - 1)[layout.position + 1]
    weights = cat_weights(np.log(probability[mask]), label, layout.depth)
    rows = zip(layout.anchor.tolist(), layout.depth.tolist(), strict=True)
    expected = [float(np.prod([probability[a + m + 1] for m in range(d)])) for a, d in rows]
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert weights.dtype == np.float32
    assert min(expected) < 0.01 < max(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dpace_weighs_a_slot_by_the_drafts_expected_from_it_on(alpha: float) -> None:
    layout = supervised_slots(3, seed=2)
    probs = torch.rand(len(layout), generator=torch.Generator().manual_seed(0))
    weights = dpace_weights(layout, probs, alpha)
    rows = list(zip(layout.document.tolist(), layout.anchor.tolist(), layout.depth.tolist(), strict=True))
    quality = {row: (1 - alpha) * float(p) + alpha for row, p in zip(rows, probs, strict=True)}
    for (document, anchor, depth), weight in zip(rows, weights.tolist(), strict=True):
        chain = [quality[document, anchor, d] for d in range(NUM_DRAFT_TOKENS) if (document, anchor, d) in quality]
        expected = sum(float(np.prod(chain[: m + 1])) for m in range(depth, len(chain)))
        assert weight == pytest.approx(expected, rel=1e-5)


def test_dpace_is_a_constant_to_the_gradient_and_takes_a_pack_without_slots() -> None:
    layout = supervised_slots(1, seed=2)
    assert not dpace_weights(layout, torch.rand(len(layout), requires_grad=True), 0.5).requires_grad
    assert len(dpace_weights(layout[:0], torch.rand(0), 0.5)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The head
# ---------------------------------------------------------------------------------------------------------------------


def random_task(num_documents: int, name: str) -> tuple[Tensor, nn.Linear, SlotTargets, Tensor, Reweigh | None]:
    """Hidden states, head, targets, the target's table of log-probabilities [S, V], and what reweighs."""
    layout, objective = supervised_slots(num_documents, seed=1), OBJECTIVES[name]
    torch.manual_seed(4)
    num_slots = len(layout)
    hidden, head = torch.randn(num_slots, 16), nn.Linear(16, NUM_ROWS, bias=True)
    teacher = (torch.randn(num_slots, NUM_ROWS) * 3).log_softmax(dim=1)
    top = teacher.topk(TOP_K, dim=1)
    targets = SlotTargets(torch.randint(NUM_ROWS, (num_slots,)), torch.rand(num_slots))
    if objective.needs_teacher:
        targets = replace(targets, teacher_ids=top.indices.int(), teacher_logprobs=top.values)
    reweigh = (lambda x: dpace_weights(layout, x.exp(), objective.dpace_alpha)) if objective.dpace else None
    return hidden.requires_grad_(), head, targets, teacher, reweigh


def loss_of_all_logits(
    logits: Tensor, targets: SlotTargets, teacher: Tensor, name: str, reweigh: Reweigh | None
) -> Tensor:
    """The objective from a table over the vocabulary."""
    top = teacher.topk(TOP_K, dim=1).indices
    logits = logits.float()
    weight, labels = targets.weight, targets.labels
    if reweigh is not None:
        weight = weight * reweigh(logits.detach().log_softmax(dim=1)[torch.arange(len(labels)), labels])
    return (table_loss(logits, labels, top, teacher, OBJECTIVES[name]) * weight).sum()


@all_objectives
@pytest.mark.parametrize("num_documents", [1, 3])
def test_chunks_give_loss_and_gradients_of_all_logits_at_once(name: str, num_documents: int) -> None:
    hidden, head, targets, teacher, reweigh = random_task(num_documents, name)
    logits, parameters = head(hidden), [hidden, *head.parameters()]
    expected = loss_of_all_logits(logits, targets, teacher, name, reweigh)
    scores = score_slots(hidden, head, targets, OBJECTIVES[name], reweigh)
    torch.testing.assert_close(scores.loss, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores.losses, nn.functional.cross_entropy(logits, targets.labels, reduction="none"))
    assert torch.equal(scores.is_correct, logits.argmax(dim=-1) == targets.labels)
    gradients = [torch.autograd.grad(loss * 3, parameters) for loss in (scores.loss, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@all_objectives
def test_chunks_under_autocast_are_as_near_to_the_exact_gradients_as_all_logits_at_once(name: str) -> None:
    hidden, head, targets, teacher, reweigh = random_task(3, name)
    parameters = [hidden, head.weight]

    def all_at_once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_of_all_logits(head(hidden), targets, teacher, name, reweigh), parameters)

    exact = all_at_once()
    with torch.autocast("cpu", torch.bfloat16):
        at_once = all_at_once()
        scores = score_slots(hidden, head, targets, OBJECTIVES[name], reweigh)
    for mine, theirs, truth in zip(torch.autograd.grad(scores.loss, parameters), at_once, exact, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 1.2 * (theirs - truth).norm()


@pytest.mark.parametrize("name", ["ce", "dpace", "all"])  # `all` has every term
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_compiled_for_accelerators_is_what_runs_on_a_cpu(
    name: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is compiled once for chunks of any size."""

    def results(num_documents: int) -> list[Tensor]:
        hidden, head, targets, _, reweigh = random_task(num_documents, name)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            scores = score_slots(hidden, head, targets, OBJECTIVES[name], reweigh)
        return [scores.loss, scores.losses, *torch.autograd.grad(scores.loss, [hidden, *head.parameters()])]

    expected = [results(num_documents) for num_documents in (3, 1, 2)]
    torch.compiler.reset()
    monkeypatch.setattr(slot_head, "EAGER_DEVICES", ())
    compilations = []
    tolerance = 1e-4 if precision == torch.float32 else 2.0**-8  # half a step of bfloat16
    for num_documents, theirs in zip((3, 1, 2), expected, strict=True):
        before = num_compilations()
        torch.testing.assert_close(results(num_documents), theirs, atol=tolerance, rtol=tolerance)
        compilations.append(num_compilations() - before)
    assert compilations == [1 + OBJECTIVES[name].dpace, 0, 0]


def test_a_label_that_is_learnt_well_still_has_a_gradient_in_bfloat16() -> None:
    """Its probability is 0.9997, which bfloat16 rounds to 1."""
    logits, label = torch.zeros(1, 50, dtype=torch.bfloat16), torch.tensor([7])
    logits[0, 7] = 12
    exact = logits[0].double().softmax(dim=0)[7].item() - 1
    slot_head._score_chunk(
        logits, SlotTargets(label, torch.ones(1)), torch.ones(1), ObjectiveConfig(), needs_gradient=True
    )
    assert logits[0, 7].item() == pytest.approx(exact, rel=0.01)


@all_objectives
def test_a_chunk_is_all_the_logits_that_are_ever_held(name: str) -> None:
    hidden, head, targets, _, reweigh = random_task(12, name)
    sizes = LargestTensor()
    with sizes:
        score_slots(hidden, head, targets, OBJECTIVES[name], reweigh).loss.backward()
    assert sizes.largest == max(CHUNK_SLOTS * NUM_ROWS, hidden.numel(), head.weight.numel(), len(targets) * (1 + TOP_K))
    assert sizes.largest < len(targets) * NUM_ROWS / 10


# ---------------------------------------------------------------------------------------------------------------------
# A pack
# ---------------------------------------------------------------------------------------------------------------------


def random_pack(documents: list[int], name: str) -> dict[str, Tensor]:
    """Documents of random tokens in the form of PardCollator; a document says the same in any pack."""
    mask, layouts, columns = np.arange(40) % 20 >= 6, [], []
    for place, number in enumerate(documents):
        draw = np.random.default_rng(number)
        layout = lay_out_document(sample_chain_lengths(mask, DraftConfig(), DrawKey(0, 0, number)), place)
        labels = slot_labels(layout, draw.integers(NUM_ROWS, size=40), mask)
        num_slots = int((labels != IGNORE_INDEX).sum())
        teacher = torch.from_numpy(draw.normal(size=(num_slots, NUM_ROWS)) * 3).float().log_softmax(dim=1).topk(TOP_K)
        layouts.append(layout)
        columns.append((labels, draw.integers(NUM_ROWS, size=len(layout)), teacher.indices, teacher.values))
    labels, tokens, ids, logprobs = (
        torch.cat([torch.as_tensor(c) for c in column]) for column in zip(*columns, strict=True)
    )
    names = ("document", "anchor", "depth")
    batch = {name: torch.from_numpy(np.concatenate([getattr(x, name) for x in layouts])) for name in names}
    batch |= {"labels": labels, "input_ids": tokens, "weight": slot_weights(batch["depth"], labels, OBJECTIVES[name])}
    batch |= {"teacher_ids": ids.int(), "teacher_logprobs": logprobs.half()}
    return {name: tensor[None] for name, tensor in batch.items()}


@dataclass
class Outcome:
    """What some packs in accumulation say of a model."""

    loss: Tensor
    gradients: dict[str, Tensor]
    statistics: DepthStatistics


def train_on(model: PreTrainedModel, name: str, packs: list[dict[str, Tensor]], *, is_chunked: bool = True) -> Outcome:
    """One step without an optimizer."""
    model.zero_grad()
    pack_loss = PackLoss(model, "dense", NUM_DRAFT_TOKENS, OBJECTIVES[name])
    if not is_chunked:
        pack_loss.head = None
    total, statistics = torch.zeros(()), DepthStatistics.zeros(NUM_DRAFT_TOKENS)
    for pack in packs:
        loss, part = pack_loss(model, pack, 0.01)
        loss.backward()
        total += loss.detach()
        statistics.add(part)
    return Outcome(total, {name: p.grad.clone() for name, p in model.named_parameters()}, statistics)


def check_equal(first: Outcome, second: Outcome) -> None:
    """Loss, gradient of every parameter, statistics per depth."""
    torch.testing.assert_close(first.loss, second.loss)
    for name, gradient in first.gradients.items():
        torch.testing.assert_close(gradient, second.gradients[name], atol=1e-5, rtol=1e-3)
    for mine, theirs in zip(first.statistics, second.statistics, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-6)


@all_objectives
def test_a_pack_through_the_head_in_chunks_is_the_pack_with_all_logits(name: str) -> None:
    pack = random_pack([0, 1], name)
    check_equal(
        train_on(build_model("qwen2", seed=3), name, [pack]),
        train_on(build_model("qwen2", seed=3), name, [pack], is_chunked=False),
    )


@all_objectives
def test_the_loss_of_a_pack_is_the_sum_over_slots_from_the_models_own_logits(name: str) -> None:
    model, pack, objective = build_model("qwen2", seed=3), random_pack([0, 1], name), OBJECTIVES[name]
    layout = SlotLayout(*(pack[part][0] for part in ("document", "anchor", "depth")))
    supervised = torch.nonzero(pack["labels"][0] != IGNORE_INDEX).squeeze(1)
    with torch.no_grad():
        model.set_attn_implementation(IMPLEMENTATIONS["dense"])
        inputs = attention_inputs("dense", layout)
        logits = model(pack["input_ids"], position_ids=layout.position[None], **inputs).logits[0, supervised]
    labels, ids = pack["labels"][0, supervised], pack["teacher_ids"][0].long()
    known = pack["teacher_logprobs"][0].float()
    teacher = torch.full_like(logits, -torch.inf).scatter(1, ids, known)
    weight = pack["weight"][0, supervised]
    if objective.dpace:
        probs = logits.softmax(dim=1)[torch.arange(len(labels)), labels]
        weight = weight * dpace_weights(layout[supervised], probs, objective.dpace_alpha)
    expected = (table_loss(logits, labels, ids, teacher, objective) * weight).sum() * 0.01
    torch.testing.assert_close(train_on(model, name, [pack]).loss, expected, atol=1e-5, rtol=1e-4)


@all_objectives
def test_the_losses_of_two_halves_add_up_to_that_of_the_whole(name: str) -> None:
    """So ranks and accumulation steps may share a batch in any way."""
    halves = [random_pack([0], name), random_pack([1, 2], name)]
    check_equal(
        train_on(build_model("qwen2", seed=3), name, [random_pack([0, 1, 2], name)]),
        train_on(build_model("qwen2", seed=3), name, halves),
    )


@all_objectives
def test_a_model_that_scales_its_logits_learns_by_its_own_logits(name: str) -> None:
    """It is the model whose head is a quarter as large."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=NUM_ROWS,
        num_key_value_heads=2,
        logits_scaling=4.0,
        initializer_range=0.5,
        tie_word_embeddings=False,
        **shape,
    )
    scaling, folded = (AutoModelForCausalLM.from_config(deepcopy(config)) for _ in range(2))
    folded.load_state_dict(scaling.state_dict() | {"lm_head.weight": scaling.lm_head.weight / 4.0})
    folded.config.logits_scaling = 1.0
    pack = random_pack([0], name)
    assert PackLoss(scaling, "dense", NUM_DRAFT_TOKENS).head is None
    first, second = train_on(scaling, name, [pack]), train_on(folded, name, [pack])
    second.gradients["lm_head.weight"] /= 4.0
    check_equal(first, second)
