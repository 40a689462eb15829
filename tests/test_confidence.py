"""Confidence of a draft: its probabilities are those of plain forward passes, its steps those of replay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from confidence import draft_everywhere, reliability, seconds_per_token, steps_in_our_decoder, steps_in_vllm
from test_decoding import build_drafter, perturbed, prompts
from tiny import build_model
from transformers import PreTrainedTokenizerBase

from pard_train.acceptance.replay import replay_all
from pard_train.evaluation.speed import Latencies
from pard_train.generation.decoding import Limits, decode

K = 4


def test_probabilities_are_those_of_a_plain_forward_pass_and_matches_those_of_replay(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    target = build_model("qwen2", seed=0)
    drafter = build_drafter(perturbed(target, "qwen2", noise=0.02), tokenizer)
    limits = Limits(16, frozenset())
    pairs = [(p, [t for step in decode(target, p, limits) for t in step.tokens]) for p in prompts(tokenizer, 3)]
    probs, matches = draft_everywhere(drafter, pairs, K)
    for found, own in zip(replay_all(drafter, pairs, K), matches, strict=True):
        assert found.tolist() == np.cumprod(own, axis=1).sum(axis=1).tolist()
    prompt, answer = pairs[1]
    for place in (0, 5, 11):
        text = prompt + answer[:place]
        with torch.inference_mode():
            logits = drafter.model(torch.tensor([text + [drafter.mask_token_id] * (K - 1)])).logits[0, len(text) - 1 :]
        expected = drafter.mask_non_tokens(logits).softmax(dim=-1)
        assert probs[1][place] == pytest.approx(expected.amax(dim=-1).numpy(), rel=1e-3)
        assert (
            matches[1][place].tolist() == (expected.argmax(dim=-1) == torch.tensor(answer[place : place + K])).tolist()
        )


def test_a_step_verifies_up_to_the_first_unsure_token_and_costs_what_its_k_costs() -> None:
    stored = {
        "seconds": {"0": {"1": 1.0}, "1": {"1": 1.0}, "3": {"1": 3.0}},
        "prefill_seconds": {},
        "prefill_tokens": 1,
    }
    times = steps_in_vllm({"step_times": stored})
    probs = [np.array([[0.9, 0.9, 0.9]] * 2 + [[0.9, 0.1, 0.9]] * 4)]
    matches = [np.array([[True, True, False]] * 6)]
    # From token 1 on: three tokens for 3 s at the first place; then, from place 4, of one sure token it is one of 1 s.
    fixed = seconds_per_token(probs, matches, times, 1, most=3, threshold=0.0)
    assert fixed == pytest.approx((3.0 + 3.0) / (3 + 3))
    assert seconds_per_token(probs, matches, times, 1, most=3, threshold=0.5) == pytest.approx((3.0 + 1.0) / (3 + 2))


def test_in_our_decoder_a_stop_saves_verification_and_no_draft_pass() -> None:
    steps = steps_in_our_decoder({1: Latencies(1, 9, "cpu", 1.0, {1: 0.5, 3: 0.7}, {1: 2.0, 3: 4.0})}, cost=8)
    assert [steps.seconds(3, verified, 1) for verified in (3, 2, 0)] == pytest.approx([0.7 + 8 * c for c in (4, 3, 1)])
    assert steps.seconds(2, 1, 1) == pytest.approx(0.6 + 8 * 2.0)
    assert (steps.values_of_k, steps.sizes) == ([1, 2, 3], [1])


def test_reliability_counts_only_positions_whose_chain_was_accepted_so_far() -> None:
    probs = np.full((60, 2), 0.8)
    matches = np.array([[True, True]] * 30 + [[False, True]] * 15 + [[True, False]] * 15)
    rows = list(reliability(probs, matches))
    assert rows[0] == ["draft's probability", "position 1", "position 2"]
    assert rows[5] == ["0.7 to 0.9", "0.75 of 60", "0.67 of 45"]
    assert rows[-1][1:] == ["0.05", "0.13"]
