"""From a target's cached scores to a trained draft: what is read, what is refused, what is learnt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import InterruptAfter, log_lines, weights
from tiny import build_model, experiment, with_settings
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments

from pard_train.config import Config, DataConfig, DraftConfig, ObjectiveConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encode_corpus
from pard_train.data.packing import Member, PackedDataset, PardCollator
from pard_train.data.scores import open_teacher
from pard_train.data.store import TokenStore
from pard_train.errors import UserError
from pard_train.layout import IGNORE_INDEX, DrawKey
from pard_train.model import load_causal_lm, load_tokenizer
from pard_train.runs import seal_folder
from pard_train.targets.scoring import score as score_program
from pard_train.training.arguments import training_settings
from pard_train.training.trainer import build_trainer, teacher_of, train
from pard_train.validation import validate_train

ROOT = Path(__file__).parents[1]
TOP_K = 8
KD = ObjectiveConfig(ce=0.0, kd=1.0)
EVERYTHING = ObjectiveConfig(ce=0.1, kd=1.0, lk=0.2, depth_decay=0.9, cat=True, dpace=True)


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A target of the same family that says other things."""
    folder = tmp_path_factory.mktemp("target") / "target"
    build_model("qwen2", seed=9).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, chats_file: Path, target_folder: Path) -> Path:
    """The folder of scores of forty documents."""
    output_dir = tmp_path_factory.mktemp("scored")
    encoder = ChatEncoder(load_tokenizer(str(base_folder)))
    encode_corpus(DataConfig(source=str(chats_file), max_length=256), encoder, output_dir / "tokens")
    config = experiment(base_folder, chats_file, output_dir)
    return score_program(with_settings(config, "score", target=str(target_folder), top_k=TOP_K, batch_tokens=500))


def with_teacher(
    base: Path, scored: Path, output_dir: Path, objective: ObjectiveConfig = KD, **trainer: object
) -> Config:
    """An experiment on the tokens that were scored."""
    config = experiment(base, scored.parents[1], output_dir, **trainer)
    data = replace(config.data, scores=None if objective == ObjectiveConfig() else str(scored))
    return replace(config, data=data, objective=objective)


# ---------------------------------------------------------------------------------------------------------------------
# What a slot is taught
# ---------------------------------------------------------------------------------------------------------------------


def scored_members(scored: Path) -> list[Member]:
    """All documents, with scores."""
    store = TokenStore.open(scored.parents[1])
    scores = open_teacher(scored, store)
    return [Member(store[i], DrawKey(0, 0, i), scores.of_document(i)) for i in range(len(store))]


def test_every_slot_is_taught_what_the_target_thinks_of_the_token_it_predicts(scored: Path) -> None:
    members = scored_members(scored)[:6]
    batch = PardCollator(DraftConfig(), EVERYTHING, 301, 3000)([members])
    layout = zip(*(batch[name][0].tolist() for name in ("document", "anchor", "depth", "labels")), strict=True)
    supervised = [(d, a, depth) for d, a, depth, label in layout if label != IGNORE_INDEX]
    logprobs = batch["teacher_logprobs"][0].numpy()
    static = batch["weight"][0][batch["labels"][0] != IGNORE_INDEX].tolist()
    assert batch["teacher_ids"].shape == batch["teacher_logprobs"].shape == (1, len(supervised), TOP_K)
    assert max(depth for _, _, depth in supervised) == 7
    for slot, (number, anchor, depth) in enumerate(supervised):
        document, scores = members[number].document, members[number].scores
        row = {token: i for i, token in enumerate(np.flatnonzero(document.loss_mask).tolist())}
        token = anchor + depth + 1
        assert np.array_equal(batch["teacher_ids"][0, slot], scores.top_ids[row[token]])
        assert np.array_equal(logprobs[slot], scores.top_logprobs[row[token]])
        before = sum(float(scores.label_logprobs[row[anchor + m]]) for m in range(1, depth + 1))
        assert static[slot] == pytest.approx(0.9**depth * np.exp(before), rel=1e-4)


