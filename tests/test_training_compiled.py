"""Training through `torch.compile`: the same training, compiled once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_model, conversations, experiment
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from pard_train.config import Config, DraftConfig, ObjectiveConfig
from pard_train.core import head as slot_head
from pard_train.core.attention import IMPLEMENTATIONS, attention_inputs
from pard_train.data.chat import ChatEncoder
from pard_train.data.packing import Member, PardCollator
from pard_train.layout import DrawKey, SlotLayout
from pard_train.training.throughput import num_compilations
from pard_train.training.trainer import train

NUM_STEPS = 6
WARM_UP_STEPS = 2  # the first pack is compiled for, and the second, whose number of supervised slots is another one


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch.compiler.reset()


def log_lines(config: Config) -> list[dict[str, float]]:
    """metrics.jsonl of a run, without the summary line at its end."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


class AfterStep(TrainerCallback):
    """Calls a function after a step."""

    def __init__(self, step: int, action: Callable[[], object]):
        self.step, self.action = step, action

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.mark.parametrize("is_head_compiled", [False, True])  # as it is on an accelerator
def test_a_compiled_model_is_compiled_once_and_trains_as_ever(
    base_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_head_compiled: bool
) -> None:
    """Packs differ in documents, chains and supervised slots. None of it is compiled for."""
    plain = experiment(base_folder, chats_file, tmp_path / "plain", max_steps=NUM_STEPS)
    compiled = replace(plain, trainer=replace(plain.trainer, torch_compile=True), output_dir=str(tmp_path / "compiled"))
    expected = load_file(train(plain) / "model.safetensors")
    if is_head_compiled:
        monkeypatch.setattr(slot_head, "EAGER_DEVICES", ())
    try:
        forbid = AfterStep(WARM_UP_STEPS, lambda: torch.compiler.set_stance("fail_on_recompile"))
        weights = load_file(train(compiled, callbacks=[forbid]) / "model.safetensors")
    finally:
        torch.compiler.set_stance("default")
    log = log_lines(compiled)
    assert log[0]["throughput/compilations"] > 0
    assert [row["throughput/compilations"] for row in log[WARM_UP_STEPS:]] == [0] * (NUM_STEPS - WARM_UP_STEPS)
    assert len({row["supervised_slots"] for row in log[WARM_UP_STEPS:]}) > 1
    for ours, theirs in zip(log, log_lines(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert "throughput/compilations" not in theirs
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, atol=1e-4, rtol=0)


def test_a_compiled_run_resumes_to_the_same_weights(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=4, save_steps=2, torch_compile=True)
    whole = load_file(train(config) / "model.safetensors")
    (tmp_path / "run" / "draft").rename(tmp_path / "whole")
    (tmp_path / "run" / "checkpoint-4" / "files.json").unlink()  # as if it had been interrupted there
    again = load_file(train(replace(config, resume=True)) / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_compiling_again_after_the_first_window_is_said_once(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=NUM_STEPS, torch_compile=True)
    train(config, callbacks=[AfterStep(step, torch.compiler.reset) for step in (3, 4)])
    counts = [row["throughput/compilations"] for row in log_lines(config)]
    assert [count > 0 for count in counts[2:5]] == [False, True, True]
    printed = capsys.readouterr()
    warnings = re.findall(r"step +(\d+) .*?recompiled (\d+) graphs", printed.out + printed.err)
    assert warnings == [("4", str(counts[3]))]


@pytest.mark.parametrize("is_compiled", [False, True])
def test_flex_attention_is_compiled_once_for_all_packs_of_a_run(
    is_compiled: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Alone or with the model around it; without gradients, which it has none of on a CPU."""
    model = build_model("qwen2", seed=0)
    model.set_attn_implementation(IMPLEMENTATIONS["flex"])
    forward = torch.compile(model, fullgraph=True) if is_compiled else model
    collate = PardCollator(DraftConfig(), ObjectiveConfig(), 300, 1024)
    documents = ChatEncoder(tokenizer).encode(conversations(1, seed=5)[0], origin="chat")
    counts = []
    for epoch in range(4):
        batch = collate([[Member(document, DrawKey(0, epoch, 0)) for document in documents * (1 + epoch % 2)]])
        layout = SlotLayout(*(batch[name][0] for name in ("document", "anchor", "depth")))
        inputs = attention_inputs("flex", layout)
        before = num_compilations()
        with torch.no_grad():
            forward(batch["input_ids"], position_ids=layout.position[None], use_cache=False, **inputs)
        counts.append(num_compilations() - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_nothing_is_compiled_on_an_accelerator_after_the_first_steps(
    is_compiled: bool, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=NUM_STEPS, torch_compile=is_compiled)
    train(config)
    counts = [row["throughput/compilations"] for row in log_lines(config)]
    warm_up = WARM_UP_STEPS if is_compiled else 1
    assert counts[0] > 0
    assert counts[warm_up:] == [0] * (NUM_STEPS - warm_up)
