"""The algebra of parallel drafting: every slot is named by (document, anchor, depth).

A slot is one place in a packed training sequence.

* anchor a: the last real token the slot may see. depth d: how many mask tokens of its chain it has reached.
  Depth 0 is the real token itself.
* position = a + d, and the slot predicts token a + d + 1.
* A slot sees the real tokens of its document up to its anchor, and its own chain up to its own depth: what it will see
  when the draft model serves. In a layer with a sliding window of W tokens, it sees only those less than W positions
  before its own.

COD (conditional drop-token, PARD section 3.3) keeps fewer anchors at each depth and only ever extends a chain that
already reaches the depth before. So a chain is a prefix, and COD is one random chain length per anchor.

Example: tokens 0..3, all labels after token 0, K = 3, nothing dropped:

    slot      0 1 2 3 | 4 5   6
    anchor    0 1 2 3 | 0 0   1        (chains of anchors 0 and 1; anchor 2 has no label two tokens on)
    depth     0 0 0 0 | 1 2   1
    position  0 1 2 3 | 1 2   2
    label     1 2 3 - | 2 3   3

Everything here works on numpy arrays and on torch tensors alike and imports neither's heavy parts, so that the
collator, the loss, replay, decoding and the validation of settings all ask the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pard_train.config import DraftConfig

# Legend: L tokens of one document, T slots, K draft tokens.

IGNORE_INDEX = -100  # the label of a slot that is not supervised, as in torch's cross entropy
PADDING_DOCUMENT = -1  # and below: the documents of padding slots, causal texts that nobody else sees
PADDING_LENGTH = 128  # slots of such a document: models have more positions

Array = Any  # numpy array or torch tensor of integers
Window = int | None  # tokens of a layer's sliding window; None: full attention


@dataclass(frozen=True)
class SlotLayout:
    """Names of T slots: three integer arrays of shape [T]."""

    document: Array
    anchor: Array
    depth: Array

    @property
    def position(self) -> Array:
        """Rotary position of every slot, [T]."""
        return self.anchor + self.depth

    def __len__(self) -> int:
        return len(self.anchor)

    def __getitem__(self, where: Any) -> SlotLayout:
        return SlotLayout(self.document[where], self.anchor[where], self.depth[where])


@dataclass(frozen=True)
class DrawKey:
    """Names one COD draw. Equal keys give equal chains on every rank, worker and machine."""

    seed: int
    epoch: int
    example: int


# ---- Who sees whom --------------------------------------------------------------------------------------------------


def is_visible(query: SlotLayout, key: SlotLayout, window: Window = None) -> Array:
    """Whether each query slot sees each key slot.

    Args:
        query: layout of Tq slots.
        key: layout of Tk slots.
        window: of the layer, W tokens.

    Returns:
        Boolean array [Tq, Tk]. Every slot sees itself, so that no row is empty.
    """
    q_document, q_anchor, q_depth = (part[:, None] for part in (query.document, query.anchor, query.depth))
    k_document, k_anchor, k_depth = (part[None, :] for part in (key.document, key.anchor, key.depth))
    is_visible_text = (k_depth == 0) & (k_anchor <= q_anchor)
    is_own_chain = (k_anchor == q_anchor) & (k_depth <= q_depth)
    is_visible_key = (q_document == k_document) & (is_visible_text | is_own_chain)
    if window is None:
        return is_visible_key
    return is_visible_key & (query.position[:, None] - key.position[None, :] < window)


# ---- COD as chain lengths -------------------------------------------------------------------------------------------


def count_at_depth(num_anchors: Array, depth: int, draft: DraftConfig) -> Array:
    """Anchors that COD keeps at `depth`: floor(n * max(r^d, r_min)) (PARD, section 3.3), of at most `max_anchors`.

    >>> [int(count_at_depth(100, d, DraftConfig())) for d in range(1, 6)]
    [70, 49, 34, 24, 20]
    """
    retention = max(draft.retention_ratio**depth, draft.min_retention)
    most = num_anchors if draft.max_anchors is None else np.minimum(num_anchors, draft.max_anchors)
    return np.floor(most * retention + 1e-9).astype(np.int64)  # 100 * 0.7**2 is 48.999.. in floating point


def max_slots(num_tokens: int, draft: DraftConfig) -> int:
    """Upper bound of the slots that a document of `num_tokens` tokens takes, whatever its turns and the draw."""
    depths = range(1, draft.num_draft_tokens)
    return num_tokens + sum(int(count_at_depth(num_tokens, depth, draft)) for depth in depths)


def supervised_runs(loss_mask: np.ndarray) -> np.ndarray:
    """Where labels stand, as runs.

    >>> supervised_runs(np.array([0, 1, 1, 0, 1], dtype=bool)).tolist()
    [[1, 3], [4, 5]]

    Args:
        loss_mask: bool [L].

    Returns:
        int32 [R, 2]: first and past-the-last token of every run.
    """
    edges = np.flatnonzero(np.diff(loss_mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).astype(np.int32)


def slot_bounds(num_tokens: np.ndarray, runs: np.ndarray, document: np.ndarray, draft: DraftConfig) -> np.ndarray:
    """Upper bound of the slots that each of N documents takes, whatever the draw; about one slot per turn too high.

    Depth d keeps count_at_depth(n, d) of n anchors, and none that is less than d labels before the end of its turn.

    Args:
        num_tokens: int [N].
        runs: int [R, 2], the supervised runs of all documents.
        document: int [R], which document each run belongs to.
        draft: K, retention ratio and floor.

    Returns:
        int64 [N].
    """

    def _anchors(depth: int) -> np.ndarray:  # whose chain may reach this depth, per document
        first_anchor = np.maximum(runs[:, 0] - 1, 0)  # the first token of a document has no anchor before it
        reach = np.maximum(runs[:, 1] - 1 - depth - first_anchor, 0)
        return np.bincount(document, weights=reach, minlength=len(num_tokens)).astype(np.int64)

    bounds, num_anchors = num_tokens.astype(np.int64), _anchors(0)
    for depth in range(1, draft.num_draft_tokens):
        bounds += np.minimum(count_at_depth(num_anchors, depth, draft), _anchors(depth))
    return bounds


def chain_limits(loss_mask: np.ndarray, num_draft_tokens: int) -> np.ndarray:
    """Longest supervised chain per anchor.

    Args:
        loss_mask: bool [L]; True where the token is a label, in one run per assistant turn.
        num_draft_tokens: K.

    Returns:
        int64 [L]: -1 where not even the next token is a label (no eligible anchor), else the largest depth d <= K-1
        such that tokens a+1 .. a+d+1 are all labels. A chain never runs past the end of its turn.
    """
    num_tokens = len(loss_mask)
    run_end = np.full(num_tokens + 1, num_tokens, dtype=np.int64)  # first unsupervised token at or after t
    index = np.where(loss_mask, num_tokens, np.arange(num_tokens))
    run_end[:num_tokens] = np.minimum.accumulate(index[::-1])[::-1]
    anchors = np.arange(num_tokens)
    return np.minimum(run_end[1:] - anchors - 2, num_draft_tokens - 1)


def sample_chain_lengths(loss_mask: np.ndarray, draft: DraftConfig, key: DrawKey) -> np.ndarray:
    """One COD draw: how many mask slots follow each anchor.

    One permutation ranks the n eligible anchors. Depth d keeps the first count_at_depth(n, d) of those that depth d - 1
    kept and whose turn goes on for so long. The counts are exact as long as enough turns do.

    Args:
        loss_mask: bool [L].
        draft: K, retention ratio and floor.
        key: names the draw.

    Returns:
        int64 [L], 0 .. K-1; 0 also for anchors that are not eligible.
    """
    limits = chain_limits(loss_mask, draft.num_draft_tokens)
    eligible = np.flatnonzero(limits >= 0)
    kept = np.random.default_rng([key.seed, key.epoch, key.example]).permutation(eligible)
    lengths = np.zeros(len(loss_mask), dtype=np.int64)
    for depth in range(1, draft.num_draft_tokens):
        kept = kept[limits[kept] >= depth][: count_at_depth(len(eligible), depth, draft)]
        lengths[kept] = depth
    return lengths


# ---- Slots of one document ------------------------------------------------------------------------------------------


def lay_out_document(chain_lengths: np.ndarray, document: int = 0) -> SlotLayout:
    """Slots of one document: its L real tokens, then its chains sorted by anchor.

    Sorted chains keep mask-to-mask attention a narrow band and mask-to-text attention causal by anchor.

    Args:
        chain_lengths: int [L].
        document: number of the document within its pack.

    Returns:
        Layout of L + sum(chain_lengths) slots, int64.
    """
    num_tokens = len(chain_lengths)
    chain_anchor = np.repeat(np.arange(num_tokens), chain_lengths)
    first_slot = np.cumsum(chain_lengths) - chain_lengths
    chain_depth = np.arange(len(chain_anchor)) - np.repeat(first_slot, chain_lengths) + 1
    anchor = np.concatenate([np.arange(num_tokens), chain_anchor])
    depth = np.concatenate([np.zeros(num_tokens, dtype=np.int64), chain_depth])
    return SlotLayout(np.full_like(anchor, document), anchor, depth)


def lay_out_text(position: Array) -> SlotLayout:
    """Real tokens of one document at some positions, [T]."""
    return SlotLayout(position * 0, position, position * 0)


def slot_tokens(layout: SlotLayout, input_ids: np.ndarray, mask_token_id: int) -> np.ndarray:
    """Input id of every slot of one document, [T]: the real token at depth 0, the mask token elsewhere."""
    return np.where(layout.depth == 0, input_ids[layout.anchor], mask_token_id)


def slot_labels(layout: SlotLayout, input_ids: np.ndarray, loss_mask: np.ndarray) -> np.ndarray:
    """Label of every slot of one document, [T]: token a + d + 1 where it is supervised, else IGNORE_INDEX."""
    target = layout.position + 1
    is_inside = target < len(input_ids)
    target = np.minimum(target, len(input_ids) - 1)
    return np.where(is_inside & loss_mask[target], input_ids[target], IGNORE_INDEX)
