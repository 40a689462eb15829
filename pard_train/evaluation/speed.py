"""Speed: methods timed in turns on the same prompts, and what tau and single latencies predict for every K.

A step with K draft tokens costs one draft forward pass and one verification of K + 1 tokens, and emits tau tokens on
average; plain decoding pays one forward pass for each token. So

    speed-up(K) = tau(K) * ar / (draft(K) + verify(K))
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from pard_train.acceptance.counting import Trace
from pard_train.device import device_name
from pard_train.generation.decoding import Decoded, Limits, decode_batch
from pard_train.generation.proposers import Drafter, Proposer
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import GREEDY, Sampling

NUM_REPEATS = 7  # of every latency, whose median counts
NUM_NEW_TOKENS = 3  # of text that a draft step reads besides its mask tokens: about tau

# ---------------------------------------------------------------------------------------------------------------------
# Methods in turns
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One method beside the target alone, on the same prompts.

    Attributes:
        method: the name that the proposer was given.
        batch_size: answers decoded side by side.
        num_draft_tokens: K.
        traces: of every prompt.
        tokens_per_second: of all prompts together, prefill included, in each round.
        ar_tokens_per_second: the same of the target alone, in the same rounds.
        num_identical_answers: answers equal to those of the target alone; None if they are sampled.
    """

    method: str
    batch_size: int
    num_draft_tokens: int
    traces: list[Trace]
    tokens_per_second: list[float]
    ar_tokens_per_second: list[float]
    num_identical_answers: int | None

    @property
    def ratios(self) -> list[float]:
        """Speed-up within each round, which what slows the whole machine leaves alone."""
        return [own / ar for own, ar in zip(self.tokens_per_second, self.ar_tokens_per_second, strict=True)]

    @property
    def speedup(self) -> float:
        """Median over rounds."""
        return statistics.median(self.ratios)

    def record(self) -> dict[str, Any]:
        """The `speed` of a record in acceptance.json: medians and ranges over rounds."""
        return {
            "tokens_per_second": statistics.median(self.tokens_per_second),
            "tokens_per_second_low": min(self.tokens_per_second),
            "tokens_per_second_high": max(self.tokens_per_second),
            "ar_tokens_per_second": statistics.median(self.ar_tokens_per_second),
            "speedup": self.speedup,
            "speedup_low": min(self.ratios),
            "speedup_high": max(self.ratios),
            "num_identical_answers": self.num_identical_answers,
            "num_rounds": len(self.tokens_per_second),
        }


def time_proposers(
    target: PreTrainedModel | Runner,
    proposers: Mapping[str, Proposer],
    prompts: Sequence[list[int]],
    limits: Limits,
    *,
    num_draft_tokens: int,
    batch_size: int,
    num_rounds: int,
    sampling: Sampling = GREEDY,
) -> list[Timing]:
    """Time ways to draft, such as several drafts or one draft in several ways, beside the target alone.

    All take turns on the same batches, after each has decoded the first one as a warm-up.

    Args:
        target: model whose text comes out.
        proposers: by name.
        prompts: rendered prompts.
        limits: when an answer ends.
        num_draft_tokens: K.
        batch_size: answers decoded side by side.
        num_rounds: times that every method decodes all prompts.
        sampling: how tokens are chosen.

    Returns:
        One Timing per proposer, in their order.
    """
    runner = target if isinstance(target, Runner) else Runner(target)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]

    def way(proposer: Proposer | None) -> Callable[[list[list[int]]], list[Decoded]]:
        k = 0 if proposer is None else num_draft_tokens
        return lambda batch: decode_batch(
            runner, batch, limits, drafter=proposer, num_draft_tokens=k, sampling=sampling
        )

    ways = [way(None), *map(way, proposers.values())]
    for run in ways:
        run(batches[0])  # warm-up: memory, kernels, compiled steps
    answers, seconds = take_turns(ways, batches, num_rounds)
    tokens = [[answer.tokens for answer in found] for found in answers]
    rates = [[sum(map(len, texts)) / s for s in row] for texts, row in zip(tokens, seconds, strict=True)]
    return [
        Timing(
            method=name,
            batch_size=batch_size,
            num_draft_tokens=num_draft_tokens,
            traces=[Trace(answer.accepted, len(answer.tokens)) for answer in answers[index]],
            tokens_per_second=rates[index],
            ar_tokens_per_second=rates[0],
            num_identical_answers=sum(map(list.__eq__, tokens[index], tokens[0])) if sampling.is_greedy else None,
        )
        for index, name in enumerate(proposers, start=1)
    ]


