"""The terms of the loss against sums over whole vocabularies and against autograd on all logits."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from torch import Tensor

from pard_train.config import ObjectiveConfig
from pard_train.core import objectives, terms
from pard_train.core.terms import SlotTargets, acceptance_term, ce_term, kl_term, mix_terms

NUM_TOKENS = 23
OBJECTIVES = {
    "ce": ObjectiveConfig(),
    "kd": ObjectiveConfig(ce=0.0, kd=1.0),
    "lk": ObjectiveConfig(ce=0.0, lk=1.0),
    "mixed": ObjectiveConfig(ce=0.1, kd=1.0, lk=0.3),
}


def two_distributions(num_slots: int = 40, *, sharpness: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of a draft and log-probabilities of a target, float32 [S, V]."""
    generator = torch.Generator().manual_seed(3)
    draft, target = torch.randn(2, num_slots, NUM_TOKENS, generator=generator) * sharpness
    return draft, target.log_softmax(dim=1)


@pytest.mark.parametrize("module", [terms, objectives], ids=lambda module: module.__name__)
def test_worked_examples_hold(module: object) -> None:
    outcome = doctest.testmod(module, extraglobs={"torch": torch, "np": np})
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_over_the_whole_vocabulary_kl_and_acceptance_are_the_plain_sums() -> None:
    draft, target = two_distributions()
    kl, acceptance = (term(draft.log_softmax(dim=1), target).loss for term in (kl_term, acceptance_term))
    for slot in range(len(draft)):
        q, p = draft[slot].double().softmax(dim=0).tolist(), target[slot].double().exp().tolist()
        assert float(kl[slot]) == pytest.approx(sum(b * np.log(b / a) for a, b in zip(q, p, strict=True)), rel=1e-4)
        rate = sum(min(a, b) for a, b in zip(q, p, strict=True))
        assert float(acceptance[slot]) == pytest.approx(-np.log(rate), rel=1e-4)


def test_of_a_top_k_the_kl_is_that_of_its_renormalised_part_and_acceptance_a_bound() -> None:
    draft, target = two_distributions()
    logprobs = draft.log_softmax(dim=1)
    top = target.topk(4, dim=1)
    kl, acceptance = (term(logprobs.gather(1, top.indices), top.values).loss for term in (kl_term, acceptance_term))
    p = top.values.double().exp()
    p /= p.sum(dim=1, keepdim=True)
    expected = (p * (p.log() - logprobs.gather(1, top.indices).double())).sum(dim=1)
    torch.testing.assert_close(kl.double(), expected, atol=1e-5, rtol=1e-5)
    assert (acceptance >= acceptance_term(logprobs, target).loss).all()
    assert (acceptance >= -top.values.logsumexp(dim=1) - 1e-6).all()


def test_a_draft_that_equals_the_target_has_no_kl_and_accepts_everything() -> None:
    _, target = two_distributions()
    for term in (kl_term, acceptance_term):
        assert float(term(target, target).loss.abs().max()) < 1e-5


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("top_k", [1, 4, NUM_TOKENS])
def test_the_gradient_of_terms_gives_the_gradient_of_all_logits(name: str, top_k: int) -> None:
    """sum(g) * q - g, against autograd on a loss written with a whole table of p."""
    logits, target = two_distributions()
    logits.requires_grad_()
    top = target.topk(top_k, dim=1)
    labels = torch.arange(len(logits)) % NUM_TOKENS
    targets = SlotTargets(labels, torch.ones(len(labels)), top.indices.int(), top.values)
    known = targets.known_tokens()
    loss, neg_grad = mix_terms(logits.log_softmax(dim=1).gather(1, known).detach(), top.values, OBJECTIVES[name])
    expected = table_loss(logits, labels, top.indices, target, OBJECTIVES[name])
    torch.testing.assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-5)
    gradient = neg_grad.sum(dim=1, keepdim=True) * logits.detach().softmax(dim=1)
    gradient.scatter_add_(1, known, -neg_grad)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0], atol=1e-5, rtol=1e-4)


def table_loss(logits: Tensor, labels: Tensor, top: Tensor, target: Tensor, config: ObjectiveConfig) -> Tensor:
    """The loss of every slot, [S], with p as a table over the vocabulary that is 0 outside of the top k."""
    q, is_known = logits.softmax(dim=1), torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    p = torch.where(is_known, target.exp(), 0.0)
    share = p / p.sum(dim=1, keepdim=True)
    kl = torch.where(is_known, share * (share / q).clamp(min=1e-30).log(), 0.0).sum(dim=1)
    ce = -q[torch.arange(len(q)), labels].log()
    return config.ce * ce + config.kd * kl - config.lk * torch.minimum(p, q).sum(dim=1).log()


@pytest.mark.parametrize("term", [kl_term, acceptance_term])
def test_terms_stay_finite_where_the_draft_gives_the_target_nothing(term: object) -> None:
    logprobs = torch.tensor([[-400.0, -500.0]])  # probabilities that float32 takes for 0
    teacher = torch.tensor([[0.9, 0.05]]).log().half()
    loss, neg_grad = term(logprobs, teacher)  # type: ignore[operator]
    assert 350 < float(loss) < 450
    assert float(neg_grad.sum()) == pytest.approx(1, abs=1e-3)


def test_an_impossible_token_of_the_target_counts_for_nothing() -> None:
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    teacher = torch.tensor([[0.7, 0.3, 0.0]]).log()
    for term in (kl_term, acceptance_term):
        with_it, without = term(logprobs, teacher), term(logprobs[:, :2], teacher[:, :2])
        torch.testing.assert_close(with_it.loss, without.loss)
        assert float(with_it.neg_grad[0, 2]) == 0


def test_a_chunk_of_targets_is_their_rows() -> None:
    targets = SlotTargets(torch.arange(6), torch.rand(6), torch.arange(12).view(6, 2).int(), torch.rand(6, 2))
    part = targets[slice(2, 5)]
    assert len(part) == 3
    assert torch.equal(part.weight, targets.weight[2:5])
    assert part.known_tokens().tolist() == [[2, 4, 5], [3, 6, 7], [4, 8, 9]]
    assert torch.equal(part.teacher_logprobs, targets.teacher_logprobs[2:5])
    assert SlotTargets(targets.labels, targets.weight)[slice(1, 3)].known_tokens().tolist() == [[1], [2]]


def test_cross_entropy_has_a_gradient_at_the_label_alone() -> None:
    term = ce_term(torch.tensor([[-2.0], [-0.5]]))
    assert term.loss.tolist() == [2.0, 0.5]
    assert term.neg_grad.tolist() == [[1.0], [1.0]]
