"""Every file of conf/ composes and type-checks; experiments survive; mistakes cost one line and no model."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pard_train.config import Config, DataConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.program import CONFIG_DIR, SCHEMAS, register_schemas
from pard_train.validation import (
    validate_compare,
    validate_evaluate,
    validate_export,
    validate_generate,
    validate_train,
    validate_verify,
)

ROOT = CONFIG_DIR.parent
PRIMARIES = sorted(p.stem for p in CONFIG_DIR.glob("*.yaml"))
OPTIONS = sorted((p.parent.name, p.stem) for p in CONFIG_DIR.glob("*/*.yaml"))
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
CHOSEN = {"model.path": "base", "data.source": "a.jsonl", "output_dir": "out"}  # what the user must choose
NEEDED = {
    "train": CHOSEN,
    "data": {"model.path": "base", "output_dir": "out"},
    "evaluate": {"draft": "d", "targets": "[t]", "benchmarks": "[humaneval]", "output_dir": "out"},
    "compare": {"results.a": "a", "results.b": "b", "output_dir": "out"},
    "export": {"checkpoint": "c", "output_dir": "out"},
    "verify": {"draft": "d", "target": "t", "output_dir": "out"},
    "generate": {"draft": "d", "target": "t"},
}
VALIDATORS = {"train": validate_train, "data": validate_train} | {
    "evaluate": validate_evaluate,
    "compare": validate_compare,
    "export": validate_export,
    "verify": validate_verify,
    "generate": validate_generate,
}


def composed(primary: str, *overrides: str, **needed: str) -> DictConfig:
    """A configuration as a recipe composes it."""
    register_schemas("")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose(primary, [*overrides, *(f"{key}={value}" for key, value in needed.items())])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of every value that is no group."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return result


def stated(group: str, option: str) -> dict[str, Any]:
    """What one file of conf/ states, by the names it has in the whole configuration."""
    tree = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
    defaults = tree.pop("defaults", [])
    package = {"experiment": "", "cod": "draft.", "source": f"prepare.sources.{option}."}.get(group, f"{group}.")
    names = flat(tree, package) if tree else {}
    for entry in defaults:  # an experiment's own choices of groups; its values win over theirs
        ((choice, chosen),) = entry.items()
        for one in [chosen] if isinstance(chosen, str) else chosen:
            names = stated(choice.removeprefix("override /"), one) | names
    return names


def resolved(config: DictConfig, value: Any) -> Any:
    """A value of a file, with its interpolations filled in from the whole configuration."""
    probe = OmegaConf.create(OmegaConf.to_container(config) | {"probe": value})
    return OmegaConf.to_container(OmegaConf.create({"probe": probe.probe}))["probe"]


@pytest.mark.parametrize("primary", PRIMARIES)
def test_every_primary_file_composes_validates_and_is_of_its_type(primary: str) -> None:
    config = OmegaConf.to_object(composed(primary, **NEEDED[primary]))
    assert type(config) is SCHEMAS.get(primary, Config)
    if primary != "data":
        VALIDATORS[primary](config)


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_of_every_group_survives_composition(
    group: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = stated(group, option)
    missing = {key: value for key, value in CHOSEN.items() if key not in values}
    if group == "objective" and option not in ("pard", "depth_decay", "dpace"):
        missing["data.scores"] = "scores"  # else refused: they compare with a target
    config = composed("train", f"{group}={option}", **missing)
    for key, value in values.items():
        assert OmegaConf.select(config, key) == resolved(config, value), key
    typed = OmegaConf.to_object(config)
    assert type(typed) is Config
    monkeypatch.setenv("RANK", "0")  # as torchrun would, which DeepSpeed needs
    validate_train(typed)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_command_line_wins_over_an_experiment(experiment: str) -> None:
    missing = {key: value for key, value in CHOSEN.items() if key not in stated("experiment", experiment)}
    changes = {"trainer.learning_rate": 0.25, "draft.num_draft_tokens": 3, "data.max_length": 77}
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = composed("train", *overrides, f"experiment={experiment}", "logger=wandb", **missing)  # in any order
    assert {key: OmegaConf.select(config, key) for key in changes} == changes
    assert config.logger.report_to == "wandb"


def test_an_experiment_keeps_its_values_for_the_programs_that_make_its_data() -> None:
    for experiment in EXPERIMENTS:
        missing = {key: value for key, value in CHOSEN.items() if key not in stated("experiment", experiment)}
        missing.pop("data.source", None)
        config = composed("data", f"experiment={experiment}", **missing)
        for key, value in stated("experiment", experiment).items():
            if not key.startswith("data."):
                assert OmegaConf.select(config, key) == resolved(config, value), key


@pytest.mark.parametrize(
    "primary, override, expected",
    [
        ("evaluate", "draft=outputs/d", {"draft": "outputs/d"}),
        ("evaluate", "drafts.before=outputs/d", {"drafts": {"before": "outputs/d"}}),
        ("generate", "draft=outputs/d", {"draft": "outputs/d"}),
        (
            "train",
            "data.template_kwargs={enable_thinking: false}",
            {"data.template_kwargs": {"enable_thinking": False}},
        ),
        ("train", "trainer.extra={torch_compile: true}", {"trainer.extra": {"torch_compile": True}}),
        ("train", "trainer.extra.adam_beta2=0.95", {"trainer.extra": {"adam_beta2": 0.95}}),
    ],
)
def test_overrides_that_the_help_names_can_be_given(primary: str, override: str, expected: dict[str, Any]) -> None:
    config = composed(primary, override)
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


GOOD = [f"{key}={value}" for key, value in CHOSEN.items()]
MEASURED = ["monitor.every_steps=5", "evaluate.targets=[t]", "evaluate.benchmarks=[humaneval]"]
MISTAKES = [
    ("train", [*GOOD, "trainer.lr=1"], ["trainer.lr", "not in 'TrainerConfig'"]),
    ("train", [*GOOD, "trainer.learning_rate=fast"], ["trainer.learning_rate=fast", "Float"]),
    ("train", ["experiment=quickstart", "trainer.learning_rate=???"], ["not set: trainer.learning_rate"]),
    ("train", [], ["not set: data.source, model.path, output_dir"]),
    ("train", ["model=nope"], ["Could not find 'model/nope'"]),
    ("train", [*GOOD, "objective=kd"], ["objective.kd=1.0", "data.scores", "data_scripts/score.py"]),
    ("train", [*GOOD, "data.slot_budget=100"], ["data.slot_budget=100", "data.max_length=512", ">=1723"]),
    ("train", [*GOOD, "trainer.lr_scheduler_type=wavy"], ["trainer.lr_scheduler_type=wavy"]),
    ("train", [*GOOD, "seed=-1"], ["seed=-1"]),
    ("train", [*GOOD, *MEASURED, "trainer.extra={fsdp: full_shard}"], ["monitor.every_steps=5", "deepspeed=zero3"]),
    ("evaluate", ["targets=[t]", "output_dir=out"], ["draft=DIR"]),
    ("export", ["checkpoint=c"], ["not set: output_dir"]),
    ("generate", [], ["not set: draft, target"]),
]


@pytest.mark.parametrize("recipe, overrides, words", MISTAKES, ids=[" ".join([m[0], *m[1][-1:]]) for m in MISTAKES])
def test_a_mistake_in_settings_costs_one_line_and_no_import_of_torch(
    tmp_path: Path, recipe: str, overrides: list[str], words: list[str]
) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes" / f"{recipe}.py"), *overrides]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "HYDRA_FULL_ERROR")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = result.stderr.splitlines()
    said = [line for line in lines if not line.startswith("import time:")]
    assert result.returncode == 2, result.stderr[-2000:]
    assert len(said) == 1, said
    assert said[0].startswith(f"{recipe}.py: error: ")
    assert all(word in said[0] for word in words), said[0]
    assert result.stdout == ""
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in lines)
    assert sum(after[:2]) - sum(before[:2]) < 5  # seconds of processor time, whatever else the machine does
    assert list(tmp_path.iterdir()) == []


def test_deepspeeds_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    config = Config(ModelConfig("m"), data=DataConfig("d"), output_dir="o", deepspeed={"fp16": {"enabled": True}})
    with pytest.raises(UserError, match=r"deepspeed\.fp16\.enabled=true .* trainer\.precision=bf16"):
        validate_train(config)


@pytest.mark.parametrize("program", ["recipes/evaluate.py", "recipes/quickstart.py", "data_scripts/prepare.py"])
def test_a_launcher_around_a_program_that_does_not_share_its_work_is_refused(program: str, tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, str(ROOT / program), "output_dir=out"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    message = "error: WORLD_SIZE=2, but this program shares no work: run one of it, without a launcher\n"
    assert (result.returncode, result.stderr) == (2, f"{Path(program).name}: {message}")
