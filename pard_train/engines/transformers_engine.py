"""Transformers as a speculative engine, in this process: `generate` with the drafts of `candidates.py`."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from pard_train.engines.candidates import generate
from pard_train.engines.worker import Blocks, Counters, EngineAnswer, EngineRequest, EngineResult
from pard_train.model import load_target


def run_transformers(request: EngineRequest) -> tuple[list[list[int]], EngineResult]:
    """The target's greedy text after every prompt, and the answers with the draft.

    Each target pass counts as one draft of K tokens, of which it accepted all but one of the tokens it emitted.
    """
    device_map, trust = request.engine_arguments.get("device_map"), request.trust_remote_code
    target = load_target(request.target, dtype=request.dtype, trust_remote_code=trust, device_map=device_map)
    pairs = [_generated(target, request, prompt_ids) for prompt_ids in request.prompts]
    return [text for text, _ in pairs], EngineResult(transformers.__version__, [answer for _, answer in pairs])


def _generated(
    target: PreTrainedModel, request: EngineRequest, prompt_ids: list[int]
) -> tuple[list[int], EngineAnswer]:
    """One prompt's text without and with the draft."""
    ids = torch.tensor([prompt_ids], device=target.device)
    arguments: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": request.max_new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,
        "eos_token_id": request.end_ids,
        "pad_token_id": min(request.end_ids),
    }
    text = target.generate(ids, **arguments)[0, len(prompt_ids) :].tolist()
    blocks, start = Blocks(), time.perf_counter()
    k = request.num_draft_tokens
    generate(target, ids, draft_model=request.draft, num_draft_tokens=k, streamer=blocks, **arguments)
    passes = blocks.tokens[1:]
    accepted = [len(tokens) - 1 for tokens in passes]
    counters = Counters.of(accepted, k)
    answer = [token for tokens in passes for token in tokens]
    return text, EngineAnswer(answer, accepted, [], counters, time.perf_counter() - start)
