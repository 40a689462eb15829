"""Acceptance of one draft on the answers of one target to one benchmark, as records of acceptance.json.

Replay of greedy answers gives it exactly. Replay of answers drawn at a temperature gives an estimate: a draft proposes
its most likely tokens, so the answer itself says which of them speculative sampling kept. Each measurement is stored,
and never computed again for the same models and settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pard_train.acceptance.counting import Trace, count_as_vllm, group_traces, length_bucket, pool, walk
from pard_train.acceptance.replay import replay_all
from pard_train.device import default_device
from pard_train.evaluation.matrix import Matrix
from pard_train.fingerprints import model_fingerprint
from pard_train.generation.proposers import Drafter
from pard_train.generation.runner import Runner
from pard_train.model import DTYPES
from pard_train.reports.records import Record
from pard_train.targets.cases import Case, Turn
from pard_train.targets.compatibility import Model
from pard_train.training.checkpoints import find_checkpoint

NO_DRAFT = "-"  # name and fingerprint where prompt look-up drafts, which has no model
NUM_SAMPLES = 3  # answers of each draft and case that the page shows
SAMPLE_K = 8  # K of the samples, or the largest one measured


class Draft:
    """A draft model: its name in records, folder or hub name, and weights, which are loaded on first use."""

    def __init__(self, name: str, path: str, matrix: Matrix):
        self.name, self.path, self.run = name, path, find_checkpoint(path).run
        self.model = Model.load(path, trust_remote_code=matrix.trust_remote_code)
        self.fingerprint = model_fingerprint(path)
        self._matrix = matrix
        self._drafter: Drafter | None = None

    def drafter(self) -> Drafter:
        """The draft model on the device."""
        if self._drafter is None:
            trust, dtype = self._matrix.trust_remote_code, DTYPES[self._matrix.dtype]
            self._drafter = Drafter.load(self.path, dtype=dtype, device=default_device(), trust_remote_code=trust)
            if self._matrix.settings.live_compiled:
                self._drafter.runner = Runner(self._drafter.model, is_compiled=True)
        return self._drafter

    def unload(self) -> None:
        """Free its memory."""
        self._drafter = None


def make_record(matrix: Matrix, draft: Draft | None, case: Case, **measured: Any) -> Record:
    """One record of acceptance.json, whose fields docs/reference/acceptance-json.md explains.

    Args:
        matrix: the evaluation.
        draft: None where prompt look-up drafts.
        case: the answers.
        measured: the other fields, and those that differ from replay of a PARD draft.
    """
    return {
        "draft": draft.name if draft else NO_DRAFT,
        "target": case.target,
        "benchmark": case.benchmark.name,
        "mode": "replay",
        "method": "pard",
        "temperature": case.sampling.temperature,
        "top_p": case.sampling.top_p,
        "batch_size": None,
        "max_new_tokens": matrix.settings.max_new_tokens,
        "dtype": matrix.dtype,
        "answer_dtype": case.identity["dtype"],
        "chat_template": case.identity["chat_template"],
        "system_prompt": matrix.settings.system_prompt,
        "template_kwargs": matrix.template_kwargs,
        "prompt_template": case.benchmark.instruction,
        "draft_fingerprint": draft.fingerprint if draft else NO_DRAFT,
        "target_fingerprint": case.identity["target_fingerprint"],
        "benchmark_fingerprint": case.benchmark.fingerprint,
        "speed": None,
        **measured,
    }


def pooled_numbers(traces: Sequence[Trace], turns: Sequence[Turn], num_draft_tokens: int) -> Record:
    """Numbers of one record: pooled, and by category, turn, prompt length, position and place in the context."""
    prompts, lengths = [turn.prompt_id for turn in turns], [len(turn.prompt_ids) for turn in turns]
    names = {
        "category": [turn.category for turn in turns],
        "turn": [str(turn.number + 1) for turn in turns],
        "prompt_length": [length_bucket(length) for length in lengths],
    }
    return {
        **pool(traces, num_draft_tokens, prompts=prompts).record(),
        "groups": group_traces(traces, prompts=prompts, names=names, prompt_lengths=lengths),
    }


def vllm_numbers(num_drafts: int, num_accepted: int) -> Record:
    """Acceptance as vLLM counts it."""
    tau = 1 + num_accepted / num_drafts if num_drafts else None
    return {"vllm_drafts": num_drafts, "vllm_accepted": num_accepted, "vllm_tau": tau}


def replay_case(matrix: Matrix, draft: Draft, case: Case) -> tuple[list[list[int]], dict[str, Any]]:
    """For every turn, the leading matches of the drafts at each position of the answer; and the provenance."""
    max_k = max(matrix.settings.num_draft_tokens)
    identity = {**case.identity, "draft_fingerprint": draft.fingerprint, "max_draft_tokens": max_k}

    def _compute() -> list[list[int]]:
        pairs = [(turn.prompt_ids, turn.answer.ids) for turn in case.turns]
        description = f"replay {draft.name} on {case.benchmark.name}"
        return [matches.tolist() for matches in replay_all(draft.drafter(), pairs, max_k, description=description)]

    return matrix.result("replay", identity | {"dtype": matrix.dtype}, _compute)


def replay_records(
    matrix: Matrix, draft: Draft, case: Case, matches: list[list[int]], provenance: dict[str, Any]
) -> Iterator[Record]:
    """One record per K, all from one replay; of sampled answers they are estimates."""
    how = {} if case.sampling.is_greedy else {"mode": "estimate", "estimator": "sampled_text"}
    for k in sorted(set(matrix.settings.num_draft_tokens)):
        counts = np.sum([count_as_vllm(m, k) for m in matches], axis=0).tolist()
        numbers = pooled_numbers([walk(m, k) for m in matches], case.turns, k) | vllm_numbers(*counts)
        yield make_record(matrix, draft, case, **how, **numbers, provenance=provenance)


def sample_outputs(matrix: Matrix, draft: Draft, case: Case, matches: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Some answers for people, step by step: the accepted draft tokens and the target's own token."""
    values = matrix.settings.num_draft_tokens
    k = SAMPLE_K if SAMPLE_K in values else max(values)
    for turn, match in list(zip(case.turns, matches, strict=True))[:NUM_SAMPLES]:
        texts = _growing_texts(draft.model, turn.answer.ids)
        steps, start = [], 0
        for accepted in walk(match, k).accepted:
            middle, end = start + accepted, min(start + accepted + 1, len(turn.answer.ids))
            own = texts[end][len(texts[middle]) :]
            steps.append({"accepted": texts[middle][len(texts[start]) :], "target_token": own})
            start = end
        names = {"draft": draft.name, "target": case.target, "benchmark": case.benchmark.name}
        asked = {"prompt_id": turn.prompt_id, "num_draft_tokens": k, "question": turn.question}
        yield {**names, **asked, "steps": steps}


def _growing_texts(model: Model, ids: list[int]) -> list[str]:
    """Text of the first 0, 1, ... tokens; half a character belongs to the token that completes it."""
    texts = [""]
    for stop in range(1, len(ids) + 1):
        text = model.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        texts.append(texts[-1] if text.endswith("\ufffd") else text)
    return texts
