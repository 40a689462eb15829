"""Estimated acceptance at a temperature is what exact enumeration and live sampling say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from test_architectures import NUM_ROWS, Words, tiny_model
from tiny import build_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.acceptance.counting import Trace, pool
from pard_train.acceptance.estimate import ScoredText, estimate_acceptance, expected_steps, temper
from pard_train.core.head import gives_plain_logits
from pard_train.generation.decoding import Limits, decode_batch
from pard_train.generation.proposers import Drafter
from pard_train.generation.sampling import Sampling, probabilities
from pard_train.mask_token import set_draft_keys

WORDS, MASK, ROWS = 4, 5, 6  # a vocabulary that can be enumerated
LENGTH, K = 3, 2
PROMPT = [1, 3, 0]


class FourWords:
    """All that a drafter asks of a tokenizer: how many tokens there are."""

    def __len__(self) -> int:
        return WORDS


def tiny_drafter(seed: int, *, is_sampled: bool) -> Drafter:
    """A draft model of four words."""
    model = build_model("llama", seed=seed, num_rows=ROWS)
    set_draft_keys(model.config, MASK, K)
    return Drafter(model, FourWords(), is_sampled=is_sampled)  # type: ignore[arg-type]


@torch.no_grad()
def target_probs(target: PreTrainedModel, text: list[int], sampling: Sampling) -> Tensor:
    """What the target draws the next token from, [WORDS]."""
    return probabilities(target(torch.tensor([text])).logits[0, -1, :WORDS], sampling).double()


@torch.no_grad()
def draft_probs(drafter: Drafter, text: list[int], sampling: Sampling) -> Tensor:
    """What the draft's tokens are drawn from, [K, WORDS]."""
    logits = drafter.model(torch.tensor([text + [MASK] * (K - 1)])).logits[0, -K:]
    return probabilities(drafter.mask_non_tokens(logits), sampling if drafter.is_sampled else Sampling()).double()


def enumerated_steps(target: PreTrainedModel, drafter: Drafter, sampling: Sampling) -> float:
    """Expected steps of speculative sampling of LENGTH tokens, over everything that chance may do."""

    @cache
    def own(text: tuple[int, ...]) -> Tensor:
        return target_probs(target, [*PROMPT, *text], sampling)

    @cache
    def steps(emitted: tuple[int, ...]) -> float:
        if len(emitted) >= LENGTH:
            return 0.0
        q = draft_probs(drafter, [*PROMPT, *emitted], sampling)
        total = 1.0
        for draft in product(range(WORDS), repeat=K):
            chance = float(torch.stack([q[d, token] for d, token in enumerate(draft)]).prod())
            if chance:
                total += chance * after(emitted, draft, q)
        return total

    def after(emitted: tuple[int, ...], draft: tuple[int, ...], q: Tensor, depth: int = 0) -> float:
        """Expected further steps once the first `depth` tokens of a draft are kept."""
        text = (*emitted, *draft[:depth])
        if len(text) >= LENGTH:
            return 0.0
        p = own(text)
        if depth == K:
            return sum(float(p[x]) * steps((*text, x)) for x in range(WORDS) if p[x] > 0)
        keep = float(min(1.0, p[draft[depth]] / q[depth, draft[depth]]))
        total = keep * after(emitted, draft, q, depth + 1) if keep else 0.0
        if keep < 1:
            rest = (p - q[depth]).clamp(min=0)
            rest = rest / rest.sum()
            total += (1 - keep) * sum(float(rest[x]) * steps((*text, x)) for x in range(WORDS) if rest[x] > 0)
        return total

    return steps(())


def scored(target: PreTrainedModel, answer: list[int], *, top_k: int = WORDS, prompt_id: str = "") -> ScoredText:
    """A text with the target's scores at temperature 1."""
    with torch.no_grad():
        logits = target(torch.tensor([PROMPT + answer])).logits[0, len(PROMPT) - 1 : -1]
    logprobs = (
        logits[:, :WORDS].double().log_softmax(-1) if target.config.vocab_size == ROWS else logits.log_softmax(-1)
    )
    top = logprobs.topk(top_k)
    label = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return ScoredText(PROMPT, answer, label.numpy(), top.values.numpy(), prompt_id)


