"""Replay: exact acceptance for every K at once, from the target's cached greedy text, without the target.

Under greedy decoding, what a step accepts depends only on the text before it and on the target's own greedy text. So
the drafts at every anchor, compared with that text, give the acceptance of any decoding of it. A chain matters only as
long as it matches: depth 0 runs for all anchors at once, and each further depth only for the chains that still match,
over the kept keys and values. That is about n * tau slots instead of n * K, still exact for every K.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pard_train.decoding import Drafter
from pard_train.layout import SlotLayout, is_visible

# Legend: L tokens of prompt and answer, N tokens of the answer, A anchors still matching, V vocabulary.

LOGIT_CHUNK = 512  # slots whose logits are in memory at once: 0.3 GB at a vocabulary of 152k in float32


@torch.inference_mode()
def replay(drafter: Drafter, prompt_ids: list[int], answer_ids: list[int], max_draft_tokens: int) -> np.ndarray:
    """How many draft tokens in a row the target would accept, from every place of its answer.

    Args:
        drafter: draft model.
        prompt_ids: rendered prompt, at least one token.
        answer_ids: the target's own greedy answer, N tokens.
        max_draft_tokens: largest K of interest.

    Returns:
        int64 [N]: entry j counts leading matches of the drafts proposed just before answer token j, at most
        min(max_draft_tokens, N - j). Feed it to `acceptance.walk`.
    """
    device = drafter.model.device
    text = torch.tensor(prompt_ids + answer_ids, device=device)  # [L]
    first_anchor = len(prompt_ids) - 1
    alive = torch.arange(first_anchor, len(text) - 1, device=device)  # [A] anchors whose chain matches so far
    matches = torch.zeros(len(answer_ids), dtype=torch.int64, device=device)
    cache = DynamicCache(config=drafter.model.config)
    keys = _slots(torch.arange(len(text) - 1, device=device), 0)  # what the cache holds
    for depth in range(max_draft_tokens):
        if depth == 0:
            hidden = _hidden(drafter, cache, text[None, :-1])[first_anchor:]
        else:
            alive = alive[alive + depth + 1 < len(text)]  # further on, no answer token is left to match
            if len(alive) == 0:
                break
            hidden, keys = _deepen(drafter, cache, keys, _slots(alive, depth))
        alive = alive[_choices(drafter, hidden) == text[alive + depth + 1]]
        matches[alive - first_anchor] += 1
    return matches.cpu().numpy()


def _slots(anchors: Tensor, depth: int) -> SlotLayout:
    return SlotLayout(torch.zeros_like(anchors), anchors, torch.full_like(anchors, depth))


def _deepen(drafter: Drafter, cache: DynamicCache, keys: SlotLayout, queries: SlotLayout) -> tuple[Tensor, SlotLayout]:
    """One more mask slot on every chain that still matches: hidden states [A, hidden], and what the cache holds now."""
    parts = ("document", "anchor", "depth")
    keys = SlotLayout(*(torch.cat([getattr(keys, part), getattr(queries, part)]) for part in parts))
    ids = torch.full_like(queries.anchor, drafter.mask_token_id)
    hidden = _hidden(
        drafter,
        cache,
        ids[None],
        position_ids=queries.position[None],
        attention_mask=is_visible(queries, keys)[None, None],  # [1, 1, A, keys]
    )
    return hidden, keys


def _hidden(drafter: Drafter, cache: DynamicCache, ids: Tensor, **kwargs: Tensor) -> Tensor:
    return drafter.model.base_model(ids, past_key_values=cache, use_cache=True, **kwargs).last_hidden_state[0]


def _choices(drafter: Drafter, hidden: Tensor) -> Tensor:
    """Draft token of every slot, without holding all logits: [A, hidden] -> [A]."""
    head = drafter.model.get_output_embeddings()
    return torch.cat([drafter.choose(head(chunk)) for chunk in hidden.split(LOGIT_CHUNK)])
