"""Speed: methods timed in alternation on the same prompts, and the speed-up predicted from tau and latencies.

A step with K draft tokens costs one draft forward pass and one verification of K + 1 tokens, and emits tau tokens on
average. Plain decoding costs one forward pass per token. So

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

NUM_REPEATS = 7  # of every latency; the median counts
NUM_NEW_TOKENS = 3  # text tokens of a draft step besides its mask tokens: about tau

Method = Callable[[list[list[int]]], list[Decoded]]  # decodes a batch of prompts

# ---- Methods in alternation -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """One method and the target alone, on the same prompts.

    Attributes:
        traces: of every prompt.
        tokens_per_second: of all prompts, prefill included, in each round.
        ar_tokens_per_second: the same of the target alone.
        num_identical_answers: answers equal to those of the target alone; None if sampled.
    """

    traces: list[Trace]
    tokens_per_second: list[float]
    ar_tokens_per_second: list[float]
    num_identical_answers: int | None

    def record(self) -> dict[str, Any]:
        """The `speed` of a record in acceptance.json: medians and ranges over rounds.

        The speed-up is a ratio within each round, so it is independent of what slows the whole machine.
        """
        own, ar = self.tokens_per_second, self.ar_tokens_per_second
        ratios = [own / ar for own, ar in zip(own, ar, strict=True)]
        return {
            **_median_and_range("tokens_per_second", own),
            "ar_tokens_per_second": statistics.median(ar),
            **_median_and_range("speedup", ratios),
            "num_identical_answers": self.num_identical_answers,
            "num_rounds": len(own),
        }


def _median_and_range(name: str, values: list[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


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
) -> dict[str, Timing]:
    """Time several proposers and the target alone, in alternation on the same batches, after a warm-up of each.

    Args:
        target: model whose text is decoded.
        proposers: by name.
        prompts: token ids of each.
        limits: when an answer ends.
        num_draft_tokens: K.
        batch_size: answers decoded together.
        num_rounds: times that every method decodes all prompts.
        sampling: how tokens are chosen.
    """
    runner = target if isinstance(target, Runner) else Runner(target)
    batches = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]

    def _method(proposer: Proposer | None) -> Method:
        k = 0 if proposer is None else num_draft_tokens
        return lambda batch: decode_batch(
            runner, batch, limits, drafter=proposer, num_draft_tokens=k, sampling=sampling
        )

    methods = [_method(None), *map(_method, proposers.values())]
    longest = {len(batch): batch for batch in sorted(batches, key=lambda batch: max(map(len, batch)))}
    for decode in methods:
        for batch in longest.values():  # of each size
            decode(batch)  # warm-up: memory, kernels, compiled steps
    answers, seconds = take_turns(methods, batches, num_rounds)
    tokens = [[answer.tokens for answer in found] for found in answers]
    rates = [[sum(map(len, texts)) / s for s in row] for texts, row in zip(tokens, seconds, strict=True)]
    return {
        name: Timing(
            traces=[Trace(answer.accepted, len(answer.tokens)) for answer in answers[index]],
            tokens_per_second=rates[index],
            ar_tokens_per_second=rates[0],
            num_identical_answers=sum(map(list.__eq__, tokens[index], tokens[0])) if sampling.is_greedy else None,
        )
        for index, name in enumerate(proposers, start=1)
    }


def take_turns(
    methods: Sequence[Method], batches: Sequence[list[list[int]]], num_rounds: int
) -> tuple[list[list[Decoded]], list[list[float]]]:
    """Decode every batch with every method; the method that begins rotates from batch to batch.

    Returns:
        Answers of the first round, [method][prompt], and seconds, [method][round].
    """
    answers: list[list[Decoded]] = [[] for _ in methods]
    seconds = [[0.0] * num_rounds for _ in methods]
    for number in range(num_rounds * len(batches)):
        round_number, batch_number = divmod(number, len(batches))
        for shift in range(len(methods)):
            index = (number + shift) % len(methods)
            start = time.perf_counter()
            decoded = methods[index](batches[batch_number])
            seconds[index][round_number] += time.perf_counter() - start
            if round_number == 0:
                answers[index] += decoded
    return answers, seconds


# ---- Prediction -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latencies:
    """Seconds of single forward passes over a batch, after `context` tokens in the KV cache.

    Attributes:
        device: name of the device.
        ar_seconds: of the target, one token.
        draft_seconds: by K, of the draft model, NUM_NEW_TOKENS tokens and K - 1 mask tokens.
        verify_seconds: by K, of the target, K + 1 tokens.
    """

    batch_size: int
    context: int
    device: str
    ar_seconds: float
    draft_seconds: dict[int, float]
    verify_seconds: dict[int, float]

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Latencies:
        """As stored, where K is a string."""
        by_k = {key: {int(k): s for k, s in stored[key].items()} for key in ("draft_seconds", "verify_seconds")}
        return cls(**{**stored, **by_k})


def measure_latencies(
    target: PreTrainedModel | Runner, drafter: Drafter, num_draft_tokens: Sequence[int], batch_size: int, context: int
) -> Latencies:
    """Measure the forward passes of a step for every K. The tokens themselves do not matter."""
    runner = target if isinstance(target, Runner) else Runner(target)
    ks = sorted(set(num_draft_tokens))
    text = [index % len(drafter.tokenizer) for index in range(context)]
    return Latencies(
        batch_size,
        context,
        device_name(),
        forward_seconds(runner, text, 1, 1, batch_size=batch_size),
        {k: forward_seconds(drafter.runner, text, NUM_NEW_TOKENS + k - 1, k, batch_size=batch_size) for k in ks},
        {k: forward_seconds(runner, text, k + 1, k + 1, batch_size=batch_size) for k in ks},
    )


def forward_seconds(runner: Runner, text: list[int], num_new: int, num_logits: int, *, batch_size: int) -> float:
    """Median seconds of a forward pass of `num_new` tokens after `text`, over a batch of equal texts."""
    decoding = runner.start(batch_size, len(text) + num_new, width=num_new, num_logits=num_logits)
    texts, nothing, new = ([ids] * batch_size for ids in (text, [], text[:1] * num_new))

    def _rewind() -> None:
        decoding.extend(texts, nothing, num_logits=1)

    def _forward() -> None:
        decoding.extend(texts, new, num_logits=num_logits)[:, -1, 0].tolist()  # waits for the device

    return median_seconds(_forward, before=_rewind)


def median_seconds(run: Callable[[], None], *, before: Callable[[], None], repeats: int = NUM_REPEATS) -> float:
    """Median duration of `run` after a warm-up. `before` precedes each run and is not timed."""
    durations = []
    for _ in range(repeats + 1):
        before()
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[1:])


def predict(tau_by_k: Mapping[int, float], latencies: Latencies) -> dict[str, Any]:
    """Speed-up of every K that has both a tau and latencies: one entry of predictions.json without names.

    The recommended K has the largest speed-up; 0 means no draft, because none is above 1.

    Example: plain steps of 10 ms; K = 4 drafts in 5 ms, verifies in 15 ms and emits 3 tokens: 3 * 10 / (5 + 15) = 1.5.

        >>> latencies = Latencies(1, 256, "cpu", 0.010, {4: 0.005}, {4: 0.015})
        >>> predict({4: 3.0}, latencies)["recommended_num_draft_tokens"]
        4
    """
    rows = []
    for k in sorted(set(tau_by_k) & set(latencies.draft_seconds)):
        draft, verify = latencies.draft_seconds[k], latencies.verify_seconds[k]
        speedup = tau_by_k[k] * latencies.ar_seconds / (draft + verify)
        seconds = {"draft_seconds": draft, "verify_seconds": verify}
        rate = {"tokens_per_second": latencies.batch_size * tau_by_k[k] / (draft + verify)}
        rows.append({"num_draft_tokens": k, "tau": tau_by_k[k], **seconds, **rate, "speedup": speedup})
    best = max(rows, key=lambda row: row["speedup"], default=None)
    return {
        "batch_size": latencies.batch_size,
        "context_length": latencies.context,
        "device": latencies.device,
        "ar_seconds": latencies.ar_seconds,
        "ar_tokens_per_second": latencies.batch_size / latencies.ar_seconds,
        "rows": rows,
        "recommended_num_draft_tokens": best["num_draft_tokens"] if best and best["speedup"] > 1 else 0,
    }
