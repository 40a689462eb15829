"""Checkpoints: where the weights of a draft model are, and reading them whatever wrote them.

Understood are a draft folder or hub name, a checkpoint-N folder of Trainer, and DeepSpeed's shards of any ZeRO stage
and number of processes. DeepSpeed writes whole Python objects. They are read with PyTorch's restricted loader, which
builds tensors and plain containers and calls nothing; DeepSpeed's few own objects come out as `Opaque`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import AutoModelForCausalLM, PreTrainedModel

from pard_train.errors import UserError
from pard_train.model import check_complete, load_causal_lm, load_config
from pard_train.runs import CONFIG_FILE, RUN_FILE, SEAL_FILE, check_checkpoint, read_json
from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER

# Legend: R ranks that trained, G parameter groups of the optimizer.

DEEPSPEED_OBJECTS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class Opaque:
    """Stands for an object of DeepSpeed's in its files: nothing here needs one."""

    def __init__(self, *values: Any):
        self.values = values


@dataclass(frozen=True)
class Checkpoint:
    """Where to take what from.

    Attributes:
        path: folder or hub name of the weights.
        home: folder or hub name of the config, generation config and tokenizer that go with them. Trainer changes all
            three in its checkpoints, so a run's come from its untrained draft model.
        run: output folder of the training run, None for a model from elsewhere.
        shards: folder of DeepSpeed's files, None if there are none.
        has_safetensors: `path` itself holds the weights too.
    """

    path: str
    home: str
    run: Path | None
    shards: Path | None
    has_safetensors: bool

    @property
    def step(self) -> int | None:
        """Optimizer step of a checkpoint-N folder."""
        number = Path(self.path).name.removeprefix("checkpoint-")
        return int(number) if number.isdecimal() else None


def find_checkpoint(path: str) -> Checkpoint:
    """Look where a draft's weights are, without reading any.

    Raises:
        UserError: if the folder is a run, was not written to its end, was damaged since, or holds no weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        return Checkpoint(path, path, None, None, has_safetensors=True)  # a name on the hub
    if _is_run(folder):
        inside = [p.name for p in sorted(folder.iterdir()) if p.name.startswith(("checkpoint-", DRAFT_FOLDER))]
        raise UserError(f"checkpoint={path} is a whole run: give one of {', '.join(inside) or 'its checkpoints'} in it")
    run = folder.parent if _is_run(folder.parent) else None
    shards, has_safetensors = _shards_of(folder), any(folder.glob("*.safetensors"))
    if shards is None and not has_safetensors:
        others = [p.name for p in sorted(folder.glob("*.bin")) if p.name.startswith("pytorch_model")]
        refusal = f"{', '.join(others)} can carry code and is not read: convert it to safetensors"
        reason = refusal if others else "it has no weights"
        raise UserError(f"checkpoint={path}: {reason}")
    is_numbered = folder.name.removeprefix("checkpoint-").isdecimal()
    if run is not None and is_numbered and not (folder / SEAL_FILE).exists():
        raise UserError(f"checkpoint={path} was not written to its end: give the one before")
    if (folder / SEAL_FILE).exists():
        check_checkpoint(folder)
    home = run / INITIAL_FOLDER if run is not None and is_numbered else folder
    return Checkpoint(path, str(home if home.is_dir() else folder), run, shards, has_safetensors)


def _is_run(folder: Path) -> bool:
    """Whether recipes/train.py wrote here."""
    has_files = (folder / RUN_FILE).is_file() and (folder / CONFIG_FILE).is_file()
    return has_files and "trainer" in read_json(folder / CONFIG_FILE)


def _shards_of(folder: Path) -> Path | None:
    if not (folder / "latest").is_file():
        return None
    shards = folder / (folder / "latest").read_text().strip()
    return shards if shards.is_dir() else None


def load_weights(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint.

    DeepSpeed's shards hold the weights in float32 even where it trained in bfloat16, so float32 is taken from them.

    Raises:
        UserError: if the files are damaged or incomplete.
    """
    if checkpoint.shards is None or (checkpoint.has_safetensors and dtype != torch.float32):
        return load_causal_lm(checkpoint.path, dtype=dtype)
    print(f"weights: DeepSpeed's shards in {checkpoint.shards}")
    model = AutoModelForCausalLM.from_config(load_config(checkpoint.home), dtype=dtype)
    check_complete(checkpoint.path, model.load_state_dict(read_shards(checkpoint.shards), strict=False).missing_keys)
    return model.eval()


