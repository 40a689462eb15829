"""Replay of many texts in one pack says what one forward pass per anchor says, and what live decoding does."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, build_model, build_tokenizer, replay
from transformers import PreTrainedTokenizerBase

from pard_train.acceptance.chain_attention import _attend_chains
from pard_train.acceptance.chains import PromptAnswer, pack_texts
from pard_train.acceptance.counting import accepted_by_step, count_as_vllm, walk
from pard_train.acceptance.replay import replay_all
from pard_train.core.attention import IMPLEMENTATIONS
from pard_train.core.scores import Scoring, attend
from pard_train.generation.decoding import Limits, decode
from pard_train.generation.proposers import Drafter
from pard_train.mask_token import set_draft_keys
from pard_train.vocabulary import add_mask_token

MAX_K = 16
MASK = 300


def build_drafter(family: str, tokenizer: PreTrainedTokenizerBase, *, noise: float) -> Drafter:
    """The model of seed 0 with noise on its weights: a draft that is right now and then."""
    model = build_model(family, seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    add_mask_token(model, MASK)
    set_draft_keys(model.config, MASK, 4)
    return Drafter(model, tokenizer)


def parrot(tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """A draft whose answers are long chains: at every slot it says 7, whatever it reads."""
    model = build_model("llama", seed=0, tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1.0
    set_draft_keys(model.config, MASK, 4)
    return Drafter(model, tokenizer)


def target_answer(family: str, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy text of the model of seed 0, whatever it means."""
    target = build_model(family, seed=0)
    return [token for step in decode(target, prompt, Limits(num_tokens, frozenset())) for token in step.tokens]


def ragged_pairs(family: str) -> list[PromptAnswer]:
    """Prompts of 1 to 60 tokens, answers of 1 to 30, some that begin alike, a second turn, one pair twice."""
    draw = random.Random(3)
    system = [draw.randrange(4, VOCABULARY) for _ in range(25)]
    prompts = [[draw.randrange(4, VOCABULARY) for _ in range(draw.randint(1, 60))] for _ in range(6)]
    prompts += [system + prompt[:20] for prompt in prompts] + [[5], [6, 7]]
    pairs = [(prompt, target_answer(family, prompt, draw.randint(1, 30))) for prompt in prompts]
    first_prompt, first_answer = pairs[0]
    second = [*first_prompt, *first_answer, 3, 8, 9]
    pairs += [(second, target_answer(family, second, 12)), pairs[3], ([5], [9]), (prompts[1], pairs[2][1])]
    draw.shuffle(pairs)
    return pairs


def brute_force(drafter: Drafter, pair: PromptAnswer, max_draft_tokens: int) -> list[int]:
    """Matches from one forward pass per anchor: text up to it, then K - 1 mask tokens, as at inference."""
    prompt, answer = pair
    matches = []
    for place in range(len(answer)):
        ids = [*prompt, *answer[:place], *[MASK] * (max_draft_tokens - 1)]
        with torch.no_grad():
            logits = drafter.model(torch.tensor([ids])).logits[0, -max_draft_tokens:]
        drafts = drafter.choose(logits).tolist()
        pairs = list(zip(drafts, answer[place:], strict=False))
        matches.append(next((i for i, (draft, token) in enumerate(pairs) if draft != token), len(pairs)))
    return matches


@contextmanager
def counted_rows(drafter: Drafter) -> Iterator[list[int]]:
    """Rows of every forward pass of the draft model within the context."""
    rows: list[int] = []
    handle = drafter.runner.model.base_model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    yield rows
    handle.remove()


def as_lists(arrays: list[np.ndarray]) -> list[list[int]]:
    """For comparison."""
    return [array.tolist() for array in arrays]


