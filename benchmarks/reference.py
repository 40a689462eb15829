"""The training step of PARD's public reference (github.com/AMD-AGI/PARD, `pard_train.py`), for comparison only.

Written after what that program does, not with its code: one draw of COD for a whole batch, over prompt and padding,
that wraps around the end; a float32 mask of (K * L) x (K * L) for every padded sample, out of which the kept slots are
cut; attention that is not fused; logits in float32 for every slot; gradient checkpointing. It is the oracle of tests,
which give it our chains, and the baseline of benchmarks/training.py, which lets it draw its own.

One thing differs from the original: labels follow `loss_mask`, so that both sides learn from the same tokens.
The original has its labels in the prompt too, and none at the end of a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pard_train.config import DraftConfig
from pard_train.data.chat import Document
from pard_train.layout import IGNORE_INDEX

# Legend: B samples, L tokens of a padded sample, K depths, T slots kept of K * L, V vocabulary.


@dataclass(frozen=True)
class DenseBatch:
    """Samples of equal padded length with the same slots, depth after depth.

    Attributes:
        input_ids: int64 [B, T].
        labels: int64 [B, T]; the token that a slot predicts, IGNORE_INDEX where none.
        position_ids: int64 [B, T].
        mask: float32 [B, 1, T, T], added to the attention scores.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> DenseBatch:
        """The same on another device."""
        parts = (self.input_ids, self.labels, self.position_ids, self.mask)
        return DenseBatch(*(part.to(device) for part in parts))


def draw_kept(num_tokens: int, draft: DraftConfig, draw: np.random.Generator) -> np.ndarray:
    """The reference's COD: which positions are kept at each depth, one draw for all samples of a batch.

    Positions are drawn from all of the padded sample, and the successor of its last position is its first.

    Args:
        num_tokens: L.
        draft: K, retention ratio and floor.
        draw: random numbers.

    Returns:
        bool [K, L].
    """
    kept = np.zeros((draft.num_draft_tokens, num_tokens), dtype=bool)
    kept[0] = True
    candidates = np.arange(num_tokens)
    for depth in range(1, draft.num_draft_tokens):
        count = int(num_tokens * max(draft.retention_ratio**depth, draft.min_retention))
        chosen = draw.permutation(candidates)[:count]
        kept[depth, chosen] = True
        candidates = (chosen + 1) % num_tokens
    return kept


def kept_of_chains(chain_lengths: np.ndarray, num_tokens: int, num_draft_tokens: int) -> np.ndarray:
    """The slots of given chains in the form of `draw_kept`: the chain of anchor a has depth d at position a + d.

    >>> kept_of_chains(np.array([2, 0, 0]), 4, 3).astype(int).tolist()
    [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]
    """
    kept = np.zeros((num_draft_tokens, num_tokens), dtype=bool)
    kept[0] = True
    for anchor, length in enumerate(chain_lengths):
        for depth in range(1, int(length) + 1):
            kept[depth, anchor + depth] = True
    return kept


def dense_mask(num_tokens: int, num_draft_tokens: int) -> Tensor:
    """Float mask over all positions at all depths: 0 where the row's slot sees the column's, else the least float32.

    A slot at position p and depth d sees the real tokens up to p - d, and its chain: position p - i at depth d - i.

    Returns:
        float32 [K * L, K * L]: 64 MiB for 512 tokens at K = 8.
    """
    depth = torch.arange(num_draft_tokens).repeat_interleave(num_tokens)
    position = torch.arange(num_tokens).repeat(num_draft_tokens)
    first = position - depth  # where the slot's chain leaves the text
    is_visible_text = (depth == 0)[None, :] & (position[None, :] <= first[:, None])
    is_own_chain = (first[None, :] == first[:, None]) & (depth[None, :] <= depth[:, None])
    mask = torch.full((len(depth), len(depth)), torch.finfo(torch.float32).min)
    return mask.masked_fill_(is_visible_text | is_own_chain, 0.0)


def build_dense_batch(
    documents: Sequence[Document], kept: np.ndarray, mask_token_id: int, pad_token_id: int = 0
) -> DenseBatch:
    """Pad documents to one length, repeat them for every depth, and cut out the kept slots and their masks.

    Args:
        documents: B of them, none longer than L.
        kept: bool [K, L].
        mask_token_id: input at depths above 0.
        pad_token_id: input after the end of a document.
    """
    num_depths, num_tokens = kept.shape
    ids, labels = [], []
    for document in documents:
        size = len(document.input_ids)
        padded = np.full(num_tokens, pad_token_id, dtype=np.int64)
        padded[:size] = document.input_ids
        ids.append(np.concatenate([padded, np.full((num_depths - 1) * num_tokens, mask_token_id)]))
        labels.append(np.concatenate([_labels(document, num_tokens, depth) for depth in range(num_depths)]))
    slots = torch.from_numpy(np.flatnonzero(kept))  # depth after depth
    mask = dense_mask(num_tokens, num_depths).repeat(len(documents), 1, 1, 1)  # [B, 1, K * L, K * L]
    return DenseBatch(
        torch.from_numpy(np.stack(ids))[:, slots],
        torch.from_numpy(np.stack(labels))[:, slots],
        (slots % num_tokens).repeat(len(documents), 1),
        mask[:, :, slots, :][:, :, :, slots].contiguous(),
    )


def _labels(document: Document, num_tokens: int, depth: int) -> np.ndarray:
    """What each position predicts at a depth, [L]: the next token, but not the first `depth` of all tokens."""
    labels = np.full(num_tokens, IGNORE_INDEX, dtype=np.int64)
    after = np.arange(1, len(document.input_ids))
    supervised = after[document.loss_mask[1:] & (after >= max(depth, 1))]
    labels[supervised - 1] = document.input_ids[supervised]
    return labels


def prepare_reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """Set a model up as the reference trains it: eager attention, gradient checkpointing."""
    model.set_attn_implementation("eager")
    model.gradient_checkpointing_enable()
    return model.train()


def dense_losses(model: PreTrainedModel, batch: DenseBatch) -> Tensor:
    """Cross entropy of every slot from the logits of every slot, float32 [B, T]; 0 where nothing is supervised."""
    outputs = model(
        input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.position_ids, use_cache=False
    )
    logits = outputs.logits.float()  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(batch.labels)


def dense_loss(model: PreTrainedModel, batch: DenseBatch) -> Tensor:
    """The reference's loss: the mean over the supervised slots of a batch."""
    return dense_losses(model, batch).sum() / (batch.labels != IGNORE_INDEX).sum()