def take_turns(
    ways: Sequence[Callable[[list[list[int]]], list[Decoded]]], batches: Sequence[list[list[int]]], num_rounds: int
) -> tuple[list[list[Decoded]], list[list[float]]]:
    """Decode every batch in every way, one way after the other on the same batch; who begins moves on by one each time.

    Returns:
        Answers of the first round, [way][prompt], and seconds, [way][round].
    """
    answers: list[list[Decoded]] = [[] for _ in ways]
    seconds = [[0.0] * num_rounds for _ in ways]
    for number in range(num_rounds * len(batches)):
        turn, place = divmod(number, len(batches))
        for shift in range(len(ways)):
            index = (number + shift) % len(ways)
            start = time.perf_counter()
            decoded = ways[index](batches[place])
            seconds[index][turn] += time.perf_counter() - start
            if turn == 0:
                answers[index] += decoded
    return answers, seconds


# ---------------------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latencies:
    """Seconds of single forward passes over a batch, with the keys and values of `context` tokens at hand.

    Attributes:
        device: name of what they were measured on.
        ar_seconds: the target reads one token of each text.
        draft_seconds: by K, the draft model reads NUM_NEW_TOKENS tokens and K - 1 mask tokens.
        verify_seconds: by K, the target reads K + 1 tokens.
    """

    batch_size: int
    context: int
    device: str
    ar_seconds: float
    draft_seconds: dict[int, float]
    verify_seconds: dict[int, float]


def measure_latencies(
    target: PreTrainedModel | Runner,
    drafter: Drafter,
    num_draft_tokens: Sequence[int],
    batch_size: int,
    context: int,
) -> Latencies:
    """Measure what a step is made of, median of NUM_REPEATS. Which tokens are read does not matter.

    Args:
        target: model that verifies.
        drafter: draft model.
        num_draft_tokens: values of K, each at least 1.
        batch_size: texts read side by side.
        context: tokens that each text has before.
    """
    runner = target if isinstance(target, Runner) else Runner(target)
    ks = sorted(set(num_draft_tokens))
    text = [index % len(drafter.tokenizer) for index in range(context)]
    return Latencies(
        batch_size,
        context,
        device_name(),
        read_seconds(runner, text, 1, 1, batch_size=batch_size),
        {k: read_seconds(drafter.runner, text, NUM_NEW_TOKENS + k - 1, k, batch_size=batch_size) for k in ks},
        {k: read_seconds(runner, text, k + 1, k + 1, batch_size=batch_size) for k in ks},
    )


def read_seconds(runner: Runner, text: list[int], num_new: int, num_logits: int, *, batch_size: int) -> float:
    """Median seconds of a forward pass that reads `num_new` tokens after `text`, for as many texts as the batch has."""
    reader = runner.start(batch_size, len(text) + num_new, width=num_new, num_logits=num_logits)
    texts, nothing, new = ([ids] * batch_size for ids in (text, [], text[:1] * num_new))

    def forget() -> None:
        reader.read(texts, nothing, num_logits=1)

    def read() -> None:
        reader.read(texts, new, num_logits=num_logits)[:, -1, 0].tolist()  # waits for the device

    return median_seconds(read, before=forget)


def median_seconds(run: Callable[[], None], *, before: Callable[[], None], repeats: int = NUM_REPEATS) -> float:
    """Median duration of something, after one try that does not count; `before` goes before each and is not timed."""
    durations = []
    for _ in range(repeats + 1):
        before()
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])


def predict(tau_by_k: Mapping[int, float], latencies: Latencies) -> list[dict[str, Any]]:
    """Speed-up of every K that has both a tau and latencies, as the rows of predictions.json.

    Example: plain steps of 10 ms; K 4 drafts in 5 ms, verifies in 15 ms and emits 3 tokens: 3 * 10 / (5 + 15) = 1.5.

        >>> latencies = Latencies(1, 256, "cpu", 0.010, {4: 0.005}, {4: 0.015})
        >>> round(predict({4: 3.0}, latencies)[0]["speedup"], 6)
        1.5
    """
    rows = []
    for k in sorted(set(tau_by_k) & set(latencies.draft_seconds)):
        draft, verify = latencies.draft_seconds[k], latencies.verify_seconds[k]
        speedup = tau_by_k[k] * latencies.ar_seconds / (draft + verify)
        rows.append(
            {
                "num_draft_tokens": k,
                "tau": tau_by_k[k],
                "draft_seconds": draft,
                "verify_seconds": verify,
                "speedup": speedup,
            }
        )
    return rows


def recommended(rows: Sequence[Mapping[str, Any]]) -> int:
    """K of the largest predicted speed-up; 0, which is not to draft at all, if none is above 1."""
    best = max(rows, key=lambda row: row["speedup"], default=None)
    return best["num_draft_tokens"] if best is not None and best["speedup"] > 1 else 0


def prediction(tau_by_k: Mapping[int, float], latencies: Latencies) -> dict[str, Any]:
    """One entry of predictions.json, but for the names of draft and target."""
    rows = predict(tau_by_k, latencies)
    return {
        "batch_size": latencies.batch_size,
        "context_length": latencies.context,
        "device": latencies.device,
        "ar_seconds": latencies.ar_seconds,
        "rows": rows,
        "recommended_num_draft_tokens": recommended(rows),
    }
