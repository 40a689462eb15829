"""Cached scores are the target's own log-probabilities, whole after a kill, and refused for other tokens."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_ROWS, VOCABULARY, build_model, config_for
from transformers import AutoModelForCausalLM, GraniteConfig

from pard_train.config import Config, DataConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encode_corpus
from pard_train.data.scores import Scores, write_scores
from pard_train.data.store import TokenStore
from pard_train.device import this_process
from pard_train.errors import UserError
from pard_train.model import load_causal_lm, load_tokenizer
from pard_train.targets.scoring import score as score_program
from pard_train.targets.target import load_targets

ROOT = Path(__file__).parents[1]
TOP_K = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, chats_file: Path) -> TokenStore:
    """Forty documents of one to three turns."""
    folder = tmp_path_factory.mktemp("scores") / "tokens"
    encode_corpus(DataConfig(source=str(chats_file)), ChatEncoder(load_tokenizer(str(base_folder))), folder)
    return TokenStore.open(folder)


def write_tokens(base_folder: Path, chats_file: Path, output_dir: Path) -> None:
    """What data_scripts/encode.py writes."""
    encoder = ChatEncoder(load_tokenizer(str(base_folder)))
    encode_corpus(DataConfig(source=str(chats_file)), encoder, output_dir / "tokens")


def write_stranger(family: str, base_folder: Path, folder: Path) -> Path:
    """A model whose tokenizer has an entry that the base's lacks."""
    build_model(family, seed=1).save_pretrained(folder)
    tokenizer = load_tokenizer(str(base_folder))
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(folder)
    return folder


def scoring(base: Path, folder: Path, **values: Any) -> Config:
    """The base model scores the tokens of a folder."""
    config = config_for("score", **{"target": str(base), "output_dir": str(folder), **values})
    config.model.path = str(base)
    return config


