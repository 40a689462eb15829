"""The edge between Hydra and the library: typed schemas in, validated dataclasses out, one line for an error."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NoReturn, cast

import hydra
from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pard_train.commands import CONFIG_DIR, PROGRAMS, command
from pard_train.config import Config, SourceConfig
from pard_train.errors import RESUMABLE, Interrupted, ThresholdError, UserError
from pard_train.overrides import all_settings, check_overrides, explain_type, options, unread, with_section
from pard_train.runs import package_versions

PRIMARY = "config"  # conf/config.yaml
DISK_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large"}
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
LOST_PEER = "by peer"  # in Gloo's errors: connection closed, or reset
INTERRUPTED = 130  # exit status of Ctrl-C, as shells have it


def register_schema() -> None:
    """Make the configuration known to Hydra as `schema`: unknown keys and wrong types become errors."""
    node = OmegaConf.structured(Config)
    _open_dicts(node)
    ConfigStore.instance().store(name="schema", node=node)


def _open_dicts(node: DictConfig) -> None:
    """Let fields that are plain dicts (data.template_kwargs, trainer.extra, deepspeed) take any key."""
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            if OmegaConf.get_type(child) is dict:
                OmegaConf.set_struct(child, False)
            else:
                _open_dicts(child)


def to_config(composed: DictConfig) -> Config:
    """The typed configuration of a composed one.

    Raises:
        UserError: naming the settings that have no value, or a source that is none.
    """
    sources = composed.prepare.sources
    for name in sources:  # OmegaConf lets a command line add only untyped entries to a dict
        if not OmegaConf.is_dict(sources[name]):
            raise UserError(f"prepare.sources.{name}={sources[name]}: give prepare.sources.{name}.path={sources[name]}")
        sources[name] = OmegaConf.merge(OmegaConf.structured(SourceConfig), sources[name])
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise UserError(f"not set: {', '.join(missing)}. Give {missing[0]}=... or choose an experiment=...")
    return cast(Config, OmegaConf.to_object(composed))


def task_overrides() -> list[str]:
    """The command line of the running program, without Hydra's own options."""
    return list(HydraConfig.get().overrides.task)


def compose_config(overrides: Sequence[str]) -> Config:
    """The configuration of another command line, within a running program.

    Raises:
        UserError: naming a setting, group or option that does not exist, or a value of a wrong type.
    """
    checked = check_overrides(overrides)
    try:
        return to_config(compose(PRIMARY, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_readable(error, checked)) from error


def hydra_program(name: str, validate: Callable[[Config], None], run: Callable[[Config], Any]) -> None:
    """Compose conf/config.yaml with the command line, validate it, and run.

    Errors in settings or input print one line and exit with status 2, results below their thresholds one line each and
    exit with status 3, Ctrl-C one line and status 130, a training run that saved before it stopped one line and status
    75; anything else keeps its traceback.

    Args:
        name: of the program in `commands.PROGRAMS`. Its own section's prefix may be left out on the command line.
        validate: raises UserError; imports nothing heavy.
        run: the recipe's work on the validated configuration.
    """
    _answer_options(name, sys.modules[run.__module__].__doc__ or "")
    register_schema()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing, and we print one line

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=PRIMARY)
    def program(composed: DictConfig) -> None:
        _run(name, composed, validate, run)

    overrides: list[Any] = []
    try:
        sys.argv[1:] = with_section(sys.argv[1:], name)
        is_multirun = bool({"-m", "--multirun"} & set(sys.argv))
        overrides = check_overrides(list(filter(_is_override, sys.argv[1:])), is_multirun=is_multirun)
        for line in unread(overrides, name):
            print(f"{_program_name()}: note: {line} is not read by this program", file=sys.stderr)
        program()
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(_readable(error, overrides))
    except UserError as error:
        _exit_with(str(error))


def _is_override(argument: str) -> bool:
    """Whether a command line argument sets something, unlike Hydra's own options and their values."""
    return not argument.startswith("-") and "=" in argument


