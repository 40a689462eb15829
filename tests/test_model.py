"""A base model becomes an untrained draft: a checked mask token, a row that never wins, and nothing else changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import NUM_ROWS, VOCABULARY, build_model, build_tokenizer
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.config import DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.mask_token import choose_mask_token, mask_token_of
from pard_train.model import (
    check_same_tokenizer,
    inspect_base,
    load_causal_lm,
    load_config,
    load_tokenizer,
    write_initial_draft,
)
from pard_train.vocabulary import add_mask_token, replace_vocabulary, resize_vocabulary, vocabulary_tensors

MASK = VOCABULARY  # the first spare row
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def hidden_states() -> torch.Tensor:
    """Random final hidden states, and a few that point one way."""
    torch.manual_seed(0)
    return torch.cat([torch.randn(2000, 64), torch.ones(1, 64), -torch.ones(1, 64)])


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the embedding itself."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def keys_of(folder: Path) -> dict[str, Any]:
    """A model folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def write_draft(base: Path, folder: Path, **draft: Any) -> dict[str, Any]:
    """Write an untrained draft and give its config.json."""
    settings = DraftConfig(**draft)
    write_initial_draft(inspect_base(ModelConfig(path=str(base)), settings), settings.num_draft_tokens, folder)
    return keys_of(folder)