@pytest.mark.parametrize(
    "objective, extra",
    [
        (ObjectiveConfig(), set()),
        (ObjectiveConfig(dpace=True), set()),
        (ObjectiveConfig(cat=True), set()),
        (KD, {"teacher_ids", "teacher_logprobs"}),
    ],
)
def test_a_batch_carries_of_the_target_only_what_the_objective_needs(
    scored: Path, objective: ObjectiveConfig, extra: set[str]
) -> None:
    collate = PardCollator(DraftConfig(), objective, 301, 3000)
    plain = PardCollator(DraftConfig(), ObjectiveConfig(), 301, 3000)([scored_members(scored)[:3]])
    assert set(collate([scored_members(scored)[:3]])) == set(collate([[]])) == set(plain) | extra


def test_the_number_of_loader_workers_changes_nothing_of_the_teacher(scored: Path) -> None:
    store = TokenStore.open(scored.parents[1])
    bounds = store.slot_bounds(DraftConfig())
    dataset = PackedDataset(
        store, bounds, slot_budget=800, num_epochs=1, seed=0, packs_per_step=7, scores=open_teacher(scored, store)
    )
    collate = PardCollator(DraftConfig(), EVERYTHING, 301, 800)
    runs = [
        list(DataLoader(dataset, collate_fn=collate, num_workers=n, multiprocessing_context="spawn" if n else None))
        for n in (0, 1)
    ]
    assert len(runs[0]) == len(runs[1]) == len(dataset)
    for first, second in zip(*runs, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_documents_without_scores_do_not_train_an_objective_that_needs_them(scored: Path) -> None:
    members = [replace(member, scores=None) for member in scored_members(scored)[:2]]
    with pytest.raises(ValueError, match=r"chats\.jsonl:1 has no scores, but the objective needs them"):
        PardCollator(DraftConfig(), KD, 301, 3000)([members])


# ---------------------------------------------------------------------------------------------------------------------
# What is learnt
# ---------------------------------------------------------------------------------------------------------------------


def mean_kl(draft: Path, target: Path, scored: Path) -> float:
    """KL divergence from target to draft over the whole vocabulary, at the true context of every supervised token."""
    models = [load_causal_lm(str(folder), dtype=torch.float32).eval() for folder in (target, draft)]
    store, sums = TokenStore.open(scored.parents[1]), []
    for document in store:
        ids = torch.from_numpy(document.input_ids).long()[None]
        places = torch.from_numpy(np.flatnonzero(document.loss_mask) - 1)
        with torch.no_grad():
            p, q = (model(ids).logits[0, places].log_softmax(dim=-1) for model in models)
        sums.append((p.exp() * (p - q)).sum(dim=1))
    return float(torch.cat(sums).mean())


def test_distillation_brings_the_draft_nearer_to_the_target_where_labels_lead_away(
    base_folder: Path, target_folder: Path, scored: Path, tmp_path: Path
) -> None:
    schedule = {"num_train_epochs": 8, "learning_rate": 3e-3}
    before = mean_kl(base_folder, target_folder, scored)
    after = {}
    for name, objective in (("kd", KD), ("ce", ObjectiveConfig()), ("lk", ObjectiveConfig(ce=0.0, lk=1.0))):
        config = with_teacher(base_folder, scored, tmp_path / name, objective, **schedule)
        after[name] = mean_kl(train(config), target_folder, scored)
    assert after["kd"] < 0.8 * before
    assert after["kd"] < after["ce"]
    assert after["lk"] < after["ce"]
    log = log_lines(with_teacher(base_folder, scored, tmp_path / "kd"))
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_every_weight_and_term_together_trains_and_resumes_bit_for_bit(
    base_folder: Path, scored: Path, tmp_path: Path
) -> None:
    whole = with_teacher(base_folder, scored, tmp_path / "whole", EVERYTHING, max_steps=6, save_steps=3)
    train(whole)
    cut = replace(whole, output_dir=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        train(cut, callbacks=[InterruptAfter(4)])
    draft = train(replace(cut, resume=True))
    expected = weights(tmp_path / "whole" / "draft")
    assert all(torch.equal(value, expected[name]) for name, value in weights(draft).items())
    losses = [[row["loss"] for row in log_lines(config)] for config in (whole, cut)]
    assert losses[0] == losses[1]
    assert all(np.isfinite(losses[0]))


def test_the_loss_of_a_step_is_normalized_by_the_static_weights_of_its_packs(
    base_folder: Path, scored: Path, tmp_path: Path
) -> None:
    """Against the terms of every slot, with D-PACE as a factor above the line only."""
    config = with_teacher(base_folder, scored, tmp_path / "run", EVERYTHING, max_steps=1, gradient_accumulation_steps=3)
    train(config)
    store = TokenStore.open(scored.parents[1])
    trainer = build_trainer(config, TrainingArguments(**training_settings(config)), store, teacher_of(config, store))
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(3)]
    total = sum(float(batch["weight"].sum()) for batch in batches)
    cat_only = sum(float((batch["weight"] * 0.9 ** -batch["depth"]).sum()) for batch in batches)
    slots = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
    assert total < cat_only < slots
    with torch.no_grad():
        losses = [float(trainer.pack_loss(trainer.model, batch, 1.0)[0]) for batch in batches]
    assert log_lines(config)[0]["loss"] == pytest.approx(sum(losses) / total, rel=1e-4)


def test_two_commands_score_and_distil(
    base_folder: Path, chats_file: Path, target_folder: Path, tmp_path: Path
) -> None:
    encoder = ChatEncoder(load_tokenizer(str(base_folder)))
    encode_corpus(DataConfig(source=str(chats_file), max_length=256), encoder, tmp_path / "tokens")
    common = [f"model.path={base_folder}", "data.max_length=256"]
    output = run_program(
        "data_scripts/score.py", *common, f"output_dir={tmp_path}", f"targets=[{target_folder}]", "score.top_k=8"
    )
    last_line = output.splitlines()[-1]
    assert last_line.startswith("train with data.source=")
    given = last_line.removeprefix("train with ").split()
    small = ["data.slot_budget=2048", "trainer.max_steps=2", "trainer.bf16=false", "trainer.logging_steps=1"]
    run_dir = tmp_path / "run"
    output = run_program(
        "recipes/train.py", *common, *given, *small, "objective=kd", "trainer.save_steps=0", f"output_dir={run_dir}"
    )
    assert f"teacher {target_folder} in float32, top 8: " in output
    assert json.loads((run_dir / "teacher.json").read_text())["target"] == str(target_folder)
    assert json.loads((run_dir / "config.json").read_text())["data"]["scores"] == given[1].removeprefix("data.scores=")
    assert (run_dir / "draft" / "model.safetensors").is_file()


def run_program(*command: str) -> str:
    """Standard output of a program that ends well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, words",
    [
        (
            KD,
            r"objective\.kd=1\.0 needs data\.scores, which is null.*data_scripts/score",
        ),
        (ObjectiveConfig(lk=0.5), r"objective\.lk=0\.5 needs data\.scores"),
        (ObjectiveConfig(cat=True), r"objective\.cat=True needs data\.scores"),
        (ObjectiveConfig(ce=0.0), r"objective\.ce, objective\.kd and objective\.lk are all 0"),
        (ObjectiveConfig(ce=-1.0), r"objective\.ce=-1\.0: must be at least 0"),
        (ObjectiveConfig(ce=float("nan")), r"objective\.ce=nan"),
        (ObjectiveConfig(depth_decay=0.0), r"objective\.depth_decay=0\.0: must be above 0"),
        (ObjectiveConfig(dpace=True, dpace_alpha=1.5), r"objective\.dpace_alpha=1\.5"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_by_its_settings(
    base_folder: Path, chats_file: Path, tmp_path: Path, objective: ObjectiveConfig, words: str
) -> None:
    config = experiment(base_folder, chats_file, tmp_path / "run")
    config = replace(config, data=replace(config.data, slot_budget=4096))
    validate_train(config)
    with pytest.raises(UserError, match=words):
        validate_train(replace(config, objective=objective))


@pytest.fixture
def copy_of_scores(scored: Path, tmp_path: Path) -> Iterator[Path]:
    """Scores that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in scored.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    yield folder


def test_scores_that_are_missing_or_unfinished_are_refused(scored: Path, copy_of_scores: Path) -> None:
    store = TokenStore.open(scored.parents[1])
    with pytest.raises(UserError, match=rf"no manifest\.json.*choose one of {scored}"):
        open_teacher(scored.parent, store)
    with pytest.raises(UserError, match=r"data\.scores=/nowhere has no manifest\.json.*score\.py"):
        open_teacher(Path("/nowhere"), store)
    with pytest.raises(UserError, match=r"data\.scores=.* of this version"):
        open_teacher(scored.parents[1], store)  # the folder of the tokens has a manifest too
    (copy_of_scores / "files.json").unlink()  # the seal is written last
    done = np.load(copy_of_scores / "done.npy")
    done[3:5] = False
    np.save(copy_of_scores / "done.npy", done)
    with pytest.raises(UserError, match="2 of 40 documents"):
        open_teacher(copy_of_scores, store)
    (copy_of_scores / "top_ids.npy").unlink()
    with pytest.raises(UserError, match=r"top_ids\.npy is missing"):
        open_teacher(copy_of_scores, store)


def test_scores_of_other_tokens_leave_the_output_folder_free(
    base_folder: Path, chats_file: Path, scored: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "other.jsonl"
    chats.write_text("".join(reversed(chats_file.read_text().splitlines(keepends=True))))  # just as many tokens
    config = with_teacher(base_folder, scored, tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.scores=.* \(source_version: \w+ -> \w+\): score these"):
        train(replace(config, data=replace(config.data, source=str(chats))))
    assert not (tmp_path / "run").exists()


def test_chats_that_are_encoded_on_the_way_take_the_scores_of_the_same_chats(
    base_folder: Path, chats_file: Path, scored: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "moved.jsonl"
    chats.write_bytes(chats_file.read_bytes())
    config = with_teacher(base_folder, scored, tmp_path / "run", max_steps=1)
    train(replace(config, data=replace(config.data, source=str(chats))))
    assert (tmp_path / "run" / "teacher.json").is_file()


def test_scores_that_nothing_uses_are_mentioned_and_not_read(
    base_folder: Path, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_teacher(base_folder, scored, tmp_path / "run", ObjectiveConfig())
    config = replace(config, data=replace(config.data, scores="/nowhere"))
    assert teacher_of(config, TokenStore.open(scored.parents[1])) is None
    assert capsys.readouterr().out.count("data.scores=/nowhere is not used") == 1


def test_a_run_does_not_go_on_with_another_teacher(
    base_folder: Path, scored: Path, copy_of_scores: Path, tmp_path: Path
) -> None:
    config = with_teacher(base_folder, copy_of_scores, tmp_path / "run", max_steps=2, save_steps=1)
    config = replace(config, data=replace(config.data, source=str(scored.parents[1])))
    with pytest.raises(KeyboardInterrupt):
        train(config, callbacks=[InterruptAfter(1)])
    manifest = json.loads((copy_of_scores / "manifest.json").read_text())
    manifest["identity"]["target"] = "another"
    (copy_of_scores / "manifest.json").write_text(json.dumps(manifest))
    seal_folder(copy_of_scores)
    with pytest.raises(UserError, match=r"was started with other data.scores"):
        train(replace(config, resume=True))
