"""Live decoding is lossless, alone and in company, whoever drafts; and replay says what it does, step by step."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny import NUM_ROWS, VOCABULARY, build_model, conversations, prefer_mask_token, replay
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.acceptance.counting import count_as_vllm, walk
from pard_train.core.cpu.products import PackedLinear, can_pack
from pard_train.data.chat import ChatEncoder
from pard_train.generation.decoding import Limits, Step, decode, decode_batch, end_ids_of
from pard_train.generation.proposers import Drafter, PromptLookup, Proposer, SequentialDrafter
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import Sampling, probabilities
from pard_train.mask_token import set_draft_keys
from pard_train.vocabulary import add_mask_token

MAX_K = 6


def build_drafter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Drafter:
    """A draft model of given weights, with a fresh mask token."""
    add_mask_token(model, 300)
    set_draft_keys(model.config, 300, 4)
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


def test_a_token_beyond_the_drafts_rows_is_read_as_the_mask_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Qwen2.5-7B has 152,064 rows, its draft's base 151,936."""
    target, drafter = build_model("llama", seed=0, num_rows=448), build_drafter(build_model("llama", seed=1), tokenizer)
    prompt, limits = prompts(tokenizer, 1)[0], Limits(40, frozenset({2}))
    own = texts(list(decode(target, prompt, limits)))
    assert max(own) >= NUM_ROWS
    for method in (drafter, SequentialDrafter(drafter)):
        assert texts(list(decode(target, prompt, limits, drafter=method, num_draft_tokens=3))) == own
    steps = list(decode(target, prompt, limits, drafter=drafter, num_draft_tokens=3))
    assert walk(replay(drafter, prompt, own, 3).tolist(), 3).accepted == [len(step.tokens) - 1 for step in steps]