def check_against_direct_forward_passes(
    store: TokenStore, scores: Scores, target: torch.nn.Module, num_tokens: int = NUM_ROWS
) -> None:
    """Every score against one plain forward pass per document; the top k among the first `num_tokens` ids."""
    for number, document in enumerate(store):
        ids = torch.from_numpy(document.input_ids).long()
        with torch.no_grad():
            logprobs = target(ids[None]).logits[0].log_softmax(dim=-1)
        labels = np.flatnonzero(document.loss_mask)
        found, top_ids, top = scores.of_document(number)
        expected = logprobs[labels - 1, ids[labels]].numpy()
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)  # float16 keeps three digits
        best = logprobs[labels - 1, :num_tokens].topk(TOP_K)
        np.testing.assert_allclose(top, best.values.numpy(), rtol=2e-3, atol=2e-3)
        picked = logprobs[labels - 1].gather(1, torch.from_numpy(top_ids.astype(np.int64)))
        np.testing.assert_allclose(picked.numpy(), best.values.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_scores_are_those_of_a_direct_forward_pass_whatever_the_batches(
    store: TokenStore, base_folder: Path, tmp_path: Path, batch_tokens: int
) -> None:
    target = load_causal_lm(str(base_folder), dtype=torch.float32).eval()
    scores = Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    write_scores(lambda: target, store, scores, batch_tokens=batch_tokens, process=this_process())
    check_against_direct_forward_passes(store, Scores.open(tmp_path, store, top_k=TOP_K), target)


def test_a_killed_run_goes_on_with_what_is_missing(store: TokenStore, base_folder: Path, tmp_path: Path) -> None:
    target = load_causal_lm(str(base_folder), dtype=torch.float32).eval()
    calls = []

    class Killed(Exception):
        pass

    def stop_after_three(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Killed

    hook = target.register_forward_hook(lambda *_: None)
    handle = target.base_model.register_forward_pre_hook(stop_after_three)
    scores = Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    with pytest.raises(Killed):
        write_scores(lambda: target, store, scores, batch_tokens=200, process=this_process())
    num_done = int(scores.done.sum())
    assert 0 < num_done < len(store)
    calls[:] = [1] * 10
    again = Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    assert int(again.done.sum()) == num_done
    write_scores(lambda: target, store, again, batch_tokens=200, process=this_process())
    handle.remove()
    hook.remove()
    assert again.done.all()
    check_against_direct_forward_passes(store, again, target)
    write_scores(lambda: pytest.fail("nothing is missing"), store, again, batch_tokens=200, process=this_process())


def test_scores_of_other_tokens_or_another_k_are_refused(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"label_logprobs\.npy is missing"):
        Scores.open(tmp_path, store, top_k=TOP_K)
    Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    with pytest.raises(UserError, match=r"top_ids\.npy has shape \(\d+, 5\), but the tokens need \(\d+, 6\)"):
        Scores.open(tmp_path, store, top_k=TOP_K + 1)


def test_two_processes_share_the_work_and_the_manifest_says_what_a_token_costs(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    settings = [f"model.path={base_folder}", f"output_dir={tmp_path}", "score.top_k=5", f"targets=[{base_folder}]"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    write_tokens(base_folder, chats_file, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    score = [*torchrun, str(ROOT / "data_scripts" / "score.py"), *settings, "score.batch_tokens=1"]
    result = subprocess.run(score, timeout=180, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"score: 100%\D*(\d+)/", result.stderr)) == {"20"}  # one document a batch, every other one
    store = TokenStore.open(tmp_path / "tokens")
    (folder,) = (tmp_path / "tokens" / "scores").iterdir()
    scores = Scores.open(folder, store, top_k=5)
    assert scores.done.all()
    target = load_causal_lm(str(base_folder), dtype=torch.float32).eval()
    check_against_direct_forward_passes(store, scores, target, VOCABULARY)
    assert int(scores.top_ids.max()) < VOCABULARY < NUM_ROWS  # rows that no token names are nobody's choice
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["counts"] == {"documents": 40, "tokens": int(store.num_supervised().sum()), "bytes_per_token": 32}
    outside = 1 - np.exp(scores.top_logprobs.astype(np.float64)).sum(axis=1).mean()
    assert manifest["mass_outside_top_k"] == pytest.approx(outside, abs=1e-5)
    array_bytes = sum((folder / f"{name}.npy").stat().st_size for name in ("label_logprobs", "top_ids", "top_logprobs"))
    assert array_bytes == pytest.approx(32 * manifest["counts"]["tokens"], abs=3 * 128)  # and three headers


def test_processes_on_several_nodes_are_refused(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scoring(base_folder, tmp_path)
    monkeypatch.setitem(this_process().__dict__, "num_processes", 16)  # accelerate's, shared by all who ask
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"score\.py runs on one node"):
        score_program(config)


def test_a_target_spread_over_devices_scores_as_on_one(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    write_tokens(base_folder, chats_file, tmp_path)
    config = scoring(base_folder, tmp_path, top_k=TOP_K, device_map="auto")
    store = TokenStore.open(tmp_path / "tokens")
    scores = Scores.open(score_program(config), store, top_k=TOP_K)
    target = load_causal_lm(str(base_folder), dtype=torch.float32).eval()
    check_against_direct_forward_passes(store, scores, target, VOCABULARY)


def test_a_target_spread_over_devices_is_refused_in_several_processes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scoring(base_folder, tmp_path, device_map="auto")
    monkeypatch.setitem(this_process().__dict__, "num_processes", 8)
    with pytest.raises(UserError, match=r"inference\.device_map=auto spreads .* 8 were started"):
        load_targets(config)


def test_tokens_of_another_model_are_refused(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    write_tokens(base_folder, chats_file, tmp_path)
    other = write_stranger("qwen2", base_folder, tmp_path / "other")
    config = scoring(other, tmp_path)
    with pytest.raises(UserError, match=f"encoded with the tokenizer of {base_folder}, not with that of model.path"):
        score_program(config)


def test_a_revision_of_the_draft_that_its_target_would_not_have_is_refused(base_folder: Path, tmp_path: Path) -> None:
    config = scoring(base_folder, tmp_path, revision="v2")
    with pytest.raises(UserError, match=r"model\.revision=v2 applies to the draft"):
        score_program(config)


def test_a_target_of_another_family_is_refused(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    write_tokens(base_folder, chats_file, tmp_path)
    other = write_stranger("llama", base_folder, tmp_path / "other")
    with pytest.raises(UserError, match="have different tokenizers: 1 entries differ, the first is '<other>'"):
        score_program(scoring(base_folder, tmp_path, target=str(other)))


def test_a_target_that_scales_its_logits_is_scored_by_the_scaled_ones(store: TokenStore, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=NUM_ROWS, num_key_value_heads=2, logits_scaling=4.0, initializer_range=0.5, **shape
    )
    target = AutoModelForCausalLM.from_config(config).eval()
    scores = Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    write_scores(lambda: target, store, scores, batch_tokens=500, process=this_process())
    check_against_direct_forward_passes(store, scores, target)


def test_more_top_tokens_than_the_tokenizer_has_are_refused(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    write_tokens(base_folder, chats_file, tmp_path)
    with pytest.raises(UserError, match=f"score.top_k={VOCABULARY + 1}: the tokenizer has {VOCABULARY} tokens"):
        score_program(scoring(base_folder, tmp_path, top_k=VOCABULARY + 1))


def test_scores_in_another_process_are_the_same_files(store: TokenStore, tmp_path: Path) -> None:
    scores = Scores.open(tmp_path, store, top_k=TOP_K, create=True)
    scores.label_logprobs[:] = np.arange(len(scores.label_logprobs)) % 100
    pickled = pickle.dumps(scores)
    assert len(pickled) < 5000  # no score travels
    copy = pickle.loads(pickled)
    for number in range(len(store)):
        assert np.array_equal(copy.of_document(number).label_logprobs, scores.of_document(number).label_logprobs)
