"""The chains of many texts, deepened together: one forward pass per depth, over cached keys and values.

A pack holds many texts. Its slots are the tokens of all texts in sequence; texts with a common prefix (a system prompt,
a question that several targets answered, the earlier turns of a chat) share its slots. A mask slot is one row of a
forward pass. It attends to the slots of its text up to its anchor and to those of its own chain, and to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pard_train.acceptance.chain_attention import Block, Memory, chain_attention
from pard_train.generation.proposers import Drafter

# Legend: L tokens of a text in the forward pass, A anchors whose chains continue, R rows of a forward pass,
#         Q rows of a block, P text tokens that a block attends to.

PromptAnswer = tuple[list[int], list[int]]  # ids of a prompt, at least one, and of its answer

MAX_BLOCK_ROWS = 256  # a mask of 2 MB over a text of 8192 tokens


@dataclass(frozen=True)
class Text:
    """One prompt with its answer, in its pack.

    Attributes:
        number: of the pair.
        ids: prompt, answer and its continuation, int64.
        first_anchor: last token of the prompt.
        num_shared: leading tokens that share the slots of earlier texts.
        slots: slot of each token, increasing, int64 [L]; the last answer token predicts nothing of interest and has
            none.
    """

    number: int
    ids: np.ndarray
    first_anchor: int
    num_shared: int
    slots: np.ndarray


def pack_texts(
    pairs: Sequence[PromptAnswer], slot_budget: int, extra_ids: Sequence[Sequence[int]] | None = None
) -> Iterator[list[Text]]:
    """Answered texts in packs. In sorted order the neighbour has the longest common prefix of all texts before."""
    answered = [number for number, (_, answer) in enumerate(pairs) if answer]
    pack: list[Text] = []
    num_slots, before = 0, np.zeros(0, dtype=np.int64)
    for number in sorted(answered, key=lambda n: pairs[n][0] + pairs[n][1]):
        prompt, answer = pairs[number]
        read = np.array(prompt + answer[:-1], dtype=np.int64)
        num_shared = _num_shared(before, read) if pack else 0
        if pack and num_slots + len(read) - num_shared > slot_budget:
            yield pack
            pack, num_slots, num_shared = [], 0, 0
        own = np.arange(num_slots, num_slots + len(read) - num_shared)
        slots = np.concatenate([pack[-1].slots[:num_shared], own]) if num_shared else own
        extra = list(extra_ids[number]) if extra_ids is not None else []
        ids = np.array(prompt + answer + extra, dtype=np.int64)
        pack.append(Text(number, ids, len(prompt) - 1, num_shared, slots))
        num_slots, before = num_slots + len(own), read
    if pack:
        yield pack


def _num_shared(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


class PackedChains:
    """The chains of all anchors of a pack, deepened together.

    Attributes:
        lengths: number of anchors of each text, one before each answer token.
        depth: of the slots computed last.
        chain: the chains of these slots, numbered anchor by anchor and text by text, int64 [A].
    """

    def __init__(self, drafter: Drafter, texts: list[Text]):
        self.drafter = drafter
        self.lengths = np.array([len(text.slots) - text.first_anchor for text in texts])
        self.chain = np.arange(self.lengths.sum())
        self.depth = 0
        self._texts = texts
        self._text = np.repeat(np.arange(len(texts)), self.lengths)  # of every chain, as the next three
        self._anchor = np.concatenate([np.arange(t.first_anchor, len(t.slots)) for t in texts])
        self._slot = np.concatenate([t.slots[t.first_anchor :] for t in texts])
        self._first_id = (np.cumsum([len(t.ids) for t in texts]) - [len(t.ids) for t in texts])[self._text]
        self._ids = np.concatenate([t.ids for t in texts])
        self._memory = Memory()

    @property
    def labels(self) -> np.ndarray:
        """The token of the text that each slot predicts, int64 [A]."""
        return self._ids[self._first_id[self.chain] + self._anchor[self.chain] + self.depth + 1]

    def prefill(self) -> Tensor:
        """Forward pass of the texts, depth 0 of every chain: hidden states [A, hidden]."""
        position = np.concatenate([np.arange(t.num_shared, len(t.slots)) for t in self._texts])
        ids = np.concatenate([t.ids[t.num_shared : len(t.slots)] for t in self._texts])
        hidden = self._forward(
            self.drafter.readable(ids),
            position,
            _text_blocks(self._texts, self.drafter.runner.is_fused, self._device()),
        )
        return hidden[torch.from_numpy(self._slot).to(hidden.device)]

    def deepen(self, is_wanted: np.ndarray) -> Tensor | None:
        """Append a mask slot to every wanted chain (bool [A]) that has a token of its text left to predict.

        Returns:
            Hidden states [A, hidden] of the chains that continue; None if none does.
        """
        num_ids = np.array([len(text.ids) for text in self._texts])[self._text[self.chain]]
        kept = np.flatnonzero(is_wanted & (self._anchor[self.chain] + self.depth + 2 < num_ids))
        if len(kept) == 0:
            return None
        self.chain, self.depth = self.chain[kept], self.depth + 1
        self._memory.kept = torch.from_numpy(kept).to(self._device())
        text, anchor = self._text[self.chain], self._anchor[self.chain]
        ids = np.full_like(anchor, self.drafter.mask_token_id)
        blocks = _chain_blocks(self._texts, text, anchor, self.depth, self._device())
        return self._forward(ids, anchor + self.depth, blocks)

    def _device(self) -> torch.device:
        return self.drafter.runner.device

    def _forward(self, ids: np.ndarray, position: np.ndarray, blocks: list[Block]) -> Tensor:
        """Hidden states [R, hidden] of R rows, each with its id and rotary position."""
        self._memory.blocks, self._memory.depth = blocks, self.depth
        inputs = [torch.from_numpy(part).to(self._device())[None] for part in (ids, position)]
        model = self.drafter.runner.model  # its matrix products take half the time on a CPU
        with chain_attention(model):
            output = model.base_model(inputs[0], position_ids=inputs[1], use_cache=False, chain_memory=self._memory)
        return output.last_hidden_state[0]


def _text_blocks(texts: list[Text], is_fused: bool, device: torch.device) -> list[Block]:
    """Blocks of depth 0: causal within each text, its shared prefix included. A fused kernel takes a whole text."""
    blocks, row = [], 0
    for text in texts:
        size = len(text.slots) if is_fused and not text.num_shared else MAX_BLOCK_ROWS
        for start in range(text.num_shared, len(text.slots), size):
            stop = min(start + size, len(text.slots))
            keys, anchor = _keys(text.slots[:stop], device), torch.arange(start, stop, device=device)
            blocks.append(Block(row, row + stop - start, keys, stop, anchor, depth=0))
            row += stop - start
    return blocks


def _chain_blocks(
    texts: list[Text], text: np.ndarray, anchor: np.ndarray, depth: int, device: torch.device
) -> list[Block]:
    """Blocks of a greater depth: every row attends to its text up to its anchor; `Memory` adds its own chain."""
    blocks = []
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    for first, past in zip(starts.tolist(), [*starts[1:].tolist(), len(text)], strict=True):
        for start in range(first, past, MAX_BLOCK_ROWS):
            stop = min(start + MAX_BLOCK_ROWS, past)
            num_text = int(anchor[stop - 1]) + 1
            keys = _keys(texts[text[start]].slots[:num_text], device)
            own_anchor = torch.from_numpy(anchor[start:stop]).to(device)
            blocks.append(Block(start, stop, keys, num_text, own_anchor, depth))
    return blocks


def _keys(slots: np.ndarray, device: torch.device) -> slice | Tensor:
    """Index of the keys of some slots: a view if the slots are consecutive, else a gather."""
    if slots[-1] - slots[0] + 1 == len(slots):
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return torch.from_numpy(slots).to(device)
