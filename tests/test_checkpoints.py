"""Weights come out of every kind of checkpoint as they were trained, and nothing in one is ever run."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from safetensors.torch import load_file
from test_launchers import launch
from tiny import experiment
from torch import Tensor

from pard_train.errors import UserError
from pard_train.training.checkpoints import (
    Checkpoint,
    find_checkpoint,
    join_flat,
    join_sliced,
    load_weights,
    read_shards,
)
from pard_train.training.trainer import train


def random_groups(draw: random.Random) -> list[dict[str, Tensor]]:
    """Weights of one to three parameter groups, of odd shapes."""
    shapes = [[tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(1, 4))]]
    shapes *= draw.randint(1, 3)
    return [{f"{g}.{i}": torch.randn(shape) for i, shape in enumerate(group)} for g, group in enumerate(shapes)]


def shapes_of(groups: Sequence[dict[str, Tensor]]) -> list[dict[str, torch.Size]]:
    """Their shapes, as DeepSpeed records them."""
    return [{name: weight.shape for name, weight in group.items()} for group in groups]


def assert_same(found: dict[str, Tensor], groups: Sequence[dict[str, Tensor]]) -> None:
    """All weights of all groups, bit for bit."""
    expected = {name: weight for group in groups for name, weight in group.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_weights_cut_without_regard_to_their_ends_are_joined(num_ranks: int) -> None:
    draw = random.Random(num_ranks)
    for _ in range(20):
        groups = random_groups(draw)
        paddings = [[draw.randint(0, 2) for _ in group] for group in groups]
        ranks: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        for group, padding in zip(groups, paddings, strict=True):
            parts = [
                p for w, n in zip(group.values(), padding, strict=True) for p in (w.flatten(), torch.full((n,), 9.0))
            ]
            vector = torch.cat(parts)
            vector = torch.cat([vector, torch.full((-len(vector) % num_ranks,), 9.0)])
            for rank, part in zip(ranks, vector.chunk(num_ranks), strict=True):
                rank.append(part)
        assert_same(join_flat(ranks, shapes_of(groups), paddings), groups)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_weights_cut_one_by_one_are_joined(num_ranks: int) -> None:
    draw = random.Random(num_ranks)
    for _ in range(20):
        groups = random_groups(draw)
        ranks: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        for weight in (weight for group in groups for weight in group.values()):
            padded = torch.cat([weight.flatten(), torch.full((-weight.numel() % num_ranks,), 9.0)])
            for rank, part in zip(ranks, padded.chunk(num_ranks), strict=True):
                rank.append(part)
        assert_same(join_sliced(ranks, shapes_of(groups)), groups)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        ("zero3", "fp32"),
        pytest.param("zero1", "fp32", marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16", marks=pytest.mark.slow),
        pytest.param("zero0", "fp32", marks=pytest.mark.slow),
    ],
)
def test_the_shards_of_two_real_processes_hold_the_draft_of_the_same_step(
    stage: str, precision: str, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = [f"deepspeed={stage}", "trainer.max_steps=2", f"trainer.precision={precision}"]
    launch("torchrun", base_folder, chats_file, run, *settings)
    (run / "checkpoint-2" / "model.safetensors").unlink()
    (run / "checkpoint-2" / "files.json").unlink()
    bare = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", bare)  # apart from its run
    checkpoint = find_checkpoint(str(bare))
    assert checkpoint.shards is not None
    assert not checkpoint.has_safetensors
    draft = load_file(run / "draft" / "model.safetensors")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = load_weights(checkpoint, dtype).state_dict()
    assert {weight.dtype for weight in draft.values()} == {dtype}
    for name, weight in draft.items():
        assert torch.equal(weights[name], weight), name
    exact = load_weights(checkpoint, torch.float32).state_dict()
    is_finer = any(not torch.equal(exact[name], weight.float()) for name, weight in draft.items())
    assert is_finer == (precision == "bf16")  # the shards keep what rounding loses


def test_a_checkpoint_of_trainer_holds_the_draft_and_leaves_its_own_tokenizer_behind(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(experiment(base_folder, chats_file, run, max_steps=2, save_steps=2))
    checkpoint = find_checkpoint(str(run / "checkpoint-2"))
    assert (checkpoint.step, checkpoint.run, checkpoint.home) == (2, run, str(run / "init"))
    draft = load_file(run / "draft" / "model.safetensors")
    weights = load_weights(checkpoint, torch.float32).state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in draft.items())
    with pytest.raises(UserError, match="is a whole run: give one of checkpoint-2, draft in it"):
        find_checkpoint(str(run))
    weights_file = run / "checkpoint-2" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        find_checkpoint(str(run / "checkpoint-2"))
    (run / "checkpoint-2" / "files.json").unlink()
    with pytest.raises(UserError, match="was not written to its end"):
        find_checkpoint(str(run / "checkpoint-2"))


def write_shards(folder: Path, *, num_ranks: int = 2, **more: Any) -> Path:
    """Two weights as DeepSpeed's second stage writes them, with more entries in the model's file."""
    shards = folder / "global_step1"
    shards.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    shapes = [{"a": torch.Size([3]), "b": torch.Size([3])}]
    torch.save(
        {"module": {}, "param_shapes": shapes, "shared_params": {"c": "a"}, **more},
        shards / "mp_rank_00_model_states.pt",
    )
    vector = torch.arange(6.0)
    for rank in range(num_ranks):
        state = {
            "single_partition_of_fp32_groups": [vector[rank * 3 : rank * 3 + 3]],
            "partition_count": [2],
            "zero_stage": ZeroStageEnum(2),
            "loss_scaler": LossScaler(scale=1.0),
        }
        torch.save({"optimizer_state_dict": state}, shards / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return shards


class Trap:
    """Runs a command when it is read the usual way."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_an_object_that_deepspeed_does_not_write_is_named_and_never_made(tmp_path: Path) -> None:
    weights = read_shards(write_shards(tmp_path / "good"))
    assert {name: weight.tolist() for name, weight in weights.items()} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
        "c": [0, 1, 2],
    }
    shards = write_shards(tmp_path / "bad", args=Trap(f"touch {tmp_path / 'sprung'}"))
    with pytest.raises(UserError, match=r"holds posix.system, which DeepSpeed does not write: not read"):
        read_shards(shards)
    assert not (tmp_path / "sprung").exists()


