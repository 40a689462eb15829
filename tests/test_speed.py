"""Speed is counted as it says, methods take turns, and predictions follow from hand-made numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_decoding import build_drafter, perturbed, prompts
from tiny import build_model, replay
from transformers import PreTrainedTokenizerBase

import pard_train.evaluation.speed
from pard_train.acceptance.counting import Trace, walk
from pard_train.device import device_name
from pard_train.evaluation.speed import (
    Latencies,
    Timing,
    measure_latencies,
    median_seconds,
    predict,
    take_turns,
    time_proposers,
)
from pard_train.generation.decoding import Decoded, Limits, Step, decode
from pard_train.generation.proposers import PromptLookup, SequentialDrafter
from pard_train.generation.sampling import Sampling

LIMITS = Limits(16, frozenset(range(40, 50)))


def test_speed_up_is_tau_times_a_plain_step_over_a_speculative_one() -> None:
    latencies = Latencies(4, 128, "cpu", 0.020, {2: 0.004, 8: 0.006, 16: 0.010}, {2: 0.022, 8: 0.030, 16: 0.050})
    rows = predict({2: 1.95, 8: 3.6, 16: 3.9, 32: 4.0}, latencies)["rows"]  # no latencies were measured for 32
    assert [row["num_draft_tokens"] for row in rows] == [2, 8, 16]
    assert [row["speedup"] for row in rows] == pytest.approx([1.5, 2.0, 1.3])
    assert rows[1] == {
        "num_draft_tokens": 8,
        "tau": 3.6,
        "draft_seconds": 0.006,
        "verify_seconds": 0.030,
        "tokens_per_second": pytest.approx(400.0),
        "speedup": pytest.approx(2.0),
    }
    assert predict({8: 3.6}, latencies) == {
        "batch_size": 4,
        "context_length": 128,
        "device": "cpu",
        "ar_seconds": 0.020,
        "ar_tokens_per_second": pytest.approx(200.0),
        "rows": rows[1:2],
        "recommended_num_draft_tokens": 8,
    }


def test_a_draft_that_gains_nothing_is_not_recommended() -> None:
    latencies = Latencies(1, 64, "cpu", 0.010, {4: 0.010}, {4: 0.012})
    assert predict({4: 2.1}, latencies)["recommended_num_draft_tokens"] == 0
    assert predict({4: 2.3}, latencies)["recommended_num_draft_tokens"] == 4
    assert predict({}, latencies)["recommended_num_draft_tokens"] == 0


def test_a_record_holds_medians_their_range_and_the_ratio_within_rounds() -> None:
    timing = Timing([Trace([1], 2)], [30.0, 10.0, 50.0], [10.0, 5.0, 20.0], 1)
    assert timing.record() == {
        "tokens_per_second": 30.0,
        "tokens_per_second_low": 10.0,
        "tokens_per_second_high": 50.0,
        "ar_tokens_per_second": 10.0,
        "speedup": 2.5,  # of 3.0, 2.0 and 2.5
        "speedup_low": 2.0,
        "speedup_high": 3.0,
        "num_identical_answers": 1,
        "num_rounds": 3,
    }


def test_ways_take_turns_on_every_batch_and_begin_in_turn() -> None:
    calls: list[tuple[str, int]] = []

    def way(name: str, token: int) -> Callable[[list[list[int]]], list[Decoded]]:
        def run(batch: list[list[int]]) -> list[Decoded]:
            calls.append((name, batch[0][0]))
            return [Decoded([Step([token], 0)]) for _ in batch]

        return run

    answers, seconds = take_turns([way("a", 1), way("b", 2)], [[[10], [11]], [[12]], [[13]]], 2)
    assert calls[:6] == [("a", 10), ("b", 10), ("b", 12), ("a", 12), ("a", 13), ("b", 13)]
    assert calls[6:] == [("b", 10), ("a", 10), ("a", 12), ("b", 12), ("b", 13), ("a", 13)]
    assert [[answer.tokens for answer in found] for found in answers] == [[[1]] * 4, [[2]] * 4]
    assert [len(row) for row in seconds] == [2, 2]
    assert all(value > 0 for row in seconds for value in row)


def test_the_median_leaves_out_the_first_try_and_what_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waits = [0.0], iter([100.0, 1.0, 9.0, 2.0])  # seconds that the tries take

    def run() -> None:
        now[0] += next(waits)

    def before() -> None:
        now[0] += 50.0

    monkeypatch.setattr(pard_train.evaluation.speed.time, "perf_counter", lambda: now[0])
    assert median_seconds(run, before=before, repeats=3) == 2.0


def test_timed_methods_decode_the_targets_text_and_accept_what_replay_says(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    target = build_model("qwen2", seed=0)
    drafter = build_drafter(perturbed(target, "qwen2", noise=0.02), tokenizer)
    asked = prompts(tokenizer, 3)
    timings = time_proposers(
        target,
        {"ngram": PromptLookup(), "pard": drafter, "draft": SequentialDrafter(drafter)},
        asked,
        LIMITS,
        num_draft_tokens=3,
        batch_size=2,
        num_rounds=2,
    )
    assert [*timings] == ["ngram", "pard", "draft"]
    own = [[token for step in decode(target, prompt, LIMITS) for token in step.tokens] for prompt in asked]
    for timing in timings.values():
        assert timing.num_identical_answers == 3
        assert [trace.num_tokens for trace in timing.traces] == [len(text) for text in own]
        assert len(timing.tokens_per_second) == len(timing.ar_tokens_per_second) == 2
        assert min(timing.tokens_per_second + timing.ar_tokens_per_second) > 0
    replayed = [walk(replay(drafter, prompt, text, 3).tolist(), 3) for prompt, text in zip(asked, own, strict=True)]
    assert timings["pard"].traces == replayed


def test_sampled_texts_are_not_compared(tokenizer: PreTrainedTokenizerBase) -> None:
    target = build_model("llama", seed=0)
    timings = time_proposers(
        target,
        {"look-up": PromptLookup()},
        prompts(tokenizer, 2),
        LIMITS,
        num_draft_tokens=2,
        batch_size=2,
        num_rounds=1,
        sampling=Sampling(1.0),
    )
    assert timings["look-up"].record()["num_identical_answers"] is None


def test_latencies_are_measured_for_every_k_on_forward_passes_of_the_right_size(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = build_model("llama", seed=0)
    drafter = build_drafter(perturbed(target, "llama", noise=0.02), tokenizer)
    sizes = set()
    forward = type(target).forward

    def seen(self: torch.nn.Module, ids: torch.Tensor, **kwargs: object) -> object:
        sizes.add((*ids.shape, kwargs["logits_to_keep"]))
        return forward(self, ids, **kwargs)

    monkeypatch.setattr(type(target), "forward", seen)
    latencies = measure_latencies(target, drafter, [4, 1, 4], batch_size=3, context=50)
    assert (latencies.batch_size, latencies.context, latencies.device) == (3, 50, device_name())
    assert sorted(latencies.draft_seconds) == sorted(latencies.verify_seconds) == [1, 4]
    assert min(latencies.ar_seconds, *latencies.draft_seconds.values(), *latencies.verify_seconds.values()) > 0
    steps = {(3, 1, 1), (3, 3, 1), (3, 6, 4), (3, 2, 2), (3, 5, 5)}  # AR; draft at K 1 and 4; verification
    assert sizes - {(3, 50, 1)} == steps


class Counted(PromptLookup):
    """Counts the batches that it starts."""

    batches = 0

    def start(self, *sizes: int) -> Any:
        self.batches += 1
        return super().start(*sizes)


def test_every_size_of_batch_is_warmed_up_before_it_is_timed(tokenizer: PreTrainedTokenizerBase) -> None:
    target, asked, counted = build_model("llama", seed=0), prompts(tokenizer, 5), Counted()
    sizes = {"num_draft_tokens": 2, "batch_size": 2, "num_rounds": 3}
    time_proposers(target, {"ngram": counted}, asked, Limits(2, frozenset()), **sizes)
    assert counted.batches == 2 + 3 * 3  # once with two and with one; then three rounds of three