def read_shards(folder: Path) -> dict[str, Tensor]:
    """Whole weights by name from DeepSpeed's files, in float32 (in stage 0, in the precision of training).

    Raises:
        UserError: if ranks are missing, or a file is damaged or holds objects that DeepSpeed does not write.
    """
    models, optimizers = _files(folder, "model_states"), _files(folder, "optim_states")
    if not models:
        raise UserError(f"{folder} has no ..._model_states.pt, so no checkpoint of DeepSpeed")
    state = _read(models[0])
    if not optimizers:
        return state["module"]  # stage 0: every rank holds everything
    ranks = [_read(file)["optimizer_state_dict"] for file in optimizers]
    count = ranks[0]["partition_count"]
    expected = max(count) if isinstance(count, list) else count
    if len(ranks) != expected:
        raise UserError(f"{folder} has the shards of {len(ranks)} processes, but {expected} trained")
    shapes = state["param_shapes"]
    if "fp32_flat_groups" in ranks[0]:
        weights = join_sliced([rank["fp32_flat_groups"] for rank in ranks], shapes)
    else:
        paddings = ranks[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        weights = join_flat([rank["single_partition_of_fp32_groups"] for rank in ranks], shapes, paddings)
    return weights | {alias: weights[name] for alias, name in state["shared_params"].items() if name in weights}


def join_flat(
    ranks: Sequence[Sequence[Tensor]], shapes: Sequence[dict[str, Size]], paddings: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Stages 1 and 2: the weights of a group are one long vector, cut into R parts without regard to where one ends.

    Args:
        ranks: a vector per rank and group, [R][G].
        shapes: of the weights of every group, in their order in the vector, [G].
        paddings: elements that follow each weight, [G][weights].
    """
    weights: dict[str, Tensor] = {}
    for number, group in enumerate(shapes):
        vector, start = torch.cat([rank[number] for rank in ranks]), 0
        for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
            weights[name] = vector[start : start + shape.numel()].view(shape)
            start += shape.numel() + padding
    return weights


def join_sliced(ranks: Sequence[Sequence[Tensor]], shapes: Sequence[dict[str, Size]]) -> dict[str, Tensor]:
    """Stage 3: every weight is cut into R equal slices, the last one padded; a rank holds its slices one after another.

    Args:
        ranks: vectors of each rank, to be joined, [R][any].
        shapes: of the weights, group by group, [G].

    Example: two ranks, weights a (3 elements) and b (2): rank 0 holds a0 a1 b0, rank 1 holds a2 - b1.
    """
    vectors, weights, start = [torch.cat(list(rank)) for rank in ranks], {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        length = math.ceil(shape.numel() / len(vectors))
        slices = [vector[start : start + length] for vector in vectors]
        weights[name] = torch.cat(slices)[: shape.numel()].view(shape)
        start += length
    return weights


def _files(folder: Path, kind: str) -> list[Path]:
    """DeepSpeed's files of one kind in the order of ranks. Raises UserError for a model that is itself split."""
    files = list(folder.glob(f"*mp_rank_*_{kind}.pt"))
    if any("mp_rank_00" not in file.name for file in files):
        raise UserError(f"{folder}: the model itself is split over processes (model parallel), which is not supported")
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"pp_rank_(\d+)", file.name)])


def _read(file: Path) -> dict[str, Any]:
    with safe_globals([(Opaque, name) for name in DEEPSPEED_OBJECTS]):
        try:
            foreign = get_unsafe_globals_in_checkpoint(file)
            if foreign:
                raise UserError(f"{file} holds {', '.join(sorted(foreign))}, which DeepSpeed does not write: not read")
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError) as error:
            raise UserError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
