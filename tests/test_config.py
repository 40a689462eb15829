"""Every file of conf/ composes and type-checks; experiments survive; mistakes cost one line and no model."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import pard_train
from pard_train import validation
from pard_train.commands import CONFIG_DIR, PROGRAMS
from pard_train.config import Config, DataConfig, ModelConfig, SourceConfig, check_ranges
from pard_train.errors import UserError
from pard_train.overrides import all_settings, check_overrides, with_section
from pard_train.program import PRIMARY, register_schema, to_config
from pard_train.validation import validate_train

ROOT = CONFIG_DIR.parent
OPTIONS = sorted((p.parent.name, p.stem) for p in CONFIG_DIR.glob("*/*.yaml"))
EXPERIMENTS = [option for group, option in OPTIONS if group == "experiment"]
CHOSEN = {"model.path": "base", "data.source": "a.jsonl", "output_dir": "out"}  # what the user must choose
SERVED = {"targets": "[t]", "draft.path": "d", "output_dir": "out"}
NEEDED: dict[str, dict[str, str]] = {  # all programs but dashboard and doctor, which need nothing
    "prepare": {"source": "[ultrachat]", "output_dir": "out"},
    "regenerate": {"targets": "[t]", "output_dir": "out"},
    "encode": CHOSEN,
    "score": {"model.path": "base", "targets": "[t]", "output_dir": "out"},
    "show": {"model.path": "base", "data.source": "a.jsonl"},
    "train": CHOSEN,
    "export": {"draft.path": "d", "output_dir": "out"},
    "evaluate": {**SERVED, "evaluate.benchmarks": "[humaneval]"},
    "compare": {"compare.results.a": "a", "compare.results.b": "b", "output_dir": "out"},
    "study": {**CHOSEN, "targets": "[t]", "evaluate.benchmarks": "[humaneval]", "study": "objectives"},
    "verify": SERVED,
    "load": SERVED,
    "generate": {"targets": "[t]", "draft.path": "d"},
    "quickstart": {"experiment": "quickstart"},
}


def composed(*overrides: str, **needed: str) -> DictConfig:
    """A configuration as a program composes it."""
    register_schema()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        return compose(PRIMARY, [*overrides, *(f"{key}={value}" for key, value in needed.items())])


def validator(program: str) -> Callable[[Config], None]:
    """The check of a program's settings."""
    return getattr(validation, f"validate_{program}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of every value that is no group."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        is_group = isinstance(value, dict) and value and not any("/" in name for name in value)  # family.rows has names
        result |= flat(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return result


def stated(group: str, option: str) -> dict[str, Any]:
    """What one file of conf/ states, by the names it has in the whole configuration."""
    tree = yaml.safe_load((CONFIG_DIR / group / f"{option}.yaml").read_text())
    defaults = tree.pop("defaults", [])
    package = {"experiment": "", "family": "", "cod": "draft.", "source": f"prepare.sources.{option}."}.get(
        group, f"{group}."
    )
    names = flat(tree, package) if tree else {}
    for entry in defaults:  # an experiment's own choices of groups, or one it starts from; its values win over theirs
        ((choice, chosen),) = {group: entry}.items() if isinstance(entry, str) else entry.items()
        if choice == "override /source":  # instead of the sources of the experiment it starts from
            names = {name: value for name, value in names.items() if not name.startswith("prepare.sources.")}
        for one in [chosen] if isinstance(chosen, str) else chosen:
            names = stated(choice.removeprefix("override /"), one) | names
    return names


def resolved(config: DictConfig, value: Any) -> Any:
    """A value of a file, with its interpolations filled in from the whole configuration."""
    probe = OmegaConf.create(OmegaConf.to_container(config) | {"probe": value})
    return OmegaConf.to_container(OmegaConf.create({"probe": probe.probe}))["probe"]


@pytest.mark.parametrize("program", [*NEEDED])
def test_every_program_accepts_what_it_needs_and_names_what_is_missing(program: str) -> None:
    validator(program)(to_config(composed(**NEEDED[program])))
    with pytest.raises(UserError, match=r"not set: |is not set|is empty|needs two"):
        validator(program)(to_config(composed()))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("program", [name for name in NEEDED if name not in ("compare", "study")])
def test_an_experiment_serves_every_program(program: str, experiment: str) -> None:
    validator(program)(to_config(composed(f"experiment={experiment}", **{"draft.path": "d"})))


@pytest.mark.parametrize("group, option", OPTIONS)
def test_every_option_of_every_group_survives_composition(
    group: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = stated(group, option)
    missing = {key: value for key, value in CHOSEN.items() if key not in values}
    if group == "objective" and option not in ("pard", "depth_decay", "dpace"):
        missing["data.scores"] = "scores"  # else refused: they compare with a target
    config = composed(f"{group}={option}", **missing)
    for key, value in values.items():
        assert OmegaConf.select(config, key) == resolved(config, value), key
    typed = to_config(config)
    assert type(typed) is Config
    monkeypatch.setenv("RANK", "0")  # as torchrun would, which DeepSpeed needs
    validate_train(typed)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_command_line_wins_over_an_experiment(experiment: str) -> None:
    missing = {key: value for key, value in CHOSEN.items() if key not in stated("experiment", experiment)}
    changes = {"trainer.learning_rate": 0.25, "draft.num_draft_tokens": 3, "data.max_length": 77}
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = composed(*overrides, f"experiment={experiment}", "logger=wandb", **missing)  # in any order
    assert {key: OmegaConf.select(config, key) for key in changes} == changes
    assert config.logger.trackers == ["wandb"]


@pytest.mark.parametrize(
    "program, arguments, expected",
    [
        ("evaluate", ["benchmarks=[humaneval]"], {"evaluate.benchmarks": ["humaneval"]}),
        ("evaluate", ["drafts.before=outputs/d"], {"evaluate.drafts": {"before": "outputs/d"}}),
        ("evaluate", ["inference.dtype=float32"], {"inference.dtype": "float32"}),
        ("compare", ["results.main=a", "min_ratio=0.9"], {"compare.results": {"main": "a"}, "compare.min_ratio": 0.9}),
        ("generate", ["generate.compare=false"], {"generate.compare": False}),
        ("prepare", ["sources.mine.path=a.jsonl"], {"prepare.sources.mine.path": "a.jsonl"}),
        (
            "train",
            ["data.template_kwargs={enable_thinking: false}"],
            {"data.template_kwargs": {"enable_thinking": False}},
        ),
        ("train", ["trainer.extra={adam_beta1: 0.8}"], {"trainer.extra": {"adam_beta1": 0.8}}),
        ("train", ["trainer.extra.adam_beta2=0.95"], {"trainer.extra": {"adam_beta2": 0.95}}),
        ("train", ["trainer.learning_rate=1e-05"], {"trainer.learning_rate": 1e-05}),
    ],
)
def test_a_program_takes_settings_by_their_full_name_and_its_own_without_the_prefix(
    program: str, arguments: list[str], expected: dict[str, Any]
) -> None:
    full = with_section(arguments, program)
    check_overrides(full)
    config = composed(*full)
    assert {key: OmegaConf.select(config, key) for key in expected} == expected


def test_the_full_name_of_every_setting_is_no_abbreviation_of_another() -> None:
    names = {setting.name for setting in all_settings()}
    for program in PROGRAMS:
        short = {name.removeprefix(f"{program}.") for name in names if name.startswith(f"{program}.")}
        assert short.isdisjoint(names - {"compare"}), program  # generate.compare needs its prefix


def test_every_setting_has_its_own_comment_and_a_default_within_its_range() -> None:
    settings = list(all_settings())
    comments = [setting.rule.comment for setting in settings]
    assert all(len(comment) > 10 or comment in ("K.", "Tracker.") for comment in comments)
    check_ranges(Config())


@pytest.mark.parametrize(
    "name, value",
    [
        ("data.max_length", 1),
        ("trainer.learning_rate", float("nan")),
        ("trainer.lr_scheduler_type", "wavy"),
        ("evaluate.live_batch_sizes", [1, 0]),
        ("evaluate.fail_below", {"all": 0.5}),
        ("prepare.sources", {"mine": SourceConfig(path="a", max_rows=-1)}),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: Any) -> None:
    config = Config()
    *groups, last = name.split(".")
    setattr(reduce(getattr, groups, config), last, value)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        check_ranges(config)


GOOD = [f"{key}={value}" for key, value in CHOSEN.items()]
MEASURED = ["monitor.every_steps=5", "targets=[t]", "evaluate.benchmarks=[humaneval]"]
MISTAKES = [
    ("train", [*GOOD, "trainer.lr=1"], ["trainer.lr", "trainer.learning_rate"]),
    ("train", [*GOOD, "trainer.learning_rte=1"], ["trainer.learning_rte", "trainer.learning_rate?"]),
    ("train", [*GOOD, "trainer.warmup_ratio=0.1"], ["trainer.warmup_ratio", "trainer.warmup_steps"]),
    ("train", [*GOOD, "trainer.per_device_train_batch_size=8"], ["data.slot_budget"]),
    ("train", [*GOOD, "trainer.learning_rate=fast"], ["trainer.learning_rate=fast", "a number"]),
    ("train", ["experiment=quickstart", "trainer.learning_rate=???"], ["not set: trainer.learning_rate"]),
    ("train", [], ["not set: data.source, model.path, output_dir"]),
    ("train", ["family=qwen2"], ["family=qwen2: no such option; did you mean qwen2.5?", "Available: ", "olmo2"]),
    ("train", ["deepspeed=null"], ["deepspeed=None: no such option", "Available: none, zero0"]),
    (
        "train",
        [*GOOD, "trainer.lr_scheduler_type=linear", "trainer.warmup_steps=5", "trainer.max_steps=3"],
        ["trainer.max_steps=3 is less than trainer.warmup_steps=5"],
    ),
    ("train", ["experiment=quikstart"], ["experiment=quikstart", "did you mean quickstart?", "Available: "]),
    ("train", [*GOOD, "objective=kd"], ["objective.kd=1.0", "data.scores", "data_scripts/score.py"]),
    ("train", [*GOOD, "data.slot_budget=100"], ["data.slot_budget=100", "data.max_length=512", ">=1723"]),
    ("train", [*GOOD, "trainer.decay_steps=9"], ["trainer.decay_steps=9", "lr_scheduler_type=constant"]),
    ("train", [*GOOD, "trainer.lr_scheduler_type=wavy"], ["trainer.lr_scheduler_type=wavy", "cosine"]),
    ("train", [*GOOD, "seed=-1"], ["seed=-1"]),
    ("train", [*GOOD, "draft=outputs/d"], ["draft=outputs/d", "draft.path="]),
    ("train", [*GOOD, "trainer=fsdp2"], ["trainer.extra.fsdp", "launch/torchrun.sh"]),
    ("evaluate", ["targets=base"], ["targets=[base]"]),
    ("evaluate", ["targets=[t]", "output_dir=out"], ["draft.path=DIR"]),
    ("evaluate", ["drafts.qwen2.5=d"], ["a name must not have a dot: write evaluate.drafts.qwen2_5="]),
    ("export", ["draft.path=c"], ["not set: output_dir"]),
    ("generate", ["targets=[t]"], ["draft.path"]),
    ("generate", ["prompt=Hello, world"], ["generate.prompt=Hello, world", "quote"]),
    ("generate", ["prompt=Why?,Because"], ["generate.prompt=Why?,Because", "quote"]),
]


def test_a_file_in_the_place_of_a_source_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^prepare.sources.mine=a.jsonl: give prepare.sources.mine.path=a.jsonl$"):
        to_config(composed("experiment=quickstart", "prepare.sources.mine=a.jsonl"))


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
    with pytest.raises(UserError, match=r"deepspeed\.fp16\.enabled=true .* trainer\.bf16=true"):
        validate_train(config)


@pytest.mark.parametrize("program", ["recipes/evaluate.py", "recipes/quickstart.py", "data_scripts/prepare.py"])
def test_a_launcher_around_a_program_that_does_not_share_its_work_is_refused(program: str, tmp_path: Path) -> None:
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, str(ROOT / program), "output_dir=out"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith(f"{Path(program).name}: error: WORLD_SIZE=2")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_every_setting_of_a_program_with_its_comment(program: str) -> None:
    command = [sys.executable, str(ROOT / PROGRAMS[program].folder / f"{program}.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    flat_text = " ".join(result.stdout.split())
    for setting in all_settings():
        if setting.name.split(".")[0] in PROGRAMS[program].sections:
            assert setting.name in flat_text
            assert " ".join(setting.rule.comment.split()) in flat_text


def test_a_setting_that_a_program_does_not_read_is_mentioned(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), "trainer.max_steps=2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "note: trainer.max_steps=2 is not read by this program" in result.stderr


def test_version_names_this_package_first() -> None:
    command = [sys.executable, str(ROOT / "recipes" / "train.py"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout.startswith(f"pard_train {pard_train.__version__}\n")
