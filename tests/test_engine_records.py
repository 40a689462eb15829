"""vLLM inside an evaluation: its counters as records, beside replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import config_for, conversations, write_served_pair
from transformers import PreTrainedTokenizerBase
from vllm_server import vllm_python

from pard_train.acceptance.counting import Trace
from pard_train.evaluation.engine_records import engine_trace
from pard_train.evaluation.evaluate import evaluate


def test_the_prefill_is_a_step_and_matches_past_the_end_do_not_count() -> None:
    assert engine_trace({"token_ids": list(range(6)), "accepted": [2, 4]}) == Trace([0, 2, 2], 6)
    assert engine_trace({"token_ids": [2], "accepted": []}) == Trace([0], 1)


@pytest.mark.slow
def test_an_evaluation_reads_vllms_counters_back_and_they_are_replays(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = vllm_python()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target, draft = write_served_pair("qwen2", tokenizer, tmp_path)
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": c[0]["content"]}) + "\n" for c in conversations(4, seed=5)))
    document = evaluate(
        config_for(
            "evaluate",
            draft=str(draft),
            targets=[str(target)],
            benchmarks=[str(prompts)],
            num_draft_tokens=[4],
            max_new_tokens=30,
            live_prompts=4,
            live_num_draft_tokens=4,
            live_rounds=1,
            engine_python=python,
            output_dir=str(tmp_path / "out"),
        )
    )
    assert document["failures"] == []
    modes = {record["mode"]: record for record in document["records"]}
    engine, replayed = modes["engine"], modes["replay"]
    assert engine["speed"]["num_identical_answers"] == 4
    assert engine["num_tokens"] == replayed["num_tokens"]
    assert engine["vllm_drafts"] == replayed["vllm_drafts"] == engine["num_steps"] - 4
    past_the_end = engine["vllm_accepted"] - replayed["vllm_accepted"]
    assert 0 <= past_the_end <= 4 * 3  # replay of cached text does not see these
    assert "vllm" in engine["provenance"]["versions"]
