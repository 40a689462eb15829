"""Replay: exact acceptance for every K at once, from the target's cached greedy text, without the target.

Under greedy decoding, what a step accepts depends only on the text before it and on the target's own greedy text. So
the drafts at every anchor, compared with that text, give the acceptance of any decoding of it. A chain matters only as
long as it matches: depth 0 runs for all anchors at once, and each further depth only for the chains that still match,
over the kept keys and values. That is about n * tau slots instead of n * K, still exact for every K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pard_train.acceptance.chains import PackedChains, Pair, pack_texts
from pard_train.generation.proposers import Drafter

# Legend: N tokens of an answer, A anchors whose chains still match, V vocabulary.

SLOT_BUDGET = 8192  # text slots of a pack: large matrices, and 0.4 GB of keys and values for a model of 135M in float32
LOGIT_CHUNK = 512  # slots whose logits are in memory at once: 0.3 GB at a vocabulary of 152k in float32


@dataclass(frozen=True)
class Replayed:
    """What the target would accept of each answer, and what it cost to find out.

    Attributes:
        matches: per pair, int64 [N], as `replay` returns it.
        num_text_slots: depth-0 slots computed, prompts included, shared tokens once.
        num_chain_slots: mask slots computed.
    """

    matches: list[np.ndarray]
    num_text_slots: int
    num_chain_slots: int


def replay(
    drafter: Drafter,
    prompt_ids: list[int],
    answer_ids: list[int],
    max_draft_tokens: int,
    *,
    extra_ids: Sequence[int] = (),
) -> np.ndarray:
    """How many draft tokens in a row the target would accept, from every place of its answer.

    Args:
        drafter: draft model.
        prompt_ids: rendered prompt, at least one token.
        answer_ids: the target's own greedy answer, N tokens.
        max_draft_tokens: largest K of interest.
        extra_ids: what the target would say after the end of its answer, E tokens; matches may run on into them.

    Returns:
        int64 [N]: entry j counts leading matches of the drafts proposed just before answer token j, at most
        min(max_draft_tokens, N + E - j). Feed it to `acceptance.walk`.
    """
    return replay_all(drafter, [(prompt_ids, answer_ids)], max_draft_tokens, extra_ids=[extra_ids])[0]


def replay_all(
    drafter: Drafter,
    pairs: Sequence[Pair],
    max_draft_tokens: int,
    *,
    slot_budget: int = SLOT_BUDGET,
    extra_ids: Sequence[Sequence[int]] | None = None,
    description: str = "",
) -> list[np.ndarray]:
    """`replay` of many pairs, in the same order; arguments as for `replay_counted`."""
    return replay_counted(
        drafter, pairs, max_draft_tokens, slot_budget=slot_budget, extra_ids=extra_ids, description=description
    ).matches


@torch.inference_mode()
def replay_counted(
    drafter: Drafter,
    pairs: Sequence[Pair],
    max_draft_tokens: int,
    *,
    slot_budget: int = SLOT_BUDGET,
    extra_ids: Sequence[Sequence[int]] | None = None,
    description: str = "",
) -> Replayed:
    """`replay` of many pairs, packed, with the slots counted.

    Args:
        drafter: draft model, loaded with any attention.
        pairs: (prompt_ids, answer_ids) of each turn.
        max_draft_tokens: largest K of interest.
        slot_budget: text slots of a pack at most; a longer text makes a pack of its own.
        extra_ids: per pair, what the target would say after the end of its answer.
        description: shown beside the progress bar; without one, no bar.
    """
    matches = [np.zeros(len(answer), dtype=np.int64) for _, answer in pairs]
    num_text_slots = num_chain_slots = 0
    with tqdm(total=len(pairs), desc=description, unit="answer", disable=not description) as bar:
        for texts in pack_texts(pairs, slot_budget, extra_ids):
            chains = PackedChains(drafter, texts)
            counts = _count_matches(chains, max_draft_tokens)
            for text, mine in zip(texts, np.split(counts, np.cumsum(chains.lengths)[:-1]), strict=True):
                matches[text.number] = mine
            num_text_slots += chains.num_text_slots
            num_chain_slots += chains.num_chain_slots
            bar.update(len(texts))
    return Replayed(matches, num_text_slots, num_chain_slots)


def _count_matches(chains: PackedChains, max_draft_tokens: int) -> np.ndarray:
    """Leading matches of every chain of a pack."""
    counts = np.zeros(len(chains.chain), dtype=np.int64)
    hidden: Tensor | None = chains.read_texts()
    while hidden is not None:
        is_match = choices(chains.drafter, hidden) == chains.labels
        counts[chains.chain[is_match]] += 1
        hidden = chains.deepen(is_match) if chains.depth + 1 < max_draft_tokens else None
    return counts


def choices(drafter: Drafter, hidden: Tensor) -> np.ndarray:
    """Draft token of every slot, without holding all logits: [A, hidden] -> int64 [A]."""
    head = drafter.runner.model.get_output_embeddings()
    return torch.cat([drafter.choose(head(chunk)) for chunk in hidden.split(LOGIT_CHUNK)]).cpu().numpy()
