"""Live decoding is lossless, and replay says what it does, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import build_model, conversations
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.acceptance import walk, walk_as_vllm
from pard_train.chat import ChatEncoder
from pard_train.decoding import Drafter, Limits, Step, decode
from pard_train.model import add_mask_token, set_draft_keys
from pard_train.replay import replay

MAX_K = 6


def build_drafter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """A draft model of given weights, with a fresh mask token."""
    add_mask_token(model, 300)
    set_draft_keys(model, 300, 4)
    return Drafter(model, tokenizer)


def perturbed(model: PreTrainedModel, family: str, *, noise: float) -> PreTrainedModel:
    """The same model with noise on its weights: a draft that is right now and then."""
    other = build_model(family, seed=0)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += noise * torch.randn_like(parameter)
    return other


def prompts(tokenizer: PreTrainedTokenizerBase, number: int) -> list[list[int]]:
    """Rendered first questions."""
    encoder = ChatEncoder(tokenizer)
    return [encoder.encode_prompt(chat[:1]) for chat in conversations(number, seed=9)]


def texts(steps: list[Step]) -> list[int]:
    """Tokens of all steps."""
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
def test_speculative_greedy_text_is_the_targets_own_for_any_draft(
    family: str, noise: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = build_model(family, seed=0)
    drafter = build_drafter(perturbed(target, family, noise=noise), tokenizer)
    limits = Limits(40, frozenset({2}))
    for prompt in prompts(tokenizer, 4):
        own = target.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert texts(list(decode(target, prompt, limits))) == own
        for k in (1, 2, MAX_K):
            assert texts(list(decode(target, prompt, limits, drafter=drafter, num_draft_tokens=k))) == own


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_replay_equals_live_decoding_step_for_step_for_every_k(
    family: str, noise: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = build_model(family, seed=0)
    drafter = build_drafter(perturbed(target, family, noise=noise), tokenizer)
    accepted_somewhere = 0
    for prompt in prompts(tokenizer, 4):
        for limits in (Limits(30, frozenset({2})), Limits(30, frozenset(range(40, 60)))):  # by length; by many end ids
            answer = texts(list(decode(target, prompt, limits)))
            matches = replay(drafter, prompt, answer, MAX_K).tolist()
            for k in range(1, MAX_K + 1):
                live = list(decode(target, prompt, limits, drafter=drafter, num_draft_tokens=k))
                assert walk(matches, k).accepted == [step.num_accepted for step in live]
                accepted_somewhere += sum(step.num_accepted for step in live)
    assert accepted_somewhere > 0


def test_a_draft_equal_to_the_target_accepts_everything_at_k_1(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model(family, seed=0)
    drafter = build_drafter(perturbed(target, family, noise=0.0), tokenizer)
    for prompt in prompts(tokenizer, 3):
        steps = list(decode(target, prompt, Limits(21, frozenset({2})), drafter=drafter, num_draft_tokens=1))
        assert all(step.num_accepted == 1 for step in steps[:-1])
        assert all(len(step.tokens) == 2 for step in steps[:-1])


def test_replay_in_the_vllm_convention_equals_a_live_run_that_starts_after_the_prefill(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    target = build_model("qwen2", seed=0)
    drafter = build_drafter(perturbed(target, "qwen2", noise=0.02), tokenizer)
    for prompt in prompts(tokenizer, 4):
        answer = texts(list(decode(target, prompt, Limits(40, frozenset()))))
        live = list(decode(target, prompt + answer[:1], Limits(39, frozenset()), drafter=drafter, num_draft_tokens=4))
        matches = replay(drafter, prompt, answer, 4).tolist()
        assert walk_as_vllm(matches, 4) == (len(live), sum(step.num_accepted for step in live))


def test_every_end_id_ends_an_answer_and_nothing_counts_after_it(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("llama", seed=0)
    prompt = prompts(tokenizer, 1)[0]
    free = texts(list(decode(target, prompt, Limits(20, frozenset()))))
    for end_id in (free[3], free[7]):
        first = free.index(end_id)
        ended = texts(list(decode(target, prompt, Limits(20, frozenset({end_id, 299})))))
        assert ended == free[: first + 1]


def test_a_drafter_never_proposes_its_mask_token_or_a_padded_row(tokenizer: PreTrainedTokenizerBase) -> None:
    drafter = build_drafter(build_model("llama", seed=0), tokenizer)
    logits = torch.zeros(5, 320)
    logits[:, 300:] = 9.0
    logits[torch.arange(5), torch.arange(5) + 10] = 1.0
    assert drafter.choose(logits).tolist() == [10, 11, 12, 13, 14]


def test_a_model_without_a_mask_token_is_no_drafter(base_folder: Path) -> None:
    with pytest.raises(ValueError, match="not a parallel draft model"):
        Drafter.load(str(base_folder), dtype=torch.float32, device=torch.device("cpu"))
