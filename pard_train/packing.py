"""Packing documents with their chains into packs of a constant number of slots, for a whole run at once.

All epochs are planned up front into one list of packs, because the number of packs differs from epoch to epoch with the
COD draws. Training walks that list in order, so that a step's documents depend on nothing but (seed, global batch), and
resuming means skipping.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from pard_train.chat import Document
from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.layout import (
    IGNORE_INDEX,
    PADDING_DOCUMENT,
    DrawKey,
    SlotLayout,
    lay_out_document,
    sample_chain_lengths,
    slot_labels,
    slot_tokens,
)
from pard_train.objective import slot_weights

# Legend: T slots of a pack (the slot budget).


@dataclass(frozen=True)
class Member:
    """One document of a pack, and the name of its COD draw."""

    document: Document
    key: DrawKey


def best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into bins, largest first, each into the fullest bin that still holds it (best-fit decreasing).

    Args:
        sizes: size of every item, each at most `budget`.
        budget: size of a bin.

    Returns:
        Item numbers per bin.
    """
    room: list[tuple[int, int]] = []  # (slots left, bin), sorted
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect_left(room, (sizes[item], -1))
        if place == len(room):
            bins.append([])
            left, number = budget, len(bins) - 1
        else:
            left, number = room.pop(place)
        bins[number].append(item)
        insort(room, (left - sizes[item], number))
    return bins


class PackedDataset(Dataset[list[Member]]):
    """All packs of a run, in training order. An item is the list of a pack's members; [] is a pack of padding.

    Args:
        documents: the corpus.
        draft: K and COD.
        slot_budget: slots per pack.
        num_epochs: passes over the corpus, each with fresh chains and a fresh order.
        seed: of order and chains.
        packs_per_step: packs of one optimizer step over all ranks; each epoch's last step is filled up with padding.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        draft: DraftConfig,
        *,
        slot_budget: int,
        num_epochs: int,
        seed: int,
        packs_per_step: int = 1,
        show_progress: bool = False,
    ):
        self.documents = documents
        self.seed = seed
        self.num_epochs = num_epochs
        self.packs: list[tuple[int, list[int]]] = []  # (epoch, document numbers)
        num_used = num_packs = 0
        for epoch in tqdm(range(num_epochs), desc="pack", unit="epoch", disable=not show_progress):
            sizes = [
                len(d.input_ids) + int(sample_chain_lengths(d.loss_mask, draft, DrawKey(seed, epoch, i)).sum())
                for i, d in enumerate(documents)
            ]
            packs = best_fit(sizes, slot_budget)
            order = np.random.default_rng([seed, epoch]).permutation(len(packs))
            self.packs += [(epoch, packs[i]) for i in order]
            self.packs += [(epoch, [])] * (-len(self.packs) % packs_per_step)
            num_used, num_packs = num_used + sum(sizes), num_packs + len(packs)
        self.fill = num_used / (num_packs * slot_budget)  # share of slots in use, 0..1

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Member]:
        epoch, members = self.packs[index]
        return [Member(self.documents[i], DrawKey(self.seed, epoch, i)) for i in members]


@dataclass(frozen=True)
class PardCollator:
    """Turns one pack into tensors: draws the chains (COD), lays out the slots, appends mask tokens, pads to the budget.

    The result is a dict of tensors of shape [1, T]: `input_ids`, `labels`, `document`, `anchor`, `depth` (int64) and
    `weight` (float32). It depends on the pack alone, not on rank, worker or neighbours.
    """

    draft: DraftConfig
    objective: ObjectiveConfig
    mask_token_id: int
    slot_budget: int

    def __call__(self, features: Sequence[Sequence[Member]]) -> dict[str, Tensor]:
        (members,) = features  # the slot budget is the batch size: one pack per forward
        layouts, tokens, labels = [], [], []
        for number, member in enumerate(members):
            document = member.document
            lengths = sample_chain_lengths(document.loss_mask, self.draft, member.key)
            layout = lay_out_document(lengths, number)
            layouts.append(layout)
            tokens.append(slot_tokens(layout, document.input_ids, self.mask_token_id))
            labels.append(slot_labels(layout, document.input_ids, document.loss_mask))
        num_padding = self.slot_budget - sum(map(len, layouts))
        if num_padding < 0:
            raise ValueError(f"a pack of {self.slot_budget - num_padding} slots is over the budget {self.slot_budget}")
        layouts.append(
            SlotLayout(np.full(num_padding, PADDING_DOCUMENT), np.arange(num_padding), np.zeros(num_padding, dtype=int))
        )
        tokens.append(np.zeros(num_padding, dtype=int))
        labels.append(np.full(num_padding, IGNORE_INDEX))
        batch = {
            "input_ids": tokens,
            "labels": labels,
            "document": [layout.document for layout in layouts],
            "anchor": [layout.anchor for layout in layouts],
            "depth": [layout.depth for layout in layouts],
        }
        tensors = {name: torch.from_numpy(np.concatenate(parts).astype(np.int64)) for name, parts in batch.items()}
        tensors["weight"] = slot_weights(tensors["depth"], tensors["labels"], self.objective)
        return {name: tensor[None] for name, tensor in tensors.items()}
