"""Training in one process: normalization, resume, and what is written."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import NUM_ROWS, build_model, experiment
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from pard_train.config import Config, TrainerConfig
from pard_train.core.attention import attention_inputs
from pard_train.core.objectives import PackLoss
from pard_train.data.chat import ChatEncoder
from pard_train.data.store import open_store
from pard_train.errors import UserError
from pard_train.layout import SlotLayout, is_visible
from pard_train.model import inspect_base, write_initial_draft
from pard_train.runs import SEAL_FILE, newest_checkpoint, seal_folder
from pard_train.training.arguments import training_settings
from pard_train.training.inputs import check_output
from pard_train.training.throughput import ModelShape, Work, step_flops
from pard_train.training.trainer import build_trainer, train


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights of a model folder."""
    return load_file(folder / "model.safetensors")


def log_lines(config: Config) -> list[dict[str, float]]:
    """metrics.jsonl of a run, without the summary line at its end."""
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def test_training_lowers_the_loss_and_raises_the_expected_accepted_length(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", num_train_epochs=6, learning_rate=3e-3)
    draft = train(config)
    log = log_lines(config)
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]
    assert log[-1]["accepted_length"] > log[0]["accepted_length"]
    assert {"accuracy/depth_0", "accuracy/depth_3", "supervised_slots_per_second"} <= log[0].keys()
    assert log[-1]["epoch"] == pytest.approx(6, abs=0.01)
    assert json.loads((draft / "config.json").read_text())["pard_token"] == 300
    assert "lm_head.weight" not in weights(draft)  # tied embeddings stay tied


def test_the_log_has_the_throughput_of_each_window(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=3, gradient_accumulation_steps=2)
    train(config)
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer))
    trainer = build_trainer(config, TrainingArguments(**training_settings(config)), store)
    shape = ModelShape.of(trainer.model.config)
    assert shape is not None
    for step, row in enumerate(log_lines(config)):
        batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in (2 * step, 2 * step + 1)]
        seconds = row["supervised_slots"] / row["supervised_slots_per_second"]
        num_slots = sum(int((batch["document"] >= 0).sum()) for batch in batches)
        num_pairs = sum(visible_pairs(batch) for batch in batches)
        num_supervised = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        num_tokens = sum(int(((batch["labels"] >= 0) & (batch["depth"] == 0)).sum()) for batch in batches)
        flops = sum(step_flops(shape, Work(num_slots, num_supervised, num_pairs)))
        assert row["throughput/slots_per_second"] * seconds == pytest.approx(num_slots)
        assert row["throughput/supervised_tokens_per_second"] * seconds == pytest.approx(num_tokens)
        assert row["throughput/model_flops_per_second"] * seconds == pytest.approx(flops)
        assert row["throughput/seconds_per_step"] == pytest.approx(seconds)  # a log at every step
        assert 0 < row["throughput/data_wait_share"] < 1
        assert "throughput/mfu" not in row  # the peak rate of this processor is not known
        assert "throughput/peak_memory_gb" not in row


def test_waiting_for_data_is_logged_as_a_share_of_the_time(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=2)
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer))
    write_initial_draft(base, 4, tmp_path / "run" / "init")
    trainer = build_trainer(config, TrainingArguments(**training_settings(config)), store)
    collate = trainer.data_collator

    def collate_slowly(features: list) -> dict[str, Tensor]:
        time.sleep(0.3)
        return collate(features)

    trainer.data_collator = collate_slowly
    trainer.train()
    row = log_lines(config)[-1]
    seconds = row["supervised_slots"] / row["supervised_slots_per_second"]
    assert 0.3 <= row["throughput/data_wait_share"] * seconds <= seconds


def visible_pairs(batch: dict[str, Tensor]) -> int:
    """Pairs of slots that see each other, by the mask itself."""
    layout = SlotLayout(*(batch[name][0] for name in ("document", "anchor", "depth")))
    real = layout[layout.document >= 0]
    return int(is_visible(real, real).sum())


