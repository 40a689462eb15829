"""Replay: acceptance for every K at once, from the target's cached answers, without the target.

Under greedy decoding, what a step accepts depends only on the text before it and on the target's greedy continuation.
So the drafts at every anchor, compared with that text, give the acceptance of any decoding of it. A chain matters only
as long as it matches: depth 0 runs for all anchors at once, each further depth only for the chains that still match,
over cached keys and values. That is about n * tau slots instead of n * K, exact for every K.

The same holds for a text that the target sampled: speculative sampling kept a draft token exactly where it equals the
text's. There the mean over texts is an estimate without bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pard_train.acceptance.chains import PackedChains, PromptAnswer, pack_texts
from pard_train.errors import UserError
from pard_train.generation.proposers import Drafter

# Legend: N tokens of an answer, E tokens after it, A anchors whose chains still match, V vocabulary.

SLOT_BUDGET = 8192  # text slots of a pack: large matrices, and 0.4 GB of keys and values for a model of 135M in float32
LOGIT_CHUNK = 512  # slots whose logits are in memory at once: 0.3 GB at a vocabulary of 152k in float32


@torch.inference_mode()
def replay_all(
    drafter: Drafter,
    pairs: Sequence[PromptAnswer],
    max_draft_tokens: int,
    *,
    slot_budget: int = SLOT_BUDGET,
    extra_ids: Sequence[Sequence[int]] | None = None,
    description: str = "",
) -> list[np.ndarray]:
    """How many draft tokens in a row the target accepts, at every position of its answers.

    Args:
        drafter: draft model, loaded with any attention.
        pairs: (prompt ids, at least one; ids of the target's answer, N tokens) of each turn.
        max_draft_tokens: largest K of interest.
        slot_budget: text slots of a pack at most; a longer text has its own pack.
        extra_ids: per pair, E tokens that the target writes after the answer; matches may extend into them.
        description: of the progress bar; empty: no bar.

    Returns:
        Per pair int64 [N], for `counting.walk`: entry j counts the leading matches of the draft proposed just before
        answer token j, at most min(max_draft_tokens, N + E - j).
    """
    matches = [np.zeros(len(answer), dtype=np.int64) for _, answer in pairs]
    with tqdm(total=len(pairs), desc=description, unit="answer", disable=not description) as bar:
        for texts in pack_texts(pairs, slot_budget, extra_ids):
            chains = PackedChains(drafter, texts)
            counts = _count_matches(chains, max_draft_tokens)
            for text, own in zip(texts, np.split(counts, np.cumsum(chains.lengths)[:-1]), strict=True):
                matches[text.number] = own
            bar.update(len(texts))
    return matches


def _count_matches(chains: PackedChains, max_draft_tokens: int) -> np.ndarray:
    """Leading matches of every chain of a pack, int64 [A]."""
    counts = np.zeros(len(chains.chain), dtype=np.int64)
    hidden: Tensor | None = chains.prefill()
    while hidden is not None:
        is_match = choose_tokens(chains.drafter, hidden) == chains.labels
        counts[chains.chain[is_match]] += 1
        hidden = chains.deepen(is_match) if chains.depth + 1 < max_draft_tokens else None
    return counts


def choose_tokens(drafter: Drafter, hidden: Tensor) -> np.ndarray:
    """Draft token of every slot, LOGIT_CHUNK slots at a time: [A, hidden] -> int64 [A]. Raises UserError at NaN."""
    head = drafter.runner.model.get_output_embeddings()
    best = [drafter.mask_non_tokens(head(chunk)).max(dim=-1) for chunk in hidden.split(LOGIT_CHUNK)]
    if torch.cat([each.values for each in best]).isnan().any():  # their arg max is token 0, as of a NaN target
        raise UserError("the draft's logits are NaN: take dtype=float32, or another draft")
    return torch.cat([each.indices for each in best]).cpu().numpy()