@pytest.fixture(scope="module")
def reserved() -> PreTrainedTokenizerBase:
    """A tokenizer with a special token that has no role, as Llama 3 reserves them, at id VOCABULARY."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<|reserved|>", special=True, normalized=False)])
    return tokenizer


@pytest.mark.parametrize(
    "num_rows, choice, expected",
    [
        (NUM_ROWS, {}, VOCABULARY + 1),  # as Qwen2.5: the first row that no entry uses
        (VOCABULARY + 1, {}, VOCABULARY + 1),  # no spare row: one to be appended
        (NUM_ROWS, {"mask_token_id": NUM_ROWS - 1}, NUM_ROWS - 1),
        (VOCABULARY + 1, {"mask_token_id": VOCABULARY + 1}, VOCABULARY + 1),
        (VOCABULARY + 1, {"mask_token": "<|reserved|>"}, VOCABULARY),
    ],
)
def test_the_mask_token_is_a_row_that_no_text_can_ask_for(
    reserved: PreTrainedTokenizerBase, num_rows: int, choice: dict[str, Any], expected: int
) -> None:
    assert choose_mask_token(reserved, num_rows, DraftConfig(**choice)) == expected


@pytest.mark.parametrize(
    "num_rows, choice, reason",
    [
        (
            NUM_ROWS,
            {"mask_token_id": 5},
            r"mask_token_id=5 is the token '.', which the tokenizer can .* are 301\.\.319",
        ),
        (NUM_ROWS, {"mask_token_id": 2}, r"is the token '<\|im_end\|>'"),
        (NUM_ROWS, {"mask_token_id": VOCABULARY}, r"is the token '<\|reserved\|>'.*by name in draft\.mask_token"),
        (NUM_ROWS, {"mask_token_id": NUM_ROWS}, r"outside the vocabulary of 320 rows.*301\.\.319"),
        (VOCABULARY + 1, {"mask_token_id": 400}, r"outside the vocabulary of 301 rows.*301 \(a row to be appended\)"),
        (NUM_ROWS, {"mask_token": "cat"}, "'cat' must be a special token with a row and no role"),
        (VOCABULARY, {"mask_token": "<|reserved|>"}, "must be a special token with a row and no role"),
        (VOCABULARY, {}, r"the row to append, 300, is the tokenizer's '<\|reserved\|>': give draft\.mask_token"),
        (NUM_ROWS, {"mask_token": "<|nowhere|>"}, "must be a special token with a row and no role"),
        (NUM_ROWS, {"mask_token": "<|im_end|>"}, "must be a special token with a row and no role"),
        (NUM_ROWS, {"mask_token": "<|endoftext|>"}, "must be a special token with a row and no role"),
    ],
)
def test_a_mask_token_that_text_can_contain_is_refused(
    reserved: PreTrainedTokenizerBase, num_rows: int, choice: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        choose_mask_token(reserved, num_rows, DraftConfig(**choice))


@TIED
def test_a_new_mask_row_is_the_mean_of_the_others_and_never_wins(family: str, tied: bool) -> None:
    model = build_model(family, seed=4, tied=tied)
    before = [tensor.detach().clone() for tensor in vocabulary_tensors(model)]
    add_mask_token(model, MASK)
    assert is_tied(model) == tied
    assert len(vocabulary_tensors(model)) == (1 if tied else 2)
    others = torch.arange(NUM_ROWS) != MASK
    for old, new in zip(before, vocabulary_tensors(model), strict=True):
        assert torch.equal(old[others], new[others])
        torch.testing.assert_close(new[MASK], old[others].mean(dim=0))
    winners = model.get_output_embeddings()(hidden_states()).argmax(dim=-1)
    assert (winners != MASK).all()


@TIED
@pytest.mark.parametrize("num_new", [1, 37])
def test_appended_rows_are_the_mean_and_never_win(family: str, tied: bool, num_new: int) -> None:
    model = build_model(family, seed=5, tied=tied)
    before = [tensor.detach().clone() for tensor in vocabulary_tensors(model)]
    if num_new == 1:
        add_mask_token(model, NUM_ROWS)
    else:
        resize_vocabulary(model, NUM_ROWS + num_new)
    assert is_tied(model) == tied
    assert model.config.vocab_size == NUM_ROWS + num_new
    for old, new in zip(before, vocabulary_tensors(model), strict=True):
        assert new.shape == (NUM_ROWS + num_new, 64)
        assert torch.equal(old, new[:NUM_ROWS])
        torch.testing.assert_close(new[NUM_ROWS:], old.mean(dim=0).expand(num_new, -1))
    logits = model(torch.tensor([[5, 6, NUM_ROWS]])).logits
    assert logits.shape == (1, 3, NUM_ROWS + num_new)
    assert (model.get_output_embeddings()(hidden_states()).argmax(dim=-1) < NUM_ROWS).all()


def test_a_vocabulary_is_never_shrunk() -> None:
    model = build_model("qwen2", seed=0)
    with pytest.raises(ValueError, match="cannot shrink a vocabulary of 320 rows to 300"):
        resize_vocabulary(model, VOCABULARY)


@TIED
def test_an_untrained_draft_says_of_real_text_what_its_base_says(
    family: str, tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    build_model(family, seed=6, tied=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_draft(base, tmp_path / "draft")
    ids = tokenizer("the cat runs and then sleeps", return_tensors="pt")["input_ids"]
    before, after = (load_causal_lm(str(folder)) for folder in (base, tmp_path / "draft"))
    assert is_tied(after) == tied
    others = torch.arange(NUM_ROWS) != MASK
    with torch.no_grad():
        old, new = before(ids).logits, after(ids).logits
    assert torch.equal(old[..., others], new[..., others])
    assert (new.argmax(dim=-1) != MASK).all()


def test_an_untrained_draft_has_the_keys_of_engines_and_the_tokenizer_of_its_base(
    base_folder: Path, tmp_path: Path
) -> None:
    keys = write_draft(base_folder, tmp_path / "draft", num_draft_tokens=6)
    assert keys["pard_token"] == keys["mask_token_id"] == MASK
    assert keys["spd_type"] == "pard"
    assert keys["pard_num_draft_tokens"] == 6
    assert keys["architectures"] == keys_of(base_folder)["architectures"]
    assert keys["vocab_size"] == NUM_ROWS
    assert mask_token_of(load_config(str(tmp_path / "draft"))) == MASK
    assert list(tmp_path.glob("draft/*.safetensors"))
    base, draft = (load_tokenizer(str(folder)) for folder in (base_folder, tmp_path / "draft"))
    check_same_tokenizer(draft, base, "draft", "base")
    assert draft.chat_template == base.chat_template
    assert draft.eos_token == base.eos_token
    assert [p.name for p in tmp_path.iterdir()] == ["draft"]  # nothing half-written beside it


def test_a_base_that_already_is_a_draft_keeps_its_mask_token_and_its_row(base_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert write_draft(base_folder, first, mask_token_id=310)["pard_token"] == 310
    model = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        model.get_input_embeddings().weight[310] += 1.0  # as training would
    model.save_pretrained(first)
    keys = write_draft(first, second)
    assert keys["pard_token"] == keys["mask_token_id"] == 310
    rows = [AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (first, second)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("other", [{"mask_token_id": 311}, {"mask_token": "<|unused|>"}], ids=["id", "name"])
def test_another_mask_token_for_a_base_that_already_is_a_draft_is_refused(
    base_folder: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    write_draft(base_folder, tmp_path / "first")
    with pytest.raises(UserError, match=f"already is a draft model with mask token {MASK}"):
        write_draft(tmp_path / "first", tmp_path / "second", **other)
    assert not (tmp_path / "second").exists()


def test_an_untrained_draft_that_stands_already_is_left_alone(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text('{"mine": 1}')
    assert write_draft(base_folder, tmp_path / "draft") == {"mine": 1}


@pytest.mark.parametrize("keys", [{"pard_token": 3, "mask_token_id": 4}, {"pard_token": 99}, {"mask_token_id": -1}])
def test_mask_token_keys_that_would_kill_an_engine_are_refused(keys: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"must be one id in \[0, 64\)"):
        mask_token_of(AutoConfig.for_model("qwen2", vocab_size=64, **keys))


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "no-such-type"}'], ids=["missing", "torn", "unknown"])
def test_a_config_that_cannot_be_read_is_one_line_with_its_folder(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        load_config(str(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}: the config cannot be loaded: ")
    assert "\n" not in str(error.value)


def test_a_folder_that_does_not_exist_is_named_before_the_hub() -> None:
    with pytest.raises(
        UserError, match=r"^outputs/typo: no such folder, and as a name of the hub the config cannot be"
    ):
        load_config("outputs/typo")


def test_a_model_with_damaged_weights_is_named(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((base_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=f"^{tmp_path}: the model cannot be loaded"):
        load_causal_lm(str(tmp_path))


def test_tokenizers_that_differ_are_refused_with_the_entry(tokenizer: PreTrainedTokenizerBase) -> None:
    other = build_tokenizer()
    other.add_tokens(["<extra>"])
    check_same_tokenizer(tokenizer, build_tokenizer(), "DRAFT", "TARGET")
    with pytest.raises(
        UserError, match=r"DRAFT and target TARGET .* 1 entries differ, .*'<extra>' \(id None and 300\)"
    ):
        check_same_tokenizer(tokenizer, other, "DRAFT", "TARGET")


def test_a_tokenizer_entry_without_a_row_is_left_out_of_the_mean_of_a_new_row() -> None:
    model = build_model("llama", seed=3)
    old = vocabulary_tensors(model)[0].detach().clone()
    replace_vocabulary(model, [[4, NUM_ROWS], [5, 6], [NUM_ROWS]])
    new = vocabulary_tensors(model)[0]
    assert torch.equal(new[0], old[4])
    torch.testing.assert_close(new[2], torch.stack([old[4], old[5:7].mean(dim=0)]).mean(dim=0))
