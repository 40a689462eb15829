"""Checks of the command line before Hydra composes it: what is wrong, the nearest valid name, and how to write it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from pard_train.commands import CONFIG_DIR, PROGRAMS
from pard_train.config import Config
from pard_train.config.setting import Rule, rule_of
from pard_train.errors import UserError

# Names that people know from elsewhere.
KNOWN_ELSEWHERE = {
    "lr": "trainer.learning_rate",
    "batch_size": "data.slot_budget, the batch size of training, or inference.batch_size",
    "per_device_train_batch_size": "data.slot_budget, the slots per device and pack",
    "warmup_ratio": "trainer.warmup_steps",
    "fp16": "trainer.bf16",
    "precision": "trainer.bf16",
    "optimizer": "trainer.optim",
    "compile": "trainer.torch_compile",
    "target": "targets=[...]",
    "checkpoint": "export.checkpoint, or draft.path",
    "licence": "license",
    "report_to": "logger.trackers=[...]",
    "system": "generate.system_prompt",
    "dtype": "inference.dtype",
}


@dataclass(frozen=True)
class Setting:
    """One setting of the tree: its dotted name, type, default and rule."""

    name: str
    type: Any
    default: Any
    rule: Rule


def all_settings(schema: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a configuration, groups included, in order."""
    types = get_type_hints(schema)
    for field, value in ((field, getattr(schema(), field.name)) for field in fields(schema)):
        name = prefix + field.name
        yield Setting(name, types[field.name], value, rule_of(field))
        if is_dataclass(value):
            yield from all_settings(type(value), f"{name}.")


def options(group: str) -> list[str]:
    """Names of the files of a group of conf/; empty if there is no such group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def with_section(arguments: Sequence[str], program: str) -> list[str]:
    """Arguments with the program's own section written out: `benchmarks=` of evaluate.py is `evaluate.benchmarks=`."""
    settings = {setting.name for setting in all_settings()}

    def _full(argument: str) -> str:
        marks, name, rest = re.fullmatch(r"([+~]*)([^=.@]*)(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
        is_short = name not in settings and not options(name) and f"{program}.{name}" in settings
        return f"{marks}{program}.{name}{rest}" if is_short else argument

    return [_full(argument) for argument in arguments]


def check_overrides(arguments: Sequence[str], *, is_multirun: bool = False) -> list[Override]:
    """Parse command line overrides (no options such as --help) and check that every name in them exists.

    Raises:
        UserError: naming the first override that cannot be parsed, or whose setting, group or option does not exist.
    """
    settings = {setting.name: setting for setting in all_settings()}
    overrides = []
    for argument in arguments:
        try:
            (override,) = OverridesParser.create().parse_overrides([argument])
        except OverrideParseException as error:
            name = argument.partition("=")[0]
            raise UserError(
                f"{argument}: cannot be parsed; write NAME=VALUE, and quote a value with spaces or any of ,=[]{{}}'\": "
                f"'{name}=\"...\"'"
            ) from error
        _check_name(override, settings)
        if override.is_sweep_override() and not is_multirun:
            raise UserError(
                f"{argument}: a value with commas is a sweep, which needs -m; for a list write {override.key_or_group}="
                f"[...], for a text quote it: '{override.key_or_group}=\"...\"'"
            )
        overrides.append(override)
    return overrides


def _check_name(override: Override, settings: dict[str, Setting]) -> None:
    name = override.key_or_group
    if name.split(".")[0] == "hydra" or override.is_delete():
        return
    if options(name):
        _check_option(override, name)
    elif name not in settings:
        _check_entry(name, settings)
    elif name in settings and is_dataclass(settings[name].default):
        members = [other for other in settings if other.startswith(f"{name}.")]
        example = f"{name}.path" if f"{name}.path" in members else members[0]
        raise UserError(f"{override.input_line}: {name} is a group of settings; set one of them, such as {example}=...")


def _check_option(override: Override, group: str) -> None:
    chosen = override.value()
    for option in chosen if isinstance(chosen, list) else [chosen]:
        if isinstance(option, str | int | float | None) and option not in (allowed := options(group)):
            nearest = difflib.get_close_matches(str(option), allowed, n=1)
            hint = f"did you mean {nearest[0]}? " if nearest else ""
            raise UserError(f"{group}={option}: no such option; {hint}Available: {', '.join(allowed)}")


def _check_entry(name: str, settings: dict[str, Setting]) -> None:
    """Check that a name is an entry of a setting that is a plain dict, such as trainer.extra.adam_beta2."""
    parts = name.split(".")
    parents = (".".join(parts[:number]) for number in range(1, len(parts)))
    found = next((p for p in parents if p in settings and isinstance(settings[p].default, dict)), None)
    if found is None:
        raise UserError(f"{name} is not a setting: {_suggestion(name, list(settings))}")
    entry = name.removeprefix(f"{found}.")
    if "." in entry and get_args(settings[found].type)[1] in (str, float, list[str]):
        raise UserError(f"{name}: a name must not have a dot: write {found}.{entry.replace('.', '_')}=...")


def _suggestion(name: str, known: Sequence[str]) -> str:
    section, _, last = name.rpartition(".")
    if last in KNOWN_ELSEWHERE:
        return f"use {KNOWN_ELSEWHERE[last]}"
    inside = [other for other in known if other.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(name, inside, n=1, cutoff=0.7) or difflib.get_close_matches(
        last, [other.rpartition(".")[2] for other in known], n=1, cutoff=0.6
    )
    full = [other for other in known if nearest and (other == nearest[0] or other.endswith(f".{nearest[0]}"))]
    return f"did you mean {full[0]}?" if full else "--help lists the settings"


def unread(overrides: Sequence[Override], program: str) -> list[str]:
    """Overrides of settings that a program does not read, to be mentioned once."""
    read = {*PROGRAMS[program].sections, "output_dir", "seed", "resume"}
    sections = {setting.name for setting in all_settings() if "." not in setting.name}
    names = [(override.key_or_group.split(".")[0], override) for override in overrides]
    unread_names = sections - read
    return [str(o.input_line) for name, o in names if name in unread_names and not options(o.key_or_group)]


def explain_type(overrides: Sequence[Override], message: str) -> str | None:
    """What is wrong with the override that an error of Hydra mentions; None if it mentions none."""
    types = {setting.name: setting for setting in all_settings()}
    for override in overrides:
        setting = types.get(override.key_or_group)
        if setting is not None and str(override.input_line) in message:
            return f"{override.input_line}: {_wanted(setting, str(override.value()))}"
    return None


def _wanted(setting: Setting, value: str) -> str:
    kind = str(setting.type)
    if isinstance(setting.default, list):
        return f"must be a list: {setting.name}=[{value}]"
    if isinstance(setting.default, dict):
        return f"must be a mapping: {setting.name}.KEY=VALUE"
    for word, wanted in (("bool", "true or false"), ("int", "an integer"), ("float", "a number")):
        if word in kind:
            return f"must be {wanted}"
    return "must be a text"
