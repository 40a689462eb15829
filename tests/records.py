"""A realistic result of an evaluation: several drafts, targets, benchmarks, K; groups, speed, predictions, samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np

from pard_train.acceptance.counting import Trace, count_as_vllm, pool, walk

NUM_PROMPTS = 24
KS = (1, 2, 4, 8, 12, 16)
TARGETS = {"Qwen2.5-7B-Instruct": 0.0, "Qwen2.5-Coder-14B-Instruct": -0.03}
DRAFTS = {"untrained": 0.45, "pard-0.5b": 0.78, "pard-0.5b-dpace": 0.82}  # chance that a draft token goes on matching
BENCHMARKS = {
    "humaneval": (0.05, ("code",)),
    "gsm8k": (0.0, ("maths",)),
    "mt-bench": (-0.16, ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")),
}
PROVENANCE = {
    "command": ["recipes/evaluate.py", "draft=outputs/my draft/export", "targets=[Qwen/Qwen2.5-7B-Instruct]"],
    "time": "2025-11-25T01:17:00+0000",
    "python": "3.11.9",
    "machine": "Linux-6.1-x86_64",
    "device": "NVIDIA H100 80GB HBM3",
    "versions": {"pard_train": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0", "numpy": "2.3.1"},
    "git": {"commit": "b94954b0c2f64d1e8a4b7f0c9d3e5a6b7c8d9e0f", "is_dirty": False},
}
ANSWERS = {
    "HumanEval/32": (
        'Write a Python function `count_vowels(text)`.\n\n    >>> count_vowels("Speculate")\n    4',
        "Here is a simple solution:\n\n```python\ndef count_vowels(text: str) -> int:\n"
        '    """Count the vowels of a text."""\n    return sum(char in "aeiou" for char in text.lower())\n```\n\n'
        "It lower-cases the text once and counts every character that is a vowel.",
    ),
    "mt-bench/81": (
        "Compose a short travel post about Hawaii. <script>alert('question')</script>",
        "Aloha! 🌺 Hawaii greets you with <b>volcanoes</b>, rain forests & black sand.\n\n"
        "1. Watch the sunrise at Haleakalā 🌋\n2. Eat poke by the sea\n\nMahalo for reading — see you <em>soon</em>!",
    ),
}


def document(*, targets: Sequence[str] = tuple(TARGETS), drafts: Sequence[str] = tuple(DRAFTS)) -> dict[str, Any]:
    """acceptance.json of a whole matrix with live runs, a sampled run and one failure."""
    cells = [replays(draft, target, name) for draft in drafts for target in targets for name in BENCHMARKS]
    records = [r for cell in cells for r in cell]
    for target in targets:
        timed = [r for draft in drafts[-2:] for r in lives(draft, target, "humaneval")]
        records += [r for r in timed if r["method"] != "ngram" or r["draft"] == drafts[-1]]  # it knows no draft
    records += [estimate(r) for r in records if r["mode"] == "replay" and r["target"] == targets[-1]]
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB <tag> & more"
    failures = [{"draft": None, "target": "Qwen2.5-72B-Instruct", "benchmark": "humaneval", "reason": reason}]
    return deepcopy({"schema_version": 3, "records": records, "failures": failures})


@cache
def replays(draft: str, target: str, benchmark: str) -> list[dict[str, Any]]:
    """Records of one draft, target and benchmark at every K."""
    rng = np.random.default_rng(sum(map(ord, draft + target + benchmark)))
    shift, categories = BENCHMARKS[benchmark]
    chance = DRAFTS[draft] + TARGETS[target] + shift
    matches = [_matches(rng, chance, int(rng.integers(40, 160))) for _ in range(NUM_PROMPTS)]
    records = []
    for k in KS:
        traces = [walk(m, k) for m in matches]
        counts = [count_as_vllm(m, k) for m in matches]
        num_drafts, num_accepted = (sum(column) for column in zip(*counts, strict=True))
        records.append(
            {
                **head(draft, target, benchmark),
                "mode": "replay",
                **pool(traces, k).record(),
                "num_turns": NUM_PROMPTS,
                "vllm_drafts": num_drafts,
                "vllm_accepted": num_accepted,
                "vllm_tau": 1 + num_accepted / num_drafts,
                "groups": list(_groups(traces, categories, k)),
                "speed": None,
                "provenance": PROVENANCE,
            }
        )
    return records


def estimate(replayed: dict[str, Any]) -> dict[str, Any]:
    """An estimate of sampled acceptance as version 0.2.0 wrote it: expected steps, no breakdown, no vLLM counts."""
    absent = ("groups", "speed", "mean_prompt_tau", "vllm_drafts", "vllm_accepted", "vllm_tau")
    record = {name: value for name, value in replayed.items() if name not in absent}
    factor = 1.12
    record |= {"mode": "estimate", "estimator": "sampled_text", "temperature": 0.7}
    record["num_steps"] = record["num_steps"] * factor
    record["histogram"] = [count * factor for count in record["histogram"]]
    return record | {name: record[name] / factor for name in ("tau", "tau_low", "tau_high")}


@cache
def lives(draft: str, target: str, benchmark: str) -> list[dict[str, Any]]:
    """Timed records: PARD, the same weights one token at a time, look-up; two batch sizes; one sampled run."""
    rng, records = np.random.default_rng(5), []
    for method, batch_size, temperature, gain in (
        ("pard", 1, 0.0, 0.72),
        ("draft", 1, 0.0, 0.41),
        ("ngram", 1, 0.0, 0.38),
        ("pard", 8, 0.0, 0.51),
        ("pard", 1, 0.7, 0.66),
    ):
        chance = 0.4 if method == "ngram" else DRAFTS[draft] + TARGETS[target] - 0.1 * temperature
        traces = [walk(_matches(rng, chance, 96), 8) for _ in range(8)]
        measured = pool(traces, 8).record()
        plain, speedup = 41.0 * batch_size, measured["tau"] * gain
        records.append(
            {
                **head(draft, target, benchmark),
                **{"mode": "live", "method": method, "temperature": temperature, "batch_size": batch_size},
                **measured,
                "num_turns": 8,
                "groups": [],
                "speed": {
                    "tokens_per_second": plain * speedup,
                    "tokens_per_second_low": plain * speedup * 0.97,
                    "tokens_per_second_high": plain * speedup * 1.02,
                    "ar_tokens_per_second": plain,
                    "speedup": speedup,
                    "speedup_low": speedup * 0.98,
                    "speedup_high": speedup * 1.01,
                    "num_identical_answers": None if temperature else 8,
                    "num_rounds": 3,
                },
                "provenance": PROVENANCE,
            }
        )
    return records


def head(draft: str, target: str, benchmark: str) -> dict[str, Any]:
    """What a record is about."""
    return {
        "draft": draft,
        "target": target,
        "benchmark": benchmark,
        "method": "pard",
        "temperature": 0.0,
        "top_p": 1.0,
        "batch_size": None,
        "max_new_tokens": 256,
        "dtype": "bfloat16",
        "system_prompt": None,
        "template_kwargs": {},
        "prompt_template": "{question}",
        "draft_fingerprint": _digest(draft),
        "target_fingerprint": _digest(target),
        "benchmark_fingerprint": _digest(benchmark),
    }


def predictions(document: dict[str, Any]) -> list[dict[str, Any]]:
    """predictions.json: speed-up by K of every draft on every target, at two batch sizes."""
    return [
        _prediction(document["records"], draft, target, batch_size)
        for target in dict.fromkeys(r["target"] for r in document["records"])
        for draft in dict.fromkeys(r["draft"] for r in document["records"])
        for batch_size in (1, 8)
    ]


def samples(document: dict[str, Any]) -> list[dict[str, Any]]:
    """samples.json: two answers of every draft on the first target, one of them full of markup."""
    target = document["records"][0]["target"]
    return [
        {
            **{"draft": draft, "target": target, "benchmark": prompt_id.split("/")[0].lower(), "prompt_id": prompt_id},
            **{"num_draft_tokens": 8, "question": question, "steps": list(_steps(answer, draft))},
        }
        for prompt_id, (question, answer) in ANSWERS.items()
        for draft in dict.fromkeys(r["draft"] for r in document["records"])
    ]


def _matches(rng: np.random.Generator, chance: float, num_tokens: int) -> list[int]:
    """Matches in a row at every place of an answer; a chain goes on with a chance that falls with depth."""
    lengths = [_run_length(rng, chance) for _ in range(num_tokens)]
    return [min(length, num_tokens - place) for place, length in enumerate(lengths)]


def _run_length(rng: np.random.Generator, chance: float) -> int:
    for depth in range(max(KS)):
        if rng.random() > chance * 0.985**depth:
            return depth
    return max(KS)


def _groups(traces: list[Trace], categories: Sequence[str], k: int) -> Iterator[dict[str, Any]]:
    """Breakdown by cutting the prompts into parts; the real one is made from the answers themselves."""
    parts = {
        "category": categories,
        "turn": ("1", "2") if len(categories) > 1 else ("1",),
        "prompt_length": ("0-127", "128-255", "256-511"),
        "position": ("0-63", "64-127", "128-255"),
        "context": ("64-127", "128-255", "256-511"),
    }
    for by, names in parts.items():
        for index, name in enumerate(names):
            record = pool(traces[index :: len(names)], k).record()
            fields = ("num_tokens", "num_steps", "tau", "tau_low", "tau_high")
            yield {"by": by, "name": name, **{field: record[field] for field in fields}}


def _prediction(records: list[dict[str, Any]], draft: str, target: str, batch_size: int) -> dict[str, Any]:
    rows = []
    for k in KS:
        mine = [r for r in records if (r["draft"], r["target"]) == (draft, target) and r["mode"] == "replay"]
        mine = [r for r in mine if r["num_draft_tokens"] == k]
        tau = sum(r["num_tokens"] for r in mine) / sum(r["num_steps"] for r in mine)
        draft_seconds, verify_seconds = 0.004 + 1e-5 * k * batch_size, 0.024 + 4e-5 * k * batch_size**1.4
        speedup = tau * 0.024 / (draft_seconds + verify_seconds)
        rows.append({"num_draft_tokens": k, "tau": tau, "draft_seconds": draft_seconds})
        rows[-1] |= {"verify_seconds": verify_seconds, "speedup": speedup}
    return {
        **{
            "draft": draft,
            "target": target,
            "batch_size": batch_size,
            "context_length": 512,
            "device": PROVENANCE["device"],
        },
        **{"ar_seconds": 0.024, "rows": rows},
        "recommended_num_draft_tokens": max(rows, key=lambda row: row["speedup"])["num_draft_tokens"],
    }


def _steps(answer: str, draft: str) -> Iterator[dict[str, str]]:
    """Cut a text into pieces of one to six characters, as if they were tokens, and those into steps."""
    rng = np.random.default_rng(len(draft))
    place = 0
    while place < len(answer):
        accepted = int(min(_run_length(rng, DRAFTS[draft]), 8) * 4)
        own = place + accepted + int(rng.integers(1, 6))
        yield {"accepted": answer[place : place + accepted], "target_token": answer[place + accepted : own]}
        place = own


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:12]