LOADING_SECONDS = 3.0  # more than a first step takes on a busy machine


class SlowStart(TrainerCallback):
    """Stands for a checkpoint that takes long to load."""

    def on_train_begin(self, *_: object, **__: object) -> None:
        time.sleep(LOADING_SECONDS)


def test_what_comes_before_the_first_step_is_no_part_of_the_logged_speed(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=1)
    train(config, callbacks=[SlowStart()])
    (row,) = log_lines(config)
    assert row["supervised_slots"] / row["supervised_slots_per_second"] < LOADING_SECONDS


def test_a_model_that_scales_its_logits_trains_on_its_own_logits(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    """The loss of its head alone would be another one."""
    config = experiment(base_folder, chats_file, tmp_path / "run")
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer))
    write_initial_draft(base, 4, tmp_path / "run" / "init")
    trainer = build_trainer(config, TrainingArguments(**training_settings(config)), store)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    model = build_scaling_model()
    pack_loss = PackLoss(model, "dense", 4)
    assert pack_loss.head is None
    loss, statistics = pack_loss(model, batch, 1.0)
    layout = SlotLayout(*(batch[name][0] for name in ("document", "anchor", "depth")))
    logits = model(batch["input_ids"], position_ids=layout.position[None], **attention_inputs("dense", layout)).logits
    expected = torch.nn.functional.cross_entropy(logits[0], batch["labels"][0], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert float(statistics.loss.sum()) == pytest.approx(float(loss.detach()), rel=1e-5)


def build_scaling_model() -> PreTrainedModel:
    """A tiny model that divides its logits by four."""
    config = GraniteConfig(
        vocab_size=NUM_ROWS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logits_scaling=4.0,
        initializer_range=0.5,
    )
    return AutoModelForCausalLM.from_config(config)


def test_one_pack_eight_times_and_eight_packs_in_accumulation_are_the_same_mean(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    """The logged loss and the gradient of an accumulated step are those of the union of its packs."""
    config = experiment(base_folder, chats_file, tmp_path / "run", gradient_accumulation_steps=4)
    train(replace(config, trainer=replace(config.trainer, max_steps=1)))
    base = inspect_base(config.model, config.draft)
    store = open_store(config.data, ChatEncoder(base.tokenizer))
    trainer = build_trainer(config, TrainingArguments(**training_settings(config)), store)
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(4)]
    total = torch.stack([batch["weight"].sum() for batch in batches]).sum()
    with torch.no_grad():
        loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=total) for batch in batches)
        means = [trainer.compute_loss(trainer.model, b, num_items_in_batch=b["weight"].sum()) for b in batches]
    assert log_lines(config)[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert abs(float(torch.stack(means).mean()) - float(loss)) > 1e-4  # a mean of means would be another number


@pytest.mark.slow
def test_accumulating_two_by_four_and_four_by_two_train_the_same_model(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    """The same four documents per step, cut into packs of different sizes, give the same step."""
    small = experiment(base_folder, chats_file, tmp_path / "small", gradient_accumulation_steps=32)
    large = replace(small, data=replace(small.data, slot_budget=4096), output_dir=str(tmp_path / "large"))
    for config in (small, large):
        train(config)
    first, second = weights(tmp_path / "small" / "draft"), weights(tmp_path / "large" / "draft")
    assert len(log_lines(small)) == len(log_lines(large)) == 1  # all documents in one step
    assert log_lines(small)[0]["loss"] == pytest.approx(log_lines(large)[0]["loss"], rel=1e-5)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    whole = experiment(base_folder, chats_file, tmp_path / "whole", num_train_epochs=2, save_steps=3)
    train(whole)
    cut = replace(whole, output_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, callbacks=[InterruptAfter(5)])
    assert not (tmp_path / "cut" / "draft").exists()
    draft = train(replace(cut, resume=True))
    expected = weights(tmp_path / "whole" / "draft")
    for name, value in weights(draft).items():
        assert torch.equal(value, expected[name]), name
    clocks = ("supervised_slots_per_second", "throughput/")
    rows = [
        [{name: value for name, value in row.items() if not name.startswith(clocks)} for row in log_lines(config)]
        for config in (whole, cut)
    ]
    assert rows[0] == rows[1]


class InterruptAfter(TrainerCallback):
    """Ends training after so many steps as a signal would: no final checkpoint, no draft folder."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step == self.steps:
            raise KeyboardInterrupt


def test_a_truncated_checkpoint_is_refused_and_an_unfinished_one_passed_over(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=4, save_steps=2)
    train(config)
    newest = tmp_path / "run" / "checkpoint-4"
    damaged = newest / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    (tmp_path / "run" / "draft").rename(tmp_path / "first")
    with pytest.raises(UserError, match=r"optimizer\.pt is truncated: 1000 bytes of \d+"):
        train(replace(config, resume=True))
    (newest / SEAL_FILE).unlink()
    draft = train(replace(config, resume=True))  # from checkpoint-2
    first = weights(tmp_path / "first")
    assert all(torch.equal(value, first[name]) for name, value in weights(draft).items())


def test_a_base_whose_generation_config_cannot_be_saved_is_trained_and_keeps_it(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(base_folder, tmp_path / "base")
    published = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0], "max_length": 2048}  # and no do_sample
    (base / "generation_config.json").write_text(json.dumps(published))
    draft = train(experiment(base, chats_file, tmp_path / "run", max_steps=1, save_steps=1))
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert json.loads((draft / "generation_config.json").read_text()) == published


def test_the_row_of_the_padding_token_learns_like_the_others(
    tokenizer: PreTrainedTokenizerBase, chats_file: Path, tmp_path: Path
) -> None:
    """Many models pad with the end of a turn, which every chat has."""
    model = build_model("qwen2", seed=0, tied=False)
    model.config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    draft = train(experiment(tmp_path / "base", chats_file, tmp_path / "run", max_steps=2))
    before, after = (weights(f)["model.embed_tokens.weight"] for f in (tmp_path / "run" / "init", draft))
    assert (after[tokenizer.eos_token_id] - before[tokenizer.eos_token_id]).abs().max() > 1e-4


@pytest.mark.parametrize("last_checkpoint", [0, 1])
def test_a_finished_run_that_is_resumed_keeps_its_draft_and_log(
    last_checkpoint: int, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    """Also if its last checkpoint is older than its end, as those of minutes and signals are."""
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=2, save_steps=last_checkpoint)
    draft = train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2", ignore_errors=True)
    assert (newest_checkpoint(tmp_path / "run") is not None) == bool(last_checkpoint)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert train(replace(config, resume=True)) == draft
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_learning_rate_that_cannot_rise_and_fall_within_the_run_is_refused(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    settings = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "max_steps": 4}
    with pytest.raises(UserError, match=r"warmup_steps=2 and trainer\.decay_steps=3 exceed the 4 steps of this run"):
        train(experiment(base_folder, chats_file, tmp_path / "long", decay_steps=3, **settings))
    train(experiment(base_folder, chats_file, tmp_path / "fits", decay_steps=2, **settings))


def test_an_optimizer_or_attention_that_a_library_lacks_is_refused_before_anything_is_written(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", optim="adamw_tourch")
    with pytest.raises(UserError, match=r"trainer\.optim=adamw_tourch"):
        check_output(config)
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match=r"model\.attention=flex cannot train on the CPU"):
            check_output(replace(config, trainer=TrainerConfig(), model=replace(config.model, attention="flex")))
    assert not (tmp_path / "run").exists()


def test_an_output_folder_with_another_run_is_left_alone(
    base_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=1)
    train(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        train(config)
    changed = replace(config, resume=True, seed=7)
    with pytest.raises(UserError, match="seed: 42 -> 7"):
        train(changed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trained by 1 processes, not 2: a step has 1 packs; start 1 processes"):
        train(replace(config, resume=True))
    sharded = replace(config, resume=True, deepspeed={"zero_optimization": {"stage": 1}})
    with pytest.raises(UserError, match="one part per process"):
        train(sharded)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_a_start_that_fails_on_bad_data_leaves_the_output_folder_free(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=1)
    with pytest.raises(UserError, match=r"chats\.jsonl:\d+: \d+ tokens, but data\.max_length=20"):
        train(replace(config, data=replace(config.data, max_length=20, overlong="error")))
    assert not (tmp_path / "run").exists()
    train(config)


# ---------------------------------------------------------------------------------------------------------------------
# Going on with a run
# ---------------------------------------------------------------------------------------------------------------------


def checkpoints(config: Config) -> list[str]:
    return sorted(path.name for path in Path(config.output_dir).glob("checkpoint-*"))


def test_a_run_that_has_done_its_steps_takes_none_more_when_it_is_resumed(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=4, save_steps=2)
    first, before = weights(train(config)), checkpoints(config)
    shutil.rmtree(tmp_path / "run" / "draft")  # killed after the last checkpoint
    again = weights(train(replace(config, resume=True)))
    assert all(torch.equal(value, first[name]) for name, value in again.items())
    assert [row["step"] for row in log_lines(config)] == [1, 2, 3, 4]
    assert checkpoints(config) == before


def test_a_run_does_not_go_on_with_other_chats(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_bytes(chats_file.read_bytes())
    config = experiment(base_folder, own, tmp_path / "run", save_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAfter(2)])
    own.write_bytes(b"".join(chats_file.read_bytes().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError, match="source_version"):
        train(replace(config, resume=True))
    own.write_bytes(chats_file.read_bytes())
    train(replace(config, resume=True))


def test_a_log_line_that_a_full_disk_cut_is_dropped_when_the_run_goes_on(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAfter(3)])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 6.0')
    train(replace(config, resume=True))
    steps = [row["step"] for row in log_lines(config)]
    assert steps == list(range(1, len(steps) + 1))


def test_the_checkpoint_before_stays_until_the_new_one_is_whole(
    base_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        seal_folder(folder)

    config = experiment(base_folder, chats_file, tmp_path / "run", save_steps=2, save_total_limit=1)
    monkeypatch.setattr("pard_train.training.callbacks.seal_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    train(replace(config, resume=True))
    assert len(checkpoints(config)) == 1


def test_a_resumed_run_logs_and_saves_as_often_as_it_is_told_now(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", save_steps=4, logging_steps=4, max_steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAfter(5)])
    told = replace(config.trainer, save_steps=3, logging_steps=1, save_total_limit=9)
    train(replace(config, resume=True, trainer=told))
    assert [row["step"] for row in log_lines(config)] == [1, 4, 5, 6, 7, 8]
    assert checkpoints(config) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_more_steps_than_the_epochs_hold_are_no_further_epochs(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run", max_steps=1000, num_train_epochs=1)
    train(config)
    last = log_lines(config)[-1]
    assert last["epoch"] == pytest.approx(1)
    assert (
        f"trainer.max_steps=1000: trainer.num_train_epochs ends after {last['step']} steps" in capsys.readouterr().out
    )


class CountLayers(TrainerCallback):
    """Counts the forward passes of all layers."""

    passes = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.register_forward_pre_hook(self.count)

    def count(self, *_: object) -> None:
        self.passes += 1


def test_gradient_checkpointing_computes_every_layer_twice_and_the_same_result(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    drafts, counts = [], [CountLayers(), CountLayers()]
    for is_on, count in zip((False, True), counts, strict=True):
        run = experiment(base_folder, chats_file, tmp_path / str(is_on), max_steps=2, gradient_checkpointing=is_on)
        drafts.append(weights(train(run, [count])))
    assert [count.passes for count in counts] == [2 * 2, 2 * 2 * 2]  # steps, layers; and again for the gradients
    for name, value in drafts[0].items():
        torch.testing.assert_close(drafts[1][name], value, atol=1e-6, rtol=0)