def test_prompts_of_models_with_windows_are_read_in_parts_and_give_the_same(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gemma3", seed=0)
    drafter, prompt = build_drafter(model, tokenizer), max(prompts(tokenizer, 8), key=len)
    ids, answer = torch.tensor([prompt]), prompt[::-1]
    whole, widths = replay(drafter, prompt, answer, 3), []
    monkeypatch.setattr("pard_train.generation.runner.PREFILL_ROWS", 5)
    monkeypatch.setattr("pard_train.acceptance.chains.MAX_BLOCK_ROWS", 5)
    runner = Runner(model)
    forward = runner.forward
    monkeypatch.setattr(runner, "forward", lambda ids, *rest: widths.append(ids.shape[1]) or forward(ids, *rest))
    found = runner.start(1, len(prompt), width=8, num_logits=4).extend([prompt], [[]], num_logits=3)
    torch.testing.assert_close(found, model(ids, logits_to_keep=3).logits)
    assert max(widths) <= 5 + 3 and sum(widths) == len(prompt)
    assert (replay(drafter, prompt, answer, 3) == whole).all()


@pytest.mark.parametrize("noise", [0.0, 0.02])
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
        right = [step for step in steps[:-1] if step.tokens[0] < VOCABULARY]  # others are never drafted
        assert right
        assert all(step.num_accepted == 1 and len(step.tokens) == 2 for step in right)


def test_replay_in_the_vllm_convention_equals_a_live_run_that_starts_after_the_prefill(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    target = build_model("qwen2", seed=0)
    drafter = build_drafter(perturbed(target, "qwen2", noise=0.02), tokenizer)
    for prompt in prompts(tokenizer, 4):
        answer = texts(list(decode(target, prompt, Limits(40, frozenset()))))
        live = list(decode(target, prompt + answer[:1], Limits(39, frozenset()), drafter=drafter, num_draft_tokens=4))
        matches = replay(drafter, prompt, answer, 4).tolist()
        assert count_as_vllm(matches, 4) == (len(live), sum(step.num_accepted for step in live))


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


@pytest.mark.parametrize("is_sequential", [False, True])
def test_a_mask_token_among_the_tokenizers_entries_is_never_drafted(
    is_sequential: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """As Llama's, which is a reserved special token. The draft's logits prefer it everywhere."""
    model, mask_token_id = prefer_mask_token(build_model("llama", seed=0))
    drafter = Drafter(model, tokenizer)
    assert drafter.mask_token_id == mask_token_id < len(tokenizer)
    proposer = SequentialDrafter(drafter) if is_sequential else drafter
    asked = prompts(tokenizer, 3)
    drafted = proposer.start(3, 200, MAX_K).propose(asked)
    assert [len(tokens) for tokens in drafted] == [MAX_K] * 3
    assert not any(mask_token_id in tokens for tokens in drafted)
    target = build_model("llama", seed=0)  # the same weights, so that at K 1 a draft is always accepted
    steps = list(decode(target, asked[0], Limits(21, frozenset()), drafter=proposer, num_draft_tokens=1))
    assert all(step.num_accepted == 1 for step in steps[:-1])


def test_a_model_without_a_mask_token_is_no_drafter(base_folder: Path) -> None:
    with pytest.raises(ValueError, match="not a parallel draft model"):
        Drafter.load(str(base_folder), dtype=torch.float32, device=torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# Other proposers
# ---------------------------------------------------------------------------------------------------------------------


def proposers(drafter: Drafter) -> list[Proposer]:
    """One of each kind."""
    return [drafter, SequentialDrafter(drafter), PromptLookup()]


def greedy(model: PreTrainedModel, ids: list[int], number: int, drafter: Drafter) -> list[int]:
    """What a draft model says next, one token at a time, without any cache."""
    said: list[int] = []
    for _ in range(number):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + said]), use_cache=False).logits[0, -1]
        said.append(drafter.choose(logits).item())
    return said


def test_the_sequential_draft_is_the_draft_models_own_greedy_text(
    family: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = build_model(family, seed=0)
    drafter = build_drafter(perturbed(target, family, noise=0.05), tokenizer)
    num_accepted = 0
    for prompt in prompts(tokenizer, 2):
        steps = list(
            decode(target, prompt, Limits(24, frozenset()), drafter=SequentialDrafter(drafter), num_draft_tokens=3)
        )
        text, answer = list(prompt), texts(steps)
        for step in steps[:-1]:  # the last one may be cut
            draft = greedy(drafter.model, text, 3, drafter)
            rest = answer[len(text) - len(prompt) :]
            matched = next((i for i, pair in enumerate(zip(draft, rest, strict=False)) if pair[0] != pair[1]), 3)
            assert step.num_accepted == matched
            text += step.tokens
            num_accepted += matched
    assert num_accepted > 0


def look_up(text: list[int], num_draft_tokens: int) -> list[int]:
    """Prompt look-up by search: the last earlier place of the longest end of the text, of at most three tokens."""
    for size in (3, 2, 1):
        for place in range(len(text) - 1, size - 1, -1):
            if len(text) > size and text[place - size : place] == text[-size:]:
                return text[place : place + num_draft_tokens]
    return []


def test_prompt_look_up_follows_the_longest_recent_match() -> None:
    assert look_up([1, 2, 3, 1, 2, 4, 1, 2], 2) == [4, 1]
    draw = random.Random(0)
    for _ in range(50):
        streams = PromptLookup().start(2, 99, 4)
        growing: list[list[int]] = [[], []]
        for _ in range(8):
            for text in growing:
                text += draw.choices(range(4), k=draw.randint(1, 5))
            assert streams.propose([list(text) for text in growing]) == [look_up(text, 4) for text in growing]


# ---------------------------------------------------------------------------------------------------------------------
# Side by side
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4])
def test_answers_decoded_together_are_those_decoded_alone_step_for_step(
    family: str, k: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = build_model(family, seed=0)
    drafter = build_drafter(perturbed(target, family, noise=0.02), tokenizer)
    limits = Limits(25, frozenset(range(40, 60)))  # answers end at different times
    asked = [*prompts(tokenizer, 5), [7], [11, 12]]  # and some prompts are shorter than a draft
    plain = [list(decode(target, prompt, limits)) for prompt in asked]
    assert len({len(steps) for steps in plain}) > 2
    assert [answer.steps for answer in decode_batch(target, asked, limits)] == plain
    for proposer in proposers(drafter):
        alone = [list(decode(target, p, limits, drafter=proposer, num_draft_tokens=k)) for p in asked]
        together = decode_batch(target, asked, limits, drafter=proposer, num_draft_tokens=k)
        assert [answer.steps for answer in together] == alone
        assert [answer.tokens for answer in together] == [texts(steps) for steps in plain]
        assert [answer.accepted for answer in together] == [[step.num_accepted for step in steps] for steps in alone]


def test_nothing_is_decoded_of_no_prompts_and_of_no_room() -> None:
    target = build_model("llama", seed=0)
    assert decode_batch(target, [], Limits(5, frozenset())) == []
    assert [answer.tokens for answer in decode_batch(target, [[1], [2, 3]], Limits(0, frozenset()))] == [[], []]


def test_a_repetition_penalty_of_the_generation_config_plays_no_part(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("qwen2", seed=0)
    prompt, limits = prompts(tokenizer, 1)[0], Limits(20, frozenset())
    own = texts(list(decode(target, prompt, limits)))
    target.generation_config.repetition_penalty = 1.5
    ids = torch.tensor([prompt])
    penalised = target.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert penalised[0, len(prompt) :].tolist() != own
    drafter = build_drafter(perturbed(target, "qwen2", noise=0.02), tokenizer)
    assert texts(list(decode(target, prompt, limits, drafter=drafter, num_draft_tokens=4))) == own


# ---------------------------------------------------------------------------------------------------------------------
# With a temperature
# ---------------------------------------------------------------------------------------------------------------------


def next_probs(target: PreTrainedModel, text: list[int], sampling: Sampling) -> dict[int, float]:
    """Probability of every token that may follow, from the target alone."""
    with torch.inference_mode():
        probs = probabilities(target(torch.tensor([text]), use_cache=False).logits[0, -1], sampling)
    return {token: probs[token].item() for token in probs.nonzero().flatten().tolist()}


def exact_pairs(target: PreTrainedModel, prompt: list[int], sampling: Sampling) -> dict[tuple[int, int], float]:
    """Probability of every pair of first tokens."""
    first = next_probs(target, prompt, sampling)
    return {(x, y): p * q for x, p in first.items() for y, q in next_probs(target, [*prompt, x], sampling).items()}


def kept_share(way: str, target: PreTrainedModel, drafter: Drafter, prompt: list[int], sampling: Sampling) -> float:
    """How often the first draft token is kept: the target's probability of it."""
    p = next_probs(target, prompt, sampling)
    with torch.inference_mode():
        likely = drafter.choose(drafter.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]).item()
    return p.get(prompt[1] if way == "look-up" else likely, 0.0)


@pytest.mark.parametrize("way", ["plain", "parallel", "sequential", "look-up"])
def test_sampled_text_has_the_targets_distribution_whoever_drafts(way: str, tokenizer: PreTrainedTokenizerBase) -> None:
    sampling, number = Sampling(1.3, 0.6, seed=5), 2000
    target = build_model("llama", seed=0)
    drafter = build_drafter(perturbed(target, "llama", noise=0.05), tokenizer)
    ways = {"plain": None, "sequential": SequentialDrafter(drafter), "look-up": PromptLookup()}
    repeating = [[a, token, a] for a in range(5, 15) for token in range(20, 50)]  # look-up proposes the token again
    prompt = max(repeating, key=lambda text: next_probs(target, text, sampling).get(text[1], 0.0))
    found = decode_batch(
        target,
        [prompt] * number,
        Limits(2, frozenset()),
        drafter=ways.get(way, drafter),
        num_draft_tokens=2,
        sampling=sampling,
    )
    if way != "plain":
        share = kept_share(way, target, drafter, prompt, sampling)
        spread = (share * (1 - share) / number) ** 0.5
        assert 0.01 < share < 0.99
        assert abs(sum(answer.accepted[0] > 0 for answer in found) / number - share) < 4 * spread
    expected = exact_pairs(target, prompt, sampling)
    counts = Counter(tuple(answer.tokens) for answer in found)
    assert counts.keys() <= expected.keys()  # nothing outside the nucleus
    rare = [pair for pair, p in expected.items() if p * number < 8]
    cells = [(counts[pair], p * number) for pair, p in expected.items() if pair not in rare]
    cells.append((sum(counts[pair] for pair in rare), sum(expected[pair] for pair in rare) * number))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells if mean > 0)
    freedom = len(cells) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations


