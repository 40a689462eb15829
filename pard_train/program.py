"""The edge between Hydra and the library: typed schemas in, validated dataclasses out, one line for a mistake."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pard_train.config import (
    CompareConfig,
    Config,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    SourceConfig,
    VerifyConfig,
)
from pard_train.errors import ThresholdError, UserError

CONFIG_DIR = Path(__file__).parents[1] / "conf"  # beside recipes/ in a checkout and in site-packages alike


DISK_FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large"}
SCHEMAS = {
    "train": Config,
    "evaluate": EvaluateConfig,
    "compare": CompareConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "generate": GenerateConfig,
}


HELP = """${hydra.help.header}
Settings, each explained in pard_train/config.py; override them as NAME=VALUE:

$CONFIG
Groups, chosen as GROUP=OPTION:

$APP_CONFIG_GROUPS
"""


def register_schemas(help_text: str) -> None:
    """Make every dataclass known to Hydra as `schema_NAME`: unknown keys and wrong types become errors.

    Args:
        help_text: what --help says of the program.
    """
    node = {"app_name": "pard_train", "header": help_text, "footer": "", "template": HELP}
    ConfigStore.instance().store(group="hydra/help", name="program", node=node)
    for name, schema in SCHEMAS.items():
        node = OmegaConf.structured(schema)
        _open_dicts(node)
        ConfigStore.instance().store(name=f"schema_{name}", node=node)


def _open_dicts(node: DictConfig) -> None:
    """Let fields that are plain dicts (data.template_kwargs, trainer.extra, deepspeed, drafts) take any key."""
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            if OmegaConf.get_type(child) is dict:
                OmegaConf.set_struct(child, False)
            else:
                _open_dicts(child)


def _type_sources(composed: DictConfig) -> None:
    """Give every data source its schema: OmegaConf lets a command line add only untyped entries to a dict."""
    sources = composed.prepare.sources if "prepare" in composed else {}
    for name in sources:
        sources[name] = OmegaConf.merge(OmegaConf.structured(SourceConfig), sources[name])


def hydra_program(
    name: str, validate: Callable[[Any], None], run: Callable[[Any], Any], *, shares_work: bool = False
) -> None:
    """Compose conf/NAME.yaml with the command line, validate it, and run.

    Mistakes in settings or input print one line and exit with status 2, results below their thresholds one line each
    and exit with status 3; anything else keeps its traceback.

    Args:
        name: primary config, which lists its schema first in its defaults.
        validate: raises UserError; imports nothing heavy.
        run: the recipe's work on the validated dataclass.
        shares_work: among the processes of a launcher; a program that does not is refused under one, where every
            process would do all of it and write the same files.
    """
    register_schemas(sys.modules[run.__module__].__doc__ or "")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of printing, and we print one line

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=name)
    def program(composed: DictConfig) -> None:
        try:
            if not shares_work and (number := int(os.environ.get("WORLD_SIZE", 1))) > 1:
                raise UserError(
                    f"WORLD_SIZE={number}, but this program shares no work: run one of it, without a launcher"
                )
            _type_sources(composed)
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise UserError(f"not set: {', '.join(missing)}. Give {missing[0]}=... or choose an experiment=...")
            config = OmegaConf.to_object(composed)
            validate(config)
            run(config)
            _leave_process_group()
        except (UserError, OmegaConfBaseException) as error:
            _exit_with(error)
        except ThresholdError as error:
            for miss in error.misses:
                print(f"{Path(sys.argv[0]).name}: below threshold: {miss}", file=sys.stderr)
            sys.exit(3)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            _exit_with(
                UserError(
                    f"{error.filename or 'a file'} cannot be written ({DISK_FULL[error.errno]}): make room and run the "
                    "same command again; what was finished before is kept"
                )
            )

    try:
        program()
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(error)


def _leave_process_group() -> None:
    """Part from the other ranks while Python still runs.

    A thread of Gloo frees the tensor of the last collective a moment after the collective is over, and if the
    interpreter is shutting down by then, the process aborts ("terminate called without an active exception"). DDP keeps
    that thread alive, so that it cannot be waited for.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.1)  # the thread needs Python's lock once


def _exit_with(error: Exception) -> NoReturn:
    """Print what is wrong in one line; Hydra keeps the reason in the cause of its error."""
    _leave_process_group()
    is_ours = isinstance(error, UserError)
    parts = [str(e).splitlines()[0].rstrip(".") for e in (error, None if is_ours else error.__cause__) if str(e or "")]
    print(f"{Path(sys.argv[0]).name}: error: {': '.join(parts)}", file=sys.stderr)
    sys.exit(2)
