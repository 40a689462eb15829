"""Drafts inside Transformers' own `generate` change how fast a text comes, never the text."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_ROWS, VOCABULARY, build_model, conversations, prefer_mask_token
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    dynamic_module_utils,
)
from transformers import __version__ as transformers_version

from pard_train.data.chat import ChatEncoder
from pard_train.engines import candidates
from pard_train.engines.candidates import Draft, PardCandidates, StopRule, generate, write_custom_generate
from pard_train.generation.decoding import Limits, decode
from pard_train.generation.proposers import Drafter
from pard_train.mask_token import set_draft_keys
from pard_train.vocabulary import add_mask_token

MASK = 300


class Blocks:
    """A streamer that keeps the blocks that were put into it, the prompt first."""

    def __init__(self) -> None:
        self.blocks: list[list[int]] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.blocks.append(value.flatten().tolist())

    def end(self) -> None:
        self.has_ended = True


class StopsAtMultiplesOf(StoppingCriteria):
    """Ends a text at the first new token whose id is a multiple of a number."""

    def __init__(self, number: int, num_prompt_tokens: int):
        self.number, self.num_prompt_tokens = number, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self.num_prompt_tokens :]
        return (new % self.number == 0).any(dim=1)


def build_draft(family: str, *, noise: float, num_rows: int = NUM_ROWS) -> PreTrainedModel:
    """A draft of the target with seed 0: the same weights with noise, and a mask token."""
    draft = build_model(family, seed=0, num_rows=num_rows)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * torch.randn_like(parameter)
    add_mask_token(draft, MASK)
    set_draft_keys(draft.config, MASK, 4)
    return draft


def prompts(tokenizer: PreTrainedTokenizerBase, number: int) -> list[Tensor]:
    """Rendered first questions, each int64 [1, N]."""
    encoder = ChatEncoder(tokenizer)
    return [torch.tensor([encoder.encode_prompt(chat[:1])]) for chat in conversations(number, seed=9)]


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """An exported draft with the file that `custom_generate` looks for."""
    folder = tmp_path_factory.mktemp("exports") / "pard-tiny-0.5"
    build_draft("qwen2", noise=0.02).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_custom_generate(folder)
    return folder


@pytest.mark.parametrize("noise", [0.0, 0.02, 1.0])
def test_greedy_text_and_its_blocks_are_those_of_live_decoding_for_any_draft_and_k(
    family: str, noise: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    target, draft = build_model(family, seed=0), build_draft(family, noise=noise)
    drafter = Drafter(draft, tokenizer)
    end_ids = [2, 40, 41, 42, 43, 44]
    for prompt in prompts(tokenizer, 2):
        settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": end_ids, "pad_token_id": 0}
        own = target.generate(prompt, **settings)
        for k in (1, 2, 5, 12):
            streamer = Blocks()
            drafted = generate(
                target,
                prompt,
                draft_model=draft,
                num_draft_tokens=k,
                tokenizer=tokenizer,
                streamer=streamer,
                **settings,
            )
            assert torch.equal(drafted, own)
            limits = Limits(30, frozenset(end_ids))
            steps = decode(target, prompt[0].tolist(), limits, drafter=drafter, num_draft_tokens=k)
            assert streamer.blocks == [prompt[0].tolist(), *(step.tokens for step in steps)]
            assert streamer.has_ended


def test_some_drafts_are_accepted(tokenizer: PreTrainedTokenizerBase) -> None:
    streamer = Blocks()
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.0)
    generate(target, prompts(tokenizer, 1)[0], draft_model=draft, max_new_tokens=20, do_sample=False, streamer=streamer)
    assert max(len(block) for block in streamer.blocks[1:]) > 1


def test_every_length_limit_is_kept_to_the_token(tokenizer: PreTrainedTokenizerBase) -> None:
    target, draft = build_model("llama", seed=0), build_draft("llama", noise=0.0)
    prompt = prompts(tokenizer, 1)[0]
    for number in range(1, 9):
        own = target.generate(prompt, max_new_tokens=number, do_sample=False, eos_token_id=None)
        for limit in ({"max_new_tokens": number}, {"max_length": prompt.shape[1] + number}):
            assert torch.equal(
                generate(target, prompt, draft_model=draft, do_sample=False, eos_token_id=None, **limit), own
            )


def test_candidates_leave_the_last_token_of_a_text_to_the_target() -> None:
    stop = StopRule(12, frozenset({7}), StoppingCriteriaList([StopsAtMultiplesOf(11, 3)]))
    text = torch.tensor([[1, 5, 9]])
    assert stop.cut(text, [4, 7, 8]) == [4]
    assert stop.cut(text, [4, 22, 7]) == [4]
    assert stop.cut(text, [4, 8, 6]) == [4, 8, 6]
    draft = Draft(build_draft("qwen2", noise=0.0), MASK, VOCABULARY)
    proposed, _ = PardCandidates(draft, 20, StopRule(12, frozenset(), StoppingCriteriaList()), None).get_candidates(
        text
    )
    assert proposed.shape[1] == 11


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_stopping_criteria_and_stop_strings_end_the_text_where_they_end_the_targets_own(
    noise: float, tokenizer: PreTrainedTokenizerBase
) -> None:
    target, draft = build_model("qwen3", seed=0), build_draft("qwen3", noise=noise)
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    num_stopped = 0
    for prompt in prompts(tokenizer, 3):
        for number in (5, 11, 23):
            criteria = StoppingCriteriaList([StopsAtMultiplesOf(number, prompt.shape[1])])
            own = target.generate(prompt, stopping_criteria=criteria, **settings)
            assert torch.equal(generate(target, prompt, draft_model=draft, stopping_criteria=criteria, **settings), own)
            num_stopped += own.shape[1] < prompt.shape[1] + 40
        free = target.generate(prompt, **settings)[0, prompt.shape[1] :]
        string = tokenizer.decode(free[9:11])
        own = target.generate(prompt, stop_strings=string, tokenizer=tokenizer, **settings)
        drafted = generate(target, prompt, draft_model=draft, stop_strings=string, tokenizer=tokenizer, **settings)
        assert torch.equal(drafted, own)
    assert num_stopped > 3


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 25},
        {"bad_words_ids": [[117], [150, 117]]},
        {"forced_eos_token_id": 2},
    ],
    ids=lambda processors: next(iter(processors)),
)
def test_text_with_logits_processors_is_the_targets_own(
    processors: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.02)
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": [2, 7], "pad_token_id": 0, **processors}
    for prompt in prompts(tokenizer, 3):
        assert torch.equal(generate(target, prompt, draft_model=draft, **settings), target.generate(prompt, **settings))


def test_scores_come_back_as_from_the_targets_own_generate(tokenizer: PreTrainedTokenizerBase) -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.02)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    prompt = prompts(tokenizer, 1)[0]
    own, drafted = target.generate(prompt, **settings), generate(target, prompt, draft_model=draft, **settings)
    assert torch.equal(drafted.sequences, own.sequences)
    torch.testing.assert_close(torch.stack(drafted.scores), torch.stack(own.scores))


def exact_probabilities(
    target: PreTrainedModel, prompt: list[int], length: int, top_k: int
) -> dict[tuple[int, ...], float]:
    """Probability of every text of `length` tokens under top-k sampling, by enumeration."""
    if length == 0:
        return {(): 1.0}
    logits = target(torch.tensor([prompt])).logits[0, -1]
    values, tokens = logits.topk(top_k)
    return {
        (token, *rest): share * probability
        for token, share in zip(tokens.tolist(), values.softmax(dim=-1).tolist(), strict=True)
        for rest, probability in exact_probabilities(target, [*prompt, token], length - 1, top_k).items()
    }


@torch.inference_mode()
def test_sampled_texts_have_the_targets_distribution(tokenizer: PreTrainedTokenizerBase) -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.0)
    prompt = prompts(tokenizer, 1)[0]
    expected = exact_probabilities(target, prompt[0].tolist(), 3, top_k=2)
    counts, num_samples, num_long = dict.fromkeys(expected, 0), 300, 0
    torch.manual_seed(0)
    for _ in range(num_samples):
        streamer = Blocks()
        text = generate(
            target,
            prompt,
            draft_model=draft,
            num_draft_tokens=4,
            streamer=streamer,
            generation_config=GenerationConfig(max_new_tokens=3, do_sample=True, top_k=2, pad_token_id=0),
        )
        counts[tuple(text[0, prompt.shape[1] :].tolist())] += 1
        num_long += len(streamer.blocks[1]) > 1
    chi_square = sum((counts[text] - num_samples * p) ** 2 / (num_samples * p) for text, p in expected.items())
    assert chi_square < 24.3  # 7 degrees of freedom, one chance in a thousand
    assert 0 < num_long < num_samples


@pytest.mark.parametrize("num_rows", [310, 352])
def test_draft_and_target_may_have_vocabularies_of_different_size(
    num_rows: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.02, num_rows=num_rows)
    for prompt in [*prompts(tokenizer, 2), torch.tensor([[1, 315, 7, 319]])]:
        settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(generate(target, prompt, draft_model=draft, **settings), target.generate(prompt, **settings))


def test_a_draft_never_proposes_its_mask_token_or_an_unused_row() -> None:
    model = build_model("llama", seed=0, tied=False)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 100
    starts = range(0, 250, 5)
    proposed = [Draft(model, 3, VOCABULARY).propose([*range(i, i + 5)], new_cache(model), 4) for i in starts]
    assert max(map(max, proposed)) < VOCABULARY
    assert max(Draft(model, 3, NUM_ROWS).propose([5, 6], new_cache(model), 4)) >= VOCABULARY  # the rows are tempting
    model, mask_token_id = prefer_mask_token(build_model("llama", seed=0))  # so is this token, everywhere
    for num_tokens in (VOCABULARY, NUM_ROWS):
        assert mask_token_id not in Draft(model, mask_token_id, num_tokens).propose([5, 6], new_cache(model), 4)


def test_a_draft_whose_logits_prefer_its_mask_token_is_accepted_like_another(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    target, (draft, _) = build_model("llama", seed=0), prefer_mask_token(build_model("llama", seed=0))
    prompt, streamer = prompts(tokenizer, 1)[0], Blocks()
    settings = {"max_new_tokens": 21, "do_sample": False, "eos_token_id": None, "streamer": streamer}
    generate(target, prompt, draft_model=draft, num_draft_tokens=1, tokenizer=tokenizer, **settings)
    assert [len(block) for block in streamer.blocks[1:]] == [2] * 10 + [1]  # the same weights: all is accepted


def new_cache(model: PreTrainedModel) -> Any:
    """An empty cache."""
    return candidates.DynamicCache(config=model.config)


def test_a_padded_prompt_gives_the_text_and_blocks_of_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.0)
    prompt = prompts(tokenizer, 1)[0]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 4).long()[None]
    plain, streamer = Blocks(), Blocks()
    settings = {"draft_model": draft, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    generate(target, prompt, streamer=plain, **settings)
    generate(target, input_ids=padded, attention_mask=mask, streamer=streamer, **settings)
    assert streamer.blocks[1:] == plain.blocks[1:]


def test_an_exported_folder_serves_itself_without_pard_train(
    draft_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = draft_folder / "custom_generate" / "generate.py"
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    target, prompt = build_model("qwen2", seed=0), prompts(tokenizer, 1)[0]
    streamer = Blocks()
    settings = {"max_new_tokens": 20, "do_sample": False, "streamer": streamer}
    drafted = target.generate(
        prompt, custom_generate=str(draft_folder), trust_remote_code=True, draft_model=str(draft_folder), **settings
    )
    assert torch.equal(drafted, target.generate(prompt, max_new_tokens=20, do_sample=False))
    assert len(streamer.blocks) < 21 and streamer.has_ended


def test_a_draft_given_as_a_folder_is_loaded_once_and_knows_its_unused_rows(
    draft_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    target, prompt = build_model("qwen2", seed=0), prompts(tokenizer, 1)[0]
    candidates._load.cache_clear()
    for _ in range(3):
        generate(target, prompt, draft_model=draft_folder, max_new_tokens=4)
    assert candidates._load.cache_info().misses == 1
    assert candidates._prepare(target, draft_folder, 4, None).num_tokens == VOCABULARY


def test_a_draft_that_brought_its_own_generate_writes_text_by_itself_too(
    draft_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    settings = {"input_ids": prompts(tokenizer, 1)[0], "max_new_tokens": 8, "do_sample": False}
    trusted = AutoModelForCausalLM.from_pretrained(draft_folder, trust_remote_code=True)
    own = AutoModelForCausalLM.from_pretrained(draft_folder).generate(**settings)
    assert torch.equal(trusted.generate(**settings), own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_model": None}, "draft_model is not set"),
        ({"num_draft_tokens": 0}, "num_draft_tokens=0: must be at least 1"),
        ({"num_beams": 2}, "not beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "not assisted_generation"),
        ({"do_sample": True, "num_return_sequences": 2}, "2 texts at once"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"use_cache": False}, "cache must start empty"),
        ({"stop_strings": "a"}, "stop_strings need tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_drafts_cannot_serve_is_refused(settings: dict[str, Any], message: str) -> None:
    target = build_model("qwen2", seed=0)
    arguments = {"draft_model": build_draft("qwen2", noise=0.0), "max_new_tokens": 4, "do_sample": False, **settings}
    with pytest.raises(ValueError, match=message):
        generate(target, torch.tensor([[1, 5, 9]]), **arguments)


def test_a_filled_cache_is_refused_because_assisted_decoding_would_read_its_text_twice() -> None:
    target, draft = build_model("qwen2", seed=0), build_draft("qwen2", noise=0.0)
    cache = new_cache(target)
    name = candidates._cache_argument(target)
    text = target.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False, **{name: cache})
    with pytest.raises(ValueError, match="cache must start empty"):
        generate(target, text, draft_model=draft, max_new_tokens=4, **{name: cache})


def test_an_assistant_or_an_ordinary_model_is_no_draft() -> None:
    target = build_model("qwen2", seed=0)
    prompt = torch.tensor([[1, 5, 9]])
    with pytest.raises(ValueError, match=r"qwen2 .*found neither"):
        generate(target, prompt, draft_model=build_model("qwen2", seed=1), max_new_tokens=4)
    with pytest.raises(ValueError, match="give draft_model only"):
        generate(target, prompt, draft_model=build_draft("qwen2", noise=0.0), assistant_model=target, max_new_tokens=4)


@pytest.mark.parametrize("name", ["_assisted_decoding", "_get_candidate_generator"])
def test_a_transformers_without_the_private_hooks_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(GenerationMixin, name)
    with pytest.raises(ValueError, match=f"transformers {transformers_version} .*GenerationMixin.{name}"):
        generate(build_model("qwen2", seed=0), torch.tensor([[1]]), draft_model=build_draft("qwen2", noise=0.0))