def _run(name: str, composed: DictConfig, validate: Callable[[Config], None], run: Callable[[Config], Any]) -> None:
    number = int(os.environ.get("WORLD_SIZE", 1))
    try:
        if number > 1 and not PROGRAMS[name].shares_work:
            raise UserError(f"WORLD_SIZE={number}: this program runs in one process; start it without a launcher")
        config = to_config(composed)
        validate(config)
        _prepare_process()
        run(config)
        _leave_process_group()
    except (UserError, OmegaConfBaseException) as error:
        _exit_with(_readable(error, []))
    except ThresholdError as error:
        for miss in error.misses:
            print(f"{_program_name()}: below threshold: {miss}", file=sys.stderr)
        sys.exit(3)
    except (KeyboardInterrupt, Interrupted) as error:
        resume = " with resume=true" if name == "train" else ""
        if isinstance(error, KeyboardInterrupt) or int(os.environ.get("RANK", 0)) == 0:
            reason = str(error) or "interrupted"
            print(f"\n{_program_name()}: {reason}; to resume, run the same command{resume}", file=sys.stderr)
        _leave_process_group()
        sys.exit(RESUMABLE if isinstance(error, Interrupted) else INTERRUPTED)
    except SystemExit:
        _leave_process_group()
        raise
    except RuntimeError as error:
        if number == 1 or LOST_PEER not in str(error):
            raise
        _exit_with(f"process {os.environ.get('RANK')} waited for a process that has ended; that one says why")
    except Exception as error:  # safetensors has the number in its text alone
        full = [t for n, t in DISK_FULL.items() if getattr(error, "errno", 0) == n or f"(os error {n})" in str(error)]
        if isinstance(error, OSError) and error.errno in DENIED and error.filename:
            _exit_with(f"{error.filename}: {os.strerror(error.errno).lower()}: choose another folder, or change that")
        if not full:
            raise
        what, fix = f"{getattr(error, 'filename', None) or 'a file'} cannot be written", "run the same command again"
        _exit_with(f"{what} ({full[0]}): free some space and {fix}; finished parts are kept")


def _prepare_process() -> None:
    from pard_train.device import quiet_libraries, renew_rendezvous  # import torch, which validation does without

    renew_rendezvous()
    quiet_libraries()


def _leave_process_group() -> None:
    """Leave the process group before Python shuts down.

    A thread of Gloo frees the tensor of the last collective a moment after the collective ends. If the interpreter is
    shutting down by then, the process aborts ("terminate called without an active exception").
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.1)  # the thread needs Python's lock once


def _readable(error: Exception, overrides: Sequence[Any]) -> str:
    """An error in one line. Hydra keeps the reason in the cause of its error."""
    if isinstance(error, UserError):
        return str(error).splitlines()[0]
    if explained := explain_type(overrides, str(error)):
        return explained
    key = getattr(error, "full_key", None)
    parts = [str(e).splitlines()[0].rstrip(".") for e in (error, error.__cause__) if str(e or "")]
    return ": ".join(([key] if key else []) + parts)


def _program_name() -> str:
    """Name of the running program in messages: train.py in a checkout, pard-train where a wheel is installed."""
    name = Path(sys.argv[0]).stem
    return command(name).rpartition("/")[2] if name in PROGRAMS else name  # a benchmark


def _exit_with(message: str) -> NoReturn:
    _leave_process_group()
    print(f"{_program_name()}: error: {message}", file=sys.stderr)
    sys.exit(2)


# ---- --help and --version -------------------------------------------------------------------------------------------


def _answer_options(name: str, doc: str) -> None:
    """Answer --help and --version, and exit."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(name, doc))
        sys.exit()
    if "--version" in sys.argv[1:]:
        print("\n".join(f"{name} {version}" for name, version in package_versions().items()))
        sys.exit()


def help_text(name: str, doc: str) -> str:
    """What --help prints: the program's docstring, its settings with defaults and comments, and its groups."""
    sections = (*PROGRAMS[name].sections, "output_dir", "seed", "resume")
    settings = [s for s in all_settings() if s.name.split(".")[0] in sections]
    settings.sort(key=lambda setting: setting.name.split(".")[0] != name)  # the program's own first
    short = f"; `{name}.` may be left out" if any(s.name.startswith(f"{name}.") for s in settings) else ""
    lines = [doc.strip(), "", f"Settings (NAME=VALUE{short}):"]
    for setting in settings:
        is_section = hasattr(setting.default, "__dataclass_fields__")
        value = "" if is_section else f"={_shown(setting.default)}"
        allowed = f" Allowed: {setting.rule.allowed()}." if setting.rule.allowed() else ""
        comment = fill(setting.rule.comment + allowed, 110, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines += ([""] if is_section else []) + [f"  {setting.name}{value}", comment]
    groups = sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())
    lines += ["", "Groups (GROUP=OPTION):", ""]
    return "\n".join(lines + [f"  {group}: {', '.join(options(group))}" for group in groups])


def _shown(value: Any) -> str:
    """A default as the command line writes it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