def test_a_pack_gives_every_text_the_matches_of_one_forward_pass_per_anchor(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    drafter, pairs = build_drafter(family, tokenizer, noise=0.02), ragged_pairs(family)
    expected = [brute_force(drafter, pair, MAX_K) for pair in pairs]
    assert max(map(max, expected)) >= 1
    for slot_budget in (1, 150, 8192):
        assert as_lists(replay_all(drafter, pairs, MAX_K, slot_budget=slot_budget)) == expected
    assert [replay(drafter, *pair, MAX_K).tolist() for pair in pairs] == expected


def test_replay_of_a_pack_is_live_decoding_step_by_step_up_to_k_16(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    drafter, target = build_drafter(family, tokenizer, noise=0.02), build_model(family, seed=0)
    pairs = [(prompt, target_answer(family, prompt, 25)) for prompt, _ in ragged_pairs(family)[:4]]
    for k in (1, 5, MAX_K):
        for (prompt, _), matches in zip(pairs, replay_all(drafter, pairs, k), strict=True):
            live = decode(target, prompt, Limits(25, frozenset()), drafter=drafter, num_draft_tokens=k)
            assert walk(matches.tolist(), k).accepted == [step.num_accepted for step in live]


def test_long_chains_match_up_to_k_or_to_the_end_of_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [([5, 6], [7] * 20), ([5, 6, 8], [7] * 3 + [9] + [7] * 20), ([9], [7])]
    found = as_lists(replay_all(parrot(tokenizer), pairs, 16, slot_budget=40))
    assert found[0] == [min(16, 20 - place) for place in range(20)]
    assert found[1] == [3, 2, 1, 0] + [min(16, 20 - place) for place in range(20)]
    assert found[2] == [1]


def test_matches_run_on_into_what_follows_an_answer_only_if_that_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    drafter = parrot(tokenizer)
    assert replay(drafter, [5], [7, 7], 4).tolist() == [2, 1]
    assert replay(drafter, [5], [7, 7], 4, extra_ids=[7, 9, 7]).tolist() == [3, 2]
    assert replay(drafter, [5], [7, 7], 4, extra_ids=[7, 7, 7, 7]).tolist() == [4, 4]
    pairs = [([5], [7, 7]), ([5], [7, 7])]  # equal pairs whose continuations are told apart
    assert as_lists(replay_all(drafter, pairs, 4, extra_ids=[[9], [7, 9]])) == [[2, 1], [3, 2]]
    matches = replay(drafter, [5], [7, 7], 4, extra_ids=[7, 7, 7, 7]).tolist()
    assert walk(matches, 4) == walk([2, 1], 4)  # our own convention counts nothing past the end


def test_vllms_counters_are_exact_where_the_continuation_is_known(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Against a decoder that counts as vLLM does: prefill first, K drafts every step, never clamped near the end."""
    drafter, k, length = build_drafter(family, tokenizer, noise=0.02), 5, 21
    for prompt, _ in ragged_pairs(family)[:8]:
        text = target_answer(family, prompt, length + k)
        accepted, emitted = [], 1
        while emitted < length:
            ids = torch.tensor([[*prompt, *text[:emitted], *[MASK] * (k - 1)]])
            with torch.no_grad():
                proposal = drafter.choose(drafter.model(ids).logits[0, -k:]).tolist()
            matched = next((i for i in range(k) if proposal[i] != text[emitted + i]), k)
            accepted.append(matched)
            emitted += matched + 1
        told = replay(drafter, prompt, text[:length], k, extra_ids=text[length:]).tolist()
        assert accepted_by_step(told, k, num_prefilled=1) == accepted
        assert count_as_vllm(told, k) == (len(accepted), sum(accepted))


def test_only_matching_chains_are_deepened_so_the_slots_are_about_n_tau(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    drafter, pairs = build_drafter(family, tokenizer, noise=0.02), ragged_pairs(family)
    with counted_rows(drafter) as rows:
        matches = replay_all(drafter, pairs, MAX_K)
    # A chain of m matches has m mask slots (the last one shows the first miss), one less at K or at the end.
    at_most = sum(int(m.sum()) for m in matches)
    at_the_end = sum(int((m == np.minimum(MAX_K, len(m) - np.arange(len(m)))).sum()) for m in matches)
    assert sum(rows[1:]) == at_most - at_the_end


def test_tokens_that_texts_share_at_their_beginnings_are_computed_once(tokenizer: PreTrainedTokenizerBase) -> None:
    drafter = build_drafter("qwen2", tokenizer, noise=0.02)
    system = list(range(10, 210))
    pairs = [([*system, 5], [1, 2, 3]), ([*system, 6], [1, 2]), ([*system, 5, 1, 2, 3, 9], [4, 5, 6])]
    with counted_rows(drafter) as rows:
        packed = replay_all(drafter, pairs, 4)
    assert rows[0] == 200 + 3 + 2 + (1 + 1 + 2)  # the third continues where the first stopped
    with counted_rows(drafter) as rows:
        alone = replay_all(drafter, pairs, 4, slot_budget=1)
    for prompt, answer in pairs:
        assert len(prompt) + len(answer) - 1 in rows
    assert as_lists(packed) == as_lists(alone)


def test_packs_hold_the_budget_and_every_answered_text_once() -> None:
    draw = random.Random(0)
    pairs = [([draw.randrange(3) for _ in range(draw.randint(1, 30))], [0] * draw.randint(0, 9)) for _ in range(60)]
    packs = list(pack_texts(pairs, 100))
    assert sorted(text.number for pack in packs for text in pack) == [n for n, pair in enumerate(pairs) if pair[1]]
    assert len(packs) > 3
    for pack in packs:
        slots = np.concatenate([text.slots for text in pack])
        assert sorted(set(slots.tolist())) == list(range(slots.max() + 1))
        assert slots.max() < 100
        tokens: dict[int, tuple[int, ...]] = {}
        for text in pack:  # a slot stands for one beginning, wherever it is used
            for place, slot in enumerate(text.slots.tolist()):
                beginning = tuple(text.ids[: place + 1].tolist())
                assert tokens.setdefault(slot, beginning) == beginning


def test_an_answer_of_no_tokens_has_no_matches(tokenizer: PreTrainedTokenizerBase) -> None:
    drafter = build_drafter("llama", tokenizer, noise=0.02)
    assert as_lists(replay_all(drafter, [([5, 6], []), ([5, 6], [7])], 4))[0] == []
    assert replay_all(drafter, [], 4) == []


@pytest.mark.parametrize("form", sorted(IMPLEMENTATIONS))
def test_a_model_loaded_with_any_attention_replays_alike_and_keeps_it(
    form: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    drafter, pairs = build_drafter("qwen3", tokenizer, noise=0.02), ragged_pairs("qwen3")[:5]
    expected = as_lists(replay_all(drafter, pairs, 6))
    drafter.model.set_attn_implementation(IMPLEMENTATIONS[form])
    assert as_lists(replay_all(drafter, pairs, 6)) == expected
    assert drafter.model.config._attn_implementation == IMPLEMENTATIONS[form]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_the_cpu_does(family: str) -> None:
    drafter, pairs = build_drafter(family, build_tokenizer(), noise=0.02), ragged_pairs(family)
    expected = as_lists(replay_all(drafter, pairs, MAX_K))
    drafter = Drafter(drafter.model.to("cuda"), drafter.tokenizer)
    assert as_lists(replay_all(drafter, pairs, MAX_K, slot_budget=150)) == expected


@pytest.mark.parametrize("how", [Scoring(), Scoring(softcap=50.0)], ids=["plain", "capped"])
def test_products_beyond_the_range_of_float16_are_scaled_before(how: Scoring) -> None:
    rows, text, own = torch.full((1, 2, 1, 64), 40.0), torch.full((1, 3, 64), 40.0), torch.full((1, 2, 1, 64), 40.0)
    rows, text, own = rows.half(), text.half(), own.half()  # products of 102,400
    found = _attend_chains(rows, (text, text), (own, own), torch.ones(2, 3, dtype=torch.bool), how)
    assert torch.equal(found, rows)
    assert torch.equal(attend(rows, own, own, how), rows)
