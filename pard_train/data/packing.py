"""Packing documents with their chains into packs of a constant number of slots, for a whole run at once.

The packs of all epochs are one list. Training walks it in order, so that a step's documents depend on nothing but
(seed, global batch), and resuming means skipping. The plan is a few integers per document; documents stay on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core.objectives import cat_weights, slot_weights
from pard_train.data.chat import Document
from pard_train.data.scores import Scores, TokenScores
from pard_train.errors import UserError
from pard_train.layout import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    PADDING_LENGTH,
    DrawKey,
    SlotLayout,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
    slot_tokens,
)

# Legend: D documents, T slots of a pack (the slot budget), S supervised slots, k tokens of the target's top k.
# T' and S' are those of one document.


@dataclass(frozen=True)
class Member:
    """One document of a pack, the key of its COD draw, and the target's scores if the objective needs them."""

    document: Document
    key: DrawKey
    scores: TokenScores | None = None


def best_fit(sizes: np.ndarray, budget: int) -> np.ndarray:
    """Pack items into bins, largest first, each into the fullest bin that still holds it (best-fit decreasing).

    `sizes`: int [N], descending, each from 1 to `budget`, the size of a bin. Returns int32 [N]: the bin of every item.
    """
    with_room: list[list[int]] = [[] for _ in range(budget + 1)]  # bins by the slots they have left
    rooms = 0  # bit r is set where with_room[r] is not empty: the next room of at least r is one shift away
    bins = np.empty(len(sizes), dtype=np.int32)
    num_bins = 0
    for item, size in enumerate(sizes.tolist()):
        larger = rooms >> size
        if larger:
            room = size + (larger & -larger).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number, num_bins = budget, num_bins, num_bins + 1
        bins[item] = number
        with_room[room - size].append(number)
        rooms |= 1 << (room - size)
    return bins