def test_sampled_answers_are_the_same_alone_and_in_company(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("qwen3", seed=0)
    drafter = build_drafter(perturbed(target, "qwen3", noise=0.05), tokenizer)
    sampling, limits, asked = Sampling(0.8, 0.9, seed=1), Limits(15, frozenset(range(40, 50))), prompts(tokenizer, 4)
    for proposer in proposers(drafter):
        together = decode_batch(target, asked, limits, drafter=proposer, num_draft_tokens=3, sampling=sampling)
        for prompt, answer in zip(asked, together, strict=True):
            alone = list(decode(target, prompt, limits, drafter=proposer, num_draft_tokens=3, sampling=sampling))
            assert alone == answer.steps
    assert together != decode_batch(target, asked, limits, sampling=Sampling(0.8, 0.9, seed=2))


@pytest.mark.parametrize("configured, found", [(7, {2, 7}), ([5, 7], {2, 5, 7}), (None, {2}), (2, {2})])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_turn_ends_at_every_id_of_the_generation_config_else_of_the_config_and_at_the_tokenizers(
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    file: str,
    configured: object,
    found: set[int],
) -> None:
    folder = shutil.copytree(base_folder, tmp_path / "model")
    (folder / "generation_config.json").unlink()  # which older folders lack
    for name, ends in {"config.json": 9, file: configured}.items():
        content = json.loads((folder / name).read_text()) if name == "config.json" else {}
        (folder / name).write_text(json.dumps(content | {"eos_token_id": ends}))
    assert end_ids_of(str(folder), tokenizer) == found


# ---------------------------------------------------------------------------------------------------------------------
# The runner
# ---------------------------------------------------------------------------------------------------------------------


def check_extending(runner: Runner, model: PreTrainedModel, *, seed: int) -> None:
    """Extend growing texts with extra tokens, some of which are accepted; compare with passes without a cache."""
    draw = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return draw.choices(range(300), k=draw.randint(least, most))

    number = draw.randint(1, 4)
    batch = runner.start(number, 120, width=6, num_logits=4)
    grown, extras = [tokens(1, 12) for _ in range(number)], [tokens(0, 3) for _ in range(number)]
    for _ in range(8):
        logits = batch.extend(grown, extras)
        for row, text, extra in zip(logits, grown, extras, strict=True):
            with torch.inference_mode():
                expected = model(torch.tensor([text + extra]), use_cache=False).logits[0]
            wanted = min(len(row), len(text) + len(extra))
            assert torch.allclose(row[-wanted:], expected[-wanted:], atol=1e-4, rtol=1e-4)
        if len(grown) > 1 and draw.random() < 0.3:
            which = sorted(draw.sample(range(len(grown)), len(grown) - 1))
            batch.keep(which)
            grown, extras = [grown[i] for i in which], [extras[i] for i in which]
        grown = [text + extra[: draw.randint(0, 3)] + tokens(1, 2) for text, extra in zip(grown, extras, strict=True)]
        extras = [tokens(0, 3) for _ in grown]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_in_every_dtype(dtype: torch.dtype) -> None:
    """Without it a product of one row is slower in bfloat16 than in float32, and every speed-up too large."""
    model = build_model("llama", seed=0).to(dtype)
    if not can_pack(model.lm_head.weight):
        pytest.skip("oneDNN cannot pack weights of this type here")
    assert not any(isinstance(module, torch.nn.Linear) for module in Runner(model).model.modules())


@pytest.mark.parametrize("is_packed", [False, True])
def test_extending_a_cached_text_gives_the_logits_of_the_whole_text(family: str, is_packed: bool) -> None:
    model = build_model(family, seed=0)
    if is_packed and not can_pack(model.lm_head.weight):
        pytest.skip("no oneDNN on this machine")
    runner = Runner(model, is_packed=is_packed)
    assert is_packed == any(isinstance(module, PackedLinear) for module in runner.model.modules())
    for seed in range(8):
        check_extending(runner, model, seed=seed)


def test_a_runner_leaves_the_model_as_it_was_and_shares_its_weights() -> None:
    model = build_model("llama", seed=0)
    runner = Runner(model, is_packed=False)
    assert model.config._attn_implementation == "sdpa"
    theirs = dict(runner.model.named_parameters())
    assert all(theirs[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "is_captured", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["static shapes", "compiled"]
)
def test_a_compiled_runner_decodes_the_same(is_captured: bool, tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("llama", seed=0)
    drafter = build_drafter(perturbed(target, "llama", noise=0.02), tokenizer)
    limits = Limits(25, frozenset(range(40, 50)))
    asked = [*prompts(tokenizer, 3), [7], [11, 12]]
    expected = decode_batch(target, asked, limits, drafter=drafter, num_draft_tokens=3)
    drafter.runner = Runner(drafter.model, is_compiled=True)
    with torch.compiler.set_stance("default" if is_captured else "force_eager"):
        runner = Runner(target, is_compiled=True)
        for _ in range(2):  # what the first time left in the cache is masked
            assert decode_batch(runner, asked, limits, drafter=drafter, num_draft_tokens=3) == expected
        if not is_captured:
            for seed in range(8):
                check_extending(runner, target, seed=seed)


def test_a_compiled_runner_makes_room_for_longer_texts_and_forgets_the_ones_before() -> None:
    target, limits = build_model("llama", seed=0), Limits(8, frozenset())
    with torch.compiler.set_stance("force_eager"):
        runner = Runner(target, is_compiled=True)
        for length in (5, 40, 9, 70):  # of equal batches: buffers of 16, 64, 64 and 128 columns
            asked = [[*range(first, first + length)] for first in (4, 90)]
            assert decode_batch(runner, asked, limits) == decode_batch(target, asked, limits)


def test_a_model_in_training_mode_drafts_without_its_dropout(tokenizer: PreTrainedTokenizerBase) -> None:
    trained, sound = (
        build_drafter(build_model("llama", seed=0, attention_dropout=share).train(), tokenizer) for share in (0.5, 0.0)
    )
    asked = prompts(tokenizer, 3)
    logits, expected = (d.runner.start(1, 99, width=1, num_logits=1).extend(asked[:1], [[]]) for d in (trained, sound))
    assert torch.equal(logits, expected)
    assert trained.model.training  # as it was
