"""Replay of sampled answers estimates what exact enumeration and live sampling say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import ClassVar

import pytest
import torch
from tiny import build_model, replay
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.acceptance.counting import Trace, pool, walk
from pard_train.generation.decoding import Limits, decode_batch
from pard_train.generation.proposers import Drafter
from pard_train.generation.sampling import Sampling, probabilities
from pard_train.mask_token import set_draft_keys

WORDS, MASK, ROWS = 4, 5, 6  # a vocabulary that can be enumerated
LENGTH, K = 3, 2
PROMPT = [1, 3, 0]


class FourWords:
    """All that a drafter asks of a tokenizer: which tokens there are."""

    added_tokens_decoder: ClassVar[dict[int, str]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(WORDS)}


def tiny_drafter(seed: int) -> Drafter:
    """A draft model of four words."""
    model = build_model("llama", seed=seed, num_rows=ROWS)
    set_draft_keys(model.config, MASK, K)
    return Drafter(model, FourWords())  # type: ignore[arg-type]


@torch.no_grad()
def target_probs(target: PreTrainedModel, text: list[int], sampling: Sampling) -> Tensor:
    """What the target draws the next token from, [WORDS]."""
    return probabilities(target(torch.tensor([text])).logits[0, -1, :WORDS], sampling).double()


@torch.no_grad()
def drafted(drafter: Drafter, text: list[int]) -> list[int]:
    """K draft tokens by a plain forward pass."""
    return drafter.choose(drafter.model(torch.tensor([text + [MASK] * (K - 1)])).logits[0, -K:]).tolist()


def enumerated_steps(target: PreTrainedModel, drafter: Drafter, sampling: Sampling) -> float:
    """Expected steps of speculative sampling of LENGTH tokens, over everything that chance may do."""

    @cache
    def own(text: tuple[int, ...]) -> Tensor:
        return target_probs(target, [*PROMPT, *text], sampling)

    @cache
    def steps(emitted: tuple[int, ...]) -> float:
        return 1.0 + after(emitted, drafted(drafter, [*PROMPT, *emitted])) if len(emitted) < LENGTH else 0.0

    def after(emitted: tuple[int, ...], draft: list[int], depth: int = 0) -> float:
        """Expected further steps once the first `depth` tokens of a draft are kept."""
        text = (*emitted, *draft[:depth])
        if len(text) >= LENGTH:
            return 0.0
        p = own(text)
        if depth == K:
            return sum(float(p[x]) * steps((*text, x)) for x in range(WORDS) if p[x] > 0)
        keep = float(p[draft[depth]])  # else another token is drawn in its place
        total = keep * after(emitted, draft, depth + 1) if keep else 0.0
        return total + sum(float(p[x]) * steps((*text, x)) for x in range(WORDS) if p[x] > 0 and x != draft[depth])

    return steps(())


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
def test_along_the_targets_own_samples_the_estimate_is_exact_on_average(sampling: Sampling) -> None:
    target, drafter = build_model("llama", seed=8, num_rows=ROWS), tiny_drafter(9)

    def steps(answer: list[int]) -> float:
        return len(walk(replay(drafter, PROMPT, answer, K).tolist(), K).accepted)

    exact = enumerated_steps(target, drafter, sampling)
    assert 1.2 < exact < LENGTH - 0.2
    assert averaged_over_texts(target, sampling, steps) == pytest.approx(exact, rel=1e-5)


def test_live_sampling_agrees_within_its_statistical_error(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("qwen2", seed=0)
    drafter = Drafter(noisy(target), tokenizer)
    sampling, limits, number, k = Sampling(0.25, seed=5), Limits(12, frozenset()), 200, 3
    live = decode_batch(target, [PROMPT] * number, limits, drafter=drafter, num_draft_tokens=k, sampling=sampling)
    own = decode_batch(target, [PROMPT] * number, limits, sampling=replace(sampling, seed=6))
    measured = pool([Trace(answer.accepted, len(answer.tokens)) for answer in live], k)
    found = pool([walk(replay(drafter, PROMPT, answer.tokens, k).tolist(), k) for answer in own], k)
    error = ((measured.tau_high - measured.tau_low) ** 2 + (found.tau_high - found.tau_low) ** 2) ** 0.5 / 3.92
    assert 1.15 < measured.tau < k + 0.5
    assert abs(found.tau - measured.tau) < 3 * error


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