class PackedDataset(Dataset[list[Member]]):
    """All packs of a run, in training order. An item is the list of a pack's members; [] is a pack of padding.

    Bins are planned once, with upper bounds that hold for every draw. An epoch has its own chains and order of packs,
    and its own documents in the places of equal size. Raises UserError if a document does not fit into a pack.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        bounds: np.ndarray,  # int [D], upper bound of each document's slots
        *,
        slot_budget: int,  # slots per pack
        num_epochs: int,
        seed: int,  # of order and chains
        packs_per_step: int = 1,  # over all ranks; padding packs complete the last step of an epoch
        scores: Scores | None = None,  # for objectives that need a target
    ):
        self.documents, self.seed, self.num_epochs, self.scores = documents, seed, num_epochs, scores
        largest = int(bounds.argmax())
        if bounds[largest] > slot_budget:
            raise UserError(
                f"data.slot_budget={slot_budget} cannot hold {documents[largest].origin}, which needs up to "
                f"{bounds[largest]} slots: set data.slot_budget>={bounds[largest]}"
            )
        bins = best_fit(np.sort(bounds)[::-1], slot_budget)
        place = np.argsort(bins, kind="stable")  # places in descending order of size, bin after bin
        self._stops = np.cumsum(np.bincount(bins))  # int64 [packs of an epoch]
        self._packs_per_epoch = len(self._stops) + -len(self._stops) % packs_per_step
        self._members = np.empty((num_epochs, len(bounds)), dtype=np.int32)  # document numbers, pack after pack
        self._order = np.full((num_epochs, self._packs_per_epoch), -1, dtype=np.int32)  # -1 is a pack of padding
        for epoch in range(num_epochs):
            draw = np.random.default_rng([seed, epoch])
            self._order[epoch, : len(self._stops)] = draw.permutation(len(self._stops))
            self._members[epoch] = np.lexsort((draw.random(len(bounds)), -bounds))[place]

    def __len__(self) -> int:
        return self.num_epochs * self._packs_per_epoch

    def __getitem__(self, index: int) -> list[Member]:
        epoch, step = divmod(index, self._packs_per_epoch)
        pack = self._order[epoch, step]
        if pack < 0:
            return []
        members = self._members[epoch, self._stops[pack - 1] if pack else 0 : self._stops[pack]].tolist()
        scores = self.scores.of_document if self.scores is not None else lambda _: None
        return [Member(self.documents[i], DrawKey(self.seed, epoch, i), scores(i)) for i in members]


@dataclass(frozen=True)
class PardCollator:
    """Turns one pack into tensors: draws the chains (COD), lays out the slots, pads to the budget.

    The tensors are `input_ids`, `labels`, `document`, `anchor`, `depth` (int64) and `weight` (float32), the product of
    the weights that are constants of the data, [1, T]. For terms that compare with a target, also `teacher_ids` (int32)
    and `teacher_logprobs` (float16) of the supervised slots, [1, S, k]. They depend on the pack alone.
    """

    draft: DraftConfig
    objective: ObjectiveConfig
    mask_token_id: int
    slot_budget: int

    def __call__(self, features: Sequence[Sequence[Member]]) -> dict[str, Tensor]:
        """Tensors of one pack. Raises ValueError if it is over the budget, or lacks scores that the objective needs."""
        (members,) = features  # the slot budget is the batch size: one pack per forward
        parts = [self._slots(number, member) for number, member in enumerate(members)]
        num_padding = self.slot_budget - sum(len(part["depth"]) for part in parts)
        if num_padding < 0:
            raise ValueError(f"a pack of {self.slot_budget - num_padding} slots is over the budget {self.slot_budget}")
        parts.append(self._padding(num_padding, parts))
        tensors = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[-1]}
        weight = slot_weights(tensors["depth"], tensors["labels"], self.objective)
        if self.objective.cat:
            weight *= tensors.pop("cat")
        return {name: tensor[None] for name, tensor in (tensors | {"weight": weight}).items()}

    def _slots(self, number: int, member: Member) -> dict[str, np.ndarray]:
        """Slots of one document; [T'] each, and [S', k] of its supervised ones."""
        document = member.document
        layout = lay_out_document(sample_chain_lengths(document.loss_mask, self.draft, member.key), number)
        labels = slot_labels(layout, document.input_ids, document.loss_mask)
        part = {
            "input_ids": slot_tokens(layout, document.input_ids, self.mask_token_id).astype(np.int64),
            "labels": labels.astype(np.int64),
            **_names(layout),
        }
        if not self.objective.needs_scores:
            return part
        if member.scores is None:
            raise ValueError(f"{document.origin} has no scores, but the objective needs them")
        is_supervised = labels != IGNORE_INDEX
        order = np.cumsum(document.loss_mask) - 1  # of every supervised token among its document's
        label = order[layout.position[is_supervised] + 1]  # [S']
        if self.objective.needs_teacher:
            part["teacher_ids"] = member.scores.top_ids[label]
            part["teacher_logprobs"] = member.scores.top_logprobs[label]
        if self.objective.cat:
            part["cat"] = np.ones(len(layout), dtype=np.float32)
            part["cat"][is_supervised] = cat_weights(member.scores.label_logprobs, label, layout.depth[is_supervised])
        return part

    def _padding(self, num_slots: int, others: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Slots that no other slot attends to, without labels."""
        zeros, number = np.zeros(num_slots, dtype=np.int64), np.arange(num_slots)
        part = {
            "input_ids": zeros,
            "labels": np.full_like(zeros, IGNORE_INDEX),
            **_names(SlotLayout(PADDING_DOCUMENT - number // PADDING_LENGTH, number % PADDING_LENGTH, zeros)),
        }
        if self.objective.needs_teacher:
            top_k = others[0]["teacher_ids"].shape[1] if others else 1
            part["teacher_ids"] = np.zeros((0, top_k), dtype=np.int32)
            part["teacher_logprobs"] = np.zeros((0, top_k), dtype=np.float16)
        if self.objective.cat:
            part["cat"] = np.ones(num_slots, dtype=np.float32)
        return part


def _names(layout: SlotLayout) -> dict[str, np.ndarray]:
    return {name: getattr(layout, name).astype(np.int64) for name in ("document", "anchor", "depth")}
