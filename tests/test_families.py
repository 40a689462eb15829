"""Family files state what the tokenizers at hand show, and every experiment plans and trains with its settings."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import templates
from packaged_tokenizers import PACKAGED, packaged_tokenizer
from test_compatibility import find
from test_config import EXPERIMENTS, composed
from test_training import log_lines
from tiny import build_model, build_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config, DraftConfig, FamilyConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.families import family_of, read_families
from pard_train.mask_token import choose_mask_token
from pard_train.model import inspect_base, write_initial_draft
from pard_train.program import to_config
from pard_train.targets.compatibility import OK, WARNING, require
from pard_train.training.plan import plan_run
from pard_train.training.trainer import train

KINDS = {"deepseek": "qwen2", "gemma3": "gemma3", "llama3": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3"}
KINDS |= {"smollm2": "llama"}
SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
QUICK = ("smollm2-135m",)  # the others have larger vocabularies and are marked slow


def option_of(config: Config) -> str:
    """Name of the family file that a configuration was made with."""
    return next(o for o, content in read_families().items() if content["family"]["name"] == config.family.name)


def tokenizer_of(option: str, draft: DraftConfig) -> PreTrainedTokenizerBase:
    """The family's own tokenizer if a package has it, else a tiny one with its chat template and mask token."""
    if packaged := [name for name in PACKAGED if option.startswith(name)]:
        return packaged_tokenizer(packaged[0])
    tokenizer = templates.build({"llama3": "llama3.1", "deepseek-r1-qwen": "deepseek-r1-distill"}[option])
    if draft.mask_token:
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(draft.mask_token, special=True)]})
    return tokenizer


@pytest.mark.parametrize(
    "option", ["smollm2", *(pytest.param(o, marks=pytest.mark.slow) for o in PACKAGED if o != "smollm2")]
)
def test_mask_token_and_end_of_turn_of_a_family_are_those_of_its_tokenizer(option: str) -> None:
    config, tokenizer = to_config(composed(f"family={option}")), packaged_tokenizer(option)
    for rows in set(config.family.rows.values()):
        assert choose_mask_token(tokenizer, rows, config.draft) == config.family.mask_token_id
    end = tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert set(config.family.end_ids) & set(end["input_ids"][-2:])
    assert tokenizer.eos_token_id in config.family.end_ids


def test_a_model_belongs_to_the_family_that_names_it_whatever_its_folder() -> None:
    for option, content in read_families().items():
        family = FamilyConfig(**content["family"])
        for name, rows in family.rows.items():
            assert family_of(name) == family_of(f"/models/{name.rpartition('/')[2]}/") == (option, family, rows)
    assert family_of("pypi:SmolLM2-135M-Instruct*8") == family_of("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert family_of("outputs/my-model") is None


def test_a_target_with_other_rows_than_its_family_file_states_is_a_warning(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 8, tmp_path / "draft")
    assert find(tmp_path / "draft", base_folder)["family"].level == OK
    target = tmp_path / "Qwen2.5-7B-Instruct"
    build_model("qwen2", seed=0).save_pretrained(target)
    tokenizer.save_pretrained(target)
    finding = find(tmp_path / "draft", target)["family"]
    assert finding.level == WARNING
    assert (
        "has 320 rows and ends turns at [2], conf/family/qwen2.5.yaml says 152064 and [151643, 151645]" in finding.text
    )


@pytest.mark.parametrize(
    "experiment", [e if e in QUICK else pytest.param(e, marks=pytest.mark.slow) for e in EXPERIMENTS]
)
def test_an_experiment_plans_and_trains_some_steps_with_its_own_tokenizer_settings(
    experiment: str, chats_file: Path, tmp_path: Path
) -> None:
    settings = {
        "model.path": tmp_path / "base",
        "data.source": chats_file,
        "data.cache_dir": tmp_path / "tokens",
        "output_dir": tmp_path / "run",
    }
    config = to_config(composed(f"experiment={experiment}", **{key: str(value) for key, value in settings.items()}))
    option, rows = option_of(config), next(iter(config.family.rows.values()))
    tokenizer = tokenizer_of(option, config.draft)
    kind = next(kind for name, kind in KINDS.items() if option.startswith(name))
    build_model(kind, seed=0, num_rows=rows, eos_token_id=config.family.end_ids[0], **SHAPE).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    config.model.keep_layers = config.model.keep_layers and 1  # of the two
    plan = plan_run(config)
    assert plan.steps > 0
    assert plan.slots > plan.supervised_tokens > 0
    assert (plan.memory_gb is None) == (kind == "gemma3")  # its windows are not counted
    config.trainer.max_steps, config.trainer.bf16, config.trainer.dataloader_num_workers = 2, False, 0
    config.trainer.gradient_accumulation_steps = config.trainer.logging_steps = 1
    config.data.max_length, config.data.slot_budget, config.data.overlong = 256, 1000, "truncate"
    config.trainer.warmup_steps = config.monitor.every_steps = 0
    draft = train(config)
    assert [math.isfinite(row["loss"]) for row in log_lines(config)] == [True, True]
    written = json.loads((draft / "config.json").read_text())
    assert written["vocab_size"] == rows
    if option.startswith(PACKAGED):
        assert written["pard_token"] == config.family.mask_token_id
    assert written["pard_trained_length"] <= 256


def test_a_target_of_another_family_is_one_line_before_weights_are_loaded(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 8, tmp_path / "draft")
    build_model("qwen2", seed=0).save_pretrained(tmp_path / "other")
    strange = build_tokenizer()
    strange.add_tokens(["<strange>"])
    strange.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="use a target of the draft's family") as caught:
        require(list(find(tmp_path / "draft", tmp_path / "other").values()))
    assert "\n" not in str(caught.value)