def averaged_over_texts(target: PreTrainedModel, sampling: Sampling, steps: Callable[[list[int]], float]) -> float:
    """Mean over all texts of LENGTH tokens, each as often as the target says it."""
    total, own = 0.0, cache(lambda text: target_probs(target, [*PROMPT, *text], sampling))
    for answer in product(range(WORDS), repeat=LENGTH):
        chance = 1.0
        for place, token in enumerate(answer):
            chance *= float(own(answer[:place])[token])
        if chance:
            total += chance * steps(list(answer))
    return total


SAMPLINGS = [Sampling(1.0), Sampling(0.6), Sampling(1.5), Sampling(0.9, top_p=0.7)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("is_sampled", [True, False])
def test_along_the_targets_own_samples_the_estimate_is_exact_on_average(sampling: Sampling, is_sampled: bool) -> None:
    target, drafter = build_model("llama", seed=8, num_rows=ROWS), tiny_drafter(9, is_sampled=is_sampled)

    def steps(answer: list[int]) -> float:
        text = scored(target, answer)
        return estimate_acceptance(drafter, [text], K, sampling).num_steps

    exact = enumerated_steps(target, drafter, sampling)
    assert 1.2 < exact < LENGTH - 0.2
    assert averaged_over_texts(target, sampling, steps) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere", "hyperclovax", "minicpm3"])
def test_a_draft_that_scales_or_caps_its_logits_is_estimated_by_what_its_forward_pass_says(model_type: str) -> None:
    model, mask, answer = tiny_model(model_type), NUM_ROWS - 1, [4, 9, 2]
    for name, value in {"final_logit_softcapping": 0.7, "logits_scaling": 3.0, "logit_scale": 0.3}.items():
        for holder in (model.config, model):
            if name in vars(holder):  # a property of MiniCPM3's config, which already is not 1
                setattr(holder, name, value)
    assert not gives_plain_logits(model)
    set_draft_keys(model.config, mask, K)
    texts = torch.tensor([[*PROMPT, *answer[:place]] + [mask] * (K - 1) + [0] * (2 - place) for place in range(3)])
    with torch.no_grad():
        logits = model(texts, use_cache=False).logits[:, len(PROMPT) - 1 :]
    logits[..., mask] = -torch.inf
    probs, target = logits.double().softmax(-1), np.array([0.03, 0.02, 0.04])  # probabilities of the answer's tokens
    kept = np.zeros((3, K))
    for place in range(3):
        for depth in range(min(K, 3 - place)):
            label = answer[place + depth]
            kept[place, depth] = min(1.0, float(probs[place, place + depth, label]) / target[place + depth])
    assert 0 < kept[0].min() < 1
    top = np.log(np.stack([1 - target, target], axis=1))
    drafter = Drafter(model, Words(), is_sampled=True)  # type: ignore[arg-type]
    found = estimate_acceptance(drafter, [ScoredText(PROMPT, answer, np.log(target), top, "")], K, Sampling(1.0))
    np.testing.assert_allclose(found.histogram, expected_steps(kept), rtol=1e-4, atol=1e-4)


def test_tokens_that_are_not_cached_can_only_lower_the_figure() -> None:
    target, drafter = build_model("llama", seed=8, num_rows=ROWS), tiny_drafter(9, is_sampled=True)
    for sampling in SAMPLINGS:
        taus = []
        for top_k in (2, 3, 4):
            text = scored(target, [2, 0, 1], top_k=top_k)
            found = estimate_acceptance(drafter, [text], K, sampling)
            taus.append(found.tau)
            assert found.mass_outside_top_k >= -1e-9
        if sampling.top_p == 1:
            assert taus == sorted(taus)
        assert found.mass_outside_top_k == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_not_known_of_the_target_lies_between_its_two_bounds(temperature: float) -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    logprobs = logits.log_softmax(-1).sort(descending=True).values
    true = (logprobs / temperature).softmax(-1).numpy()
    divided_by = (logprobs / temperature).logsumexp(-1).numpy()
    found, log_least = temper(logprobs[:, :6].numpy(), temperature, 40)
    assert (found <= true[:, :6] + 1e-12).all()
    assert (log_least <= divided_by + 1e-12).all()
    if temperature == 1:
        np.testing.assert_allclose(found, true[:, :6])
    else:
        assert (true[:, :6] - found).max() > 0.001
    whole, _ = temper(logprobs.numpy(), temperature, 40)
    np.testing.assert_allclose(whole, true, atol=1e-7)


def enumerate_coins(kept: np.ndarray, place: int = 0) -> np.ndarray:
    """Steps by accepted draft tokens, over every way that the coins may fall."""
    num_tokens, k = kept.shape
    histogram = np.zeros(k + 1)
    if place >= num_tokens:
        return histogram
    most = min(k, num_tokens - place)
    for coins in product([True, False], repeat=most):
        chance = np.prod([kept[place, d] if coin else 1 - kept[place, d] for d, coin in enumerate(coins)])
        accepted = coins.index(False) if False in coins else most
        histogram[accepted] += chance
        histogram += chance * enumerate_coins(kept, place + accepted + 1)
    return histogram


@pytest.mark.parametrize(("num_tokens", "k"), [(1, 3), (4, 1), (5, 3), (3, 6)])
def test_expected_steps_are_those_of_all_ways_that_the_coins_may_fall(num_tokens: int, k: int) -> None:
    kept = np.random.default_rng(num_tokens).random((num_tokens, k))
    found = expected_steps(kept)
    np.testing.assert_allclose(found, enumerate_coins(kept))
    tokens = expected_steps(np.ones((num_tokens, k))).sum()
    assert tokens == -(-num_tokens // (k + 1))


@pytest.mark.parametrize("is_sampled", [True, False])
def test_live_sampling_agrees_within_its_statistical_error(
    is_sampled: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = build_model("qwen2", seed=0)
    drafter = Drafter(noisy(target), tokenizer, is_sampled=is_sampled)
    sampling, limits, number, k = Sampling(0.25, seed=5), Limits(12, frozenset()), 200, 3
    live = decode_batch(target, [PROMPT] * number, limits, drafter=drafter, num_draft_tokens=k, sampling=sampling)
    traces = [Trace(answer.accepted, len(answer.tokens)) for answer in live]
    own = decode_batch(target, [PROMPT] * number, limits, sampling=replace(sampling, seed=6))
    texts = [scored(target, answer.tokens, top_k=300, prompt_id=str(i)) for i, answer in enumerate(own)]
    found = estimate_acceptance(drafter, texts, k, sampling)
    measured = pool(traces, k)
    error = ((measured.tau_high - measured.tau_low) ** 2 + (found.tau_high - found.tau_low) ** 2) ** 0.5 / 3.92
    assert 1.15 < measured.tau < k + 0.5
    assert abs(found.tau - measured.tau) < 3 * error
    assert found.tau_high - found.tau_low < measured.tau_high - measured.tau_low  # the draft's chance is averaged out
    record: dict[str, Any] = found.record()
    assert record["mode"] == "estimate"
    assert record["tau"] == pytest.approx(
        sum((n + 1) * s for n, s in enumerate(record["histogram"])) / record["num_steps"], rel=0.1
    )


def noisy(model: PreTrainedModel) -> PreTrainedModel:
    """A draft that is right now and then."""
    draft = build_model("qwen2", seed=0)
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.005 * torch.randn_like(parameter)
    set_draft_keys(draft.config, 300, 4)
    return draft


def test_at_temperature_0_there_is_nothing_to_estimate() -> None:
    with pytest.raises(ValueError, match="replay is exact"):
        estimate_acceptance(tiny_drafter(9, is_sampled=False), [], K, Sampling())
