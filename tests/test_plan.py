"""The plan of a run agrees with what the run then takes, and making it writes nothing."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_training import log_lines
from tiny import build_model, experiment
from torch import Tensor
from torch.profiler import ProfilerActivity
from transformers import PreTrainedTokenizerBase, TrainerCallback

from pard_train.config import Config, DraftConfig, ObjectiveConfig, PlanConfig
from pard_train.core.attention import IMPLEMENTATIONS
from pard_train.core.objectives import PackLoss
from pard_train.data.chat import Document
from pard_train.data.packing import Member, PardCollator
from pard_train.errors import UserError
from pard_train.layout import DrawKey
from pard_train.training.plan import activation_bytes, memory_by_part, plan_run
from pard_train.training.throughput import ModelShape
from pard_train.training.trainer import train

ROOT = Path(__file__).parents[1]
SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "head_dim": 32}


@pytest.fixture
def config(base_folder: Path, chats_file: Path, tmp_path: Path) -> Config:
    """Two epochs."""
    return experiment(base_folder, chats_file, tmp_path / "run", num_train_epochs=2, gradient_accumulation_steps=2)


def test_the_counts_of_the_plan_are_those_of_the_run(config: Config, tmp_path: Path) -> None:
    plan = plan_run(config)
    assert not (tmp_path / "run").exists()
    train(config)
    lines = log_lines(config)
    assert asdict(plan) == {**json.loads((tmp_path / "run" / "plan.json").read_text()), "hours": plan.hours}
    assert plan.documents == 40
    assert (plan.steps, plan.packs) == (len(lines), 2 * len(lines))
    assert plan.supervised_tokens == lines[-1]["progress/supervised_tokens"]
    assert plan.model_flops == pytest.approx(lines[-1]["progress/model_flops"], rel=0.15)
    slots = sum(line["throughput/slots_per_second"] * line["throughput/seconds_per_step"] for line in lines)
    assert plan.slots == pytest.approx(slots, rel=0.15)
    assert f"{plan.steps} steps, {plan.supervised_tokens:,} supervised tokens" in plan.render()


def test_the_plan_ends_where_max_steps_ends_the_run(config: Config) -> None:
    config = replace(config, trainer=replace(config.trainer, max_steps=3))
    plan = plan_run(config)
    train(config)
    lines = log_lines(config)
    assert plan.steps == len(lines) == 3
    assert plan.supervised_tokens == lines[-1]["progress/supervised_tokens"]  # all six packs were counted
    assert plan.model_flops == lines[-1]["progress/model_flops"]


def test_a_plan_for_some_layers_of_a_model_is_that_of_the_run(config: Config) -> None:
    config = replace(config, model=replace(config.model, keep_layers=1), trainer=replace(config.trainer, max_steps=1))
    plan = plan_run(config)
    train(config)
    assert asdict(plan) == {**json.loads((Path(config.output_dir) / "plan.json").read_text()), "hours": plan.hours}


def test_a_run_that_the_disk_cannot_hold_ends_before_its_first_step(config: Config) -> None:
    config = replace(config, trainer=replace(config.trainer, save_steps=2, save_total_limit=10**9))
    with pytest.raises(UserError, match=r"GB are free and .* GB needed: make room, .* trainer\.save_total_limit"):
        train(config)
    assert not (Path(config.output_dir) / "metrics.jsonl").exists()
    kept = replace(config, trainer=replace(config.trainer, save_total_limit=2))
    train(replace(kept, resume=True))
    files = [path for path in Path(config.output_dir).rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files) / 1e9
    largest = max(path.stat().st_size for path in files if path.parent.name.startswith("checkpoint-")) / 1e9
    assert plan_run(kept).disk_gb == pytest.approx(written + 1.5 * largest, rel=0.2)  # without the one that went


def test_a_named_chip_and_more_devices_change_time_and_steps(config: Config) -> None:
    def plan(**settings: Any) -> Any:
        return plan_run(replace(config, plan=PlanConfig(**settings)))

    one, eight = plan(chip="MI300X"), plan(chip="MI300X", num_devices=8)
    assert one.hours == pytest.approx(one.model_flops / (1307.4e12 * 0.4) / 3600)
    assert one.hours / eight.hours == pytest.approx(8 * one.model_flops / eight.model_flops)
    assert eight.packs == 16 * eight.steps
    assert plan(chip="H100", utilization=0.2).hours == pytest.approx(2 * plan(chip="H100").hours)
    with pytest.raises(UserError, match=r"plan\.chip=TPU is not a known chip: choose one of A100, .*MI300X"):
        plan(chip="TPU")


def test_zero_shards_states_then_gradients_then_weights(config: Config) -> None:
    model = build_model("qwen2", seed=0).config
    shape = ModelShape.of(model)
    assert shape is not None

    def parts(num_devices: int = 1, stage: int | None = None, **trainer: Any) -> dict[str, float]:
        deepspeed = {} if stage is None else {"zero_optimization": {"stage": stage}}
        changed = replace(config, deepspeed=deepspeed, trainer=replace(config.trainer, **trainer))
        return memory_by_part(changed, shape, model, 500, num_devices)

    one, p = parts(), (shape.layer_weights + shape.head_weights) / 1e9
    assert (one["weights"], one["gradients"], one["optimizer"]) == pytest.approx((4 * p, 4 * p, 8 * p))
    assert parts(4)["gradients"] == 2 * one["gradients"]  # the buckets of DDP
    # Bytes per weight and device on four. In bfloat16 the optimizer has weights in float32, too: 4 + 8.
    sharded = {0: (2, 2, 12), 1: (2, 2, 3), 2: (2, 0.5, 3), 3: (0.5, 0.5, 3)}
    for stage, expected in sharded.items():
        found = parts(4, stage, bf16=True)
        sizes = [found[name] / p for name in ("weights", "gradients", "optimizer")]
        assert sizes == pytest.approx(expected), stage
    assert parts(4, 0)["optimizer"] == pytest.approx(8 * p)
    fsdp = parts(4, extra={"fsdp": True})
    assert [fsdp[name] / p for name in ("weights", "gradients", "optimizer")] == pytest.approx([1, 1, 2])
    assert parts(gradient_checkpointing=True)["activations"] < one["activations"]
    assert parts(bf16=True)["head"] < one["head"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("width", [4, 2])
def test_activations_are_the_tensors_that_pytorch_saves_for_the_backward_pass(family: str, width: int) -> None:
    """By hooks on saved tensors, without parameters, their copies in bfloat16, and what the batch holds."""
    model = build_model(family, seed=0, num_hidden_layers=3, **SHAPE).train()
    model.set_attn_implementation(IMPLEMENTATIONS["split"])
    draw = np.random.default_rng(0)
    document = Document(draw.integers(0, 290, 200), np.arange(200) >= 40, "x")
    members = [Member(document, DrawKey(0, 0, number)) for number in range(3)]
    batch = PardCollator(DraftConfig(num_draft_tokens=4), ObjectiveConfig(), 300, 2048)([members])
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *batch.values())}
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known and len(tensor) != SHAPE["hidden_size"]:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    precision = torch.autocast("cpu", torch.bfloat16) if width == 2 else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision:
        loss, _ = PackLoss(model, "split", 4)(model, batch, 1.0)
    weights = {s for s, t in saved.items() if t.dim() == 2 and t.shape[0] != 2048 and t.dtype == torch.bfloat16}
    total = sum(tensor.untyped_storage().nbytes() for storage, tensor in saved.items() if storage not in weights)
    shape = ModelShape.of(model.config)
    assert shape is not None
    assert loss.requires_grad
    assert total / 2048 == pytest.approx(activation_bytes(shape, model.config, width, False), rel=0.02)


@pytest.mark.parametrize(
    ("program", "settings", "num_plans"),
    [("train", [], 1), ("study", ["runs.a=[]", "runs.b=[]", "targets=[any]", "evaluate.benchmarks=[humaneval]"], 2)],
)
def test_plan_only_prints_the_plan_and_starts_nothing(
    program: str, settings: list[str], num_plans: int, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, f"recipes/{program}.py", f"model.path={base_folder}", f"data.source={chats_file}"]
    command += [
        f"data.cache_dir={tmp_path / 'tokens'}",
        "draft.num_draft_tokens=4",
        "deepspeed=zero1",
        "plan_only=true",
    ]
    command += ["plan.chip=MI300X", "plan.num_devices=8", f"output_dir={tmp_path / 'run'}", *settings]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("plan: 40 documents") == num_plans
    assert "8 x MI300X at 40% of the peak rate" in result.stdout
    assert not (tmp_path / "run").exists()


def live_bytes() -> int:
    """Bytes of all tensors that Python sees."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class PeakOfTensors(TrainerCallback):
    """Largest sum of the bytes of all tensors during training, by PyTorch's profiler; some were there before."""

    def __init__(self) -> None:
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.num_bytes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin with the weights, in a process of its own with all that DeepSpeed has made."""
        weights = sum(4 * parameter.numel() for parameter in model.parameters())
        self.num_bytes = live_bytes() if torch.distributed.is_initialized() else weights
        self.profiler.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add up allocations and releases in order."""
        self.profiler.stop()
        events = [e for e in self.profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.num_bytes += int(np.cumsum(changes).max())


@pytest.mark.parametrize(
    ("num_rows", "trainer"),
    [
        (2000, {}),
        pytest.param(20_000, {}, marks=pytest.mark.slow),
        pytest.param(2000, {"bf16": True}, marks=pytest.mark.slow),
        pytest.param(2000, {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(2000, {"gradient_checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_the_planned_memory_is_within_15_percent_of_what_a_run_takes(
    chats_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, num_rows: int, trainer: dict[str, Any]
) -> None:
    config = with_large_model(chats_file, tokenizer, tmp_path, num_rows, **trainer)
    check_peak(config, 0.15)


def with_large_model(
    chats_file: Path, tokenizer: PreTrainedTokenizerBase, folder: Path, num_rows: int, **trainer: Any
) -> Config:
    """A run of two steps whose tensors are mostly those that the plan counts."""
    build_model("qwen2", seed=0, num_rows=num_rows, num_hidden_layers=4, **SHAPE).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    config = experiment(folder / "base", chats_file, folder / "run", max_steps=2, num_train_epochs=4, **trainer)
    return replace(config, data=replace(config.data, slot_budget=2048))


def check_peak(config: Config, tolerance: float) -> None:
    """Train, and compare the plan's peak with what the tensors took."""
    taken = PeakOfTensors()
    train(config, [taken])
    planned = json.loads((Path(config.output_dir) / "plan.json").read_text())["memory_gb"]["peak"]
    assert planned == pytest.approx(taken.num_bytes / 1e9, rel=tolerance)


RANK = """
import pickle, sys
from pathlib import Path
import torch
from test_plan import check_peak
torch.set_num_threads(1)
check_peak(pickle.loads(Path(sys.argv[1]).read_bytes()), 0.15)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1])
def test_the_planned_memory_of_zero_in_bfloat16_is_within_15_percent_of_what_two_processes_take(
    chats_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: int
) -> None:
    config = with_large_model(chats_file, tokenizer, tmp_path, 20_000, bf16=True)
    deepspeed = yaml.safe_load((ROOT / "conf" / "deepspeed" / f"zero{stage}.yaml").read_text())
    deepspeed["zero_optimization"]["reduce_bucket_size"] = 1_000_000
    (tmp_path / "config").write_bytes(pickle.dumps(replace(config, deepspeed=deepspeed)))
    (tmp_path / "rank.py").write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "rank.py"), str(tmp_path / "config")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