def test_shards_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the shards of 1 processes, but 2 trained"):
        read_shards(write_shards(tmp_path / "missing", num_ranks=1))
    shards = write_shards(tmp_path / "damaged")
    last = shards / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is damaged"):
        read_shards(shards)
    split = write_shards(tmp_path / "split")
    (split / "mp_rank_01_model_states.pt").touch()
    with pytest.raises(UserError, match="model parallel"):
        read_shards(split)


def test_ranks_are_joined_in_the_order_of_their_numbers_not_of_their_names(tmp_path: Path) -> None:
    shards = tmp_path
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)]
    torch.save(
        {"module": {}, "param_shapes": [{"a": torch.Size([12])}], "shared_params": {}},
        shards / "mp_rank_00_model_states.pt",
    )
    for rank, name in enumerate(names):
        state = {"single_partition_of_fp32_groups": [torch.tensor([float(rank)])], "partition_count": 12}
        torch.save({"optimizer_state_dict": state}, shards / name)
    assert read_shards(shards)["a"].tolist() == list(range(12))


def test_weights_that_nobody_saved_are_an_error(base_folder: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "checkpoint")
    checkpoint = Checkpoint(str(tmp_path / "checkpoint"), str(base_folder), None, shards, has_safetensors=False)
    with pytest.raises(UserError, match=r"weights are missing, lm_head\.weight among them"):
        load_weights(checkpoint, torch.float32)


def test_a_folder_without_weights_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it has no weights"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        UserError, match=r"pytorch_model\.bin can carry code and is not read: convert it to safetensors"
    ):
        find_checkpoint(str(tmp_path))
