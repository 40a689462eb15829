"""Replay: exact acceptance for every K at once, from the target's cached greedy text, without the target.

Under greedy decoding, what a step accepts depends only on the text before it and on the target's own greedy text. So
the drafts at every anchor, compared with that text, give the acceptance of any decoding of it. A chain matters only as
long as it matches: depth 0 runs for all anchors at once, and each further depth only for the chains that still match,
over the kept keys and values. That is about n * tau slots instead of n * K, still exact for every K.

Many texts make one pack. Its slots are the tokens of all texts, one after the other, and texts that begin alike share
the slots of what they share: a system prompt, a question that several targets answered, the earlier turns of a chat.
A slot of depth d stands in one row of the forward pass, attends to the slots of its text up to its anchor and to the d
slots of its own chain, and to nothing else; so no mask is larger than MAX_BLOCK_ROWS rows by one text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, PreTrainedModel

from pard_train.decoding import Drafter

# Legend: L tokens of a text that are read, N tokens of an answer, T slots of a pack, A anchors, R rows of a forward pass,
#         Q rows of a block, P text tokens that a block sees, d slots of a chain, H heads, G heads per key-value head,
#         D head size, V vocabulary.

Pair = tuple[list[int], list[int]]  # ids of a prompt, at least one, and of the target's answer

SLOT_BUDGET = 8192  # text slots of a pack: large matrices, and 0.4 GB of keys and values for a model of 135M in float32
MAX_BLOCK_ROWS = 256  # rows of one attention block
LOGIT_CHUNK = 512  # slots whose logits are in memory at once: 0.3 GB at a vocabulary of 152k in float32
ATTENTION = "pard_replay"


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
            hidden = chains.read_texts()
            for _ in range(max_draft_tokens):
                is_match = choices(drafter, hidden) == chains.labels()
                chains.tally(is_match, matches)
                hidden = chains.deepen(is_match)
                if hidden is None:
                    break
            num_text_slots += chains.num_text_slots
            num_chain_slots += chains.num_chain_slots
            bar.update(len(texts))
    return Replayed(matches, num_text_slots, num_chain_slots)


# ---------------------------------------------------------------------------------------------------------------------
# Packs of texts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """One prompt with its answer, in its pack.

    Attributes:
        number: of the pair.
        ids: prompt, answer and what follows it, int64.
        first_anchor: last token of the prompt.
        num_shared: leading tokens whose slots are those of texts before it.
        slots: slot of each token that is read, increasing, int64 [L]; the last answer token predicts nothing of
            interest and is not read.
    """

    number: int
    ids: np.ndarray
    first_anchor: int
    num_shared: int
    slots: np.ndarray


def pack_texts(
    pairs: Sequence[Pair], slot_budget: int, extra_ids: Sequence[Sequence[int]] | None = None
) -> Iterator[list[Text]]:
    """Texts in packs, those that begin alike side by side. Pairs without an answer are left out.

    In sorted order no text before shares more of a text's beginning than its neighbour does.
    """
    known = [pair_number for pair_number, (_, answer) in enumerate(pairs) if answer]
    pack: list[Text] = []
    num_slots, before = 0, np.zeros(0, dtype=np.int64)
    for number in sorted(known, key=lambda n: pairs[n][0] + pairs[n][1]):
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
    """Tokens that two texts have in common at their beginnings."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


# ---------------------------------------------------------------------------------------------------------------------
# Chains, one depth at a time
# ---------------------------------------------------------------------------------------------------------------------


class PackedChains:
    """The chains of all anchors of a pack, deepened together as far as the caller wants them.

    Attributes:
        depth: of the slots computed last.
        text: which text of the pack each chain belongs to, int64 [A].
        anchor: its anchor within that text, int64 [A].
        num_text_slots, num_chain_slots: computed so far.
    """

    def __init__(self, drafter: Drafter, texts: list[Text]):
        self.drafter = drafter
        self.texts = texts
        self.depth = 0
        counts = [len(text.slots) - text.first_anchor for text in texts]
        self.text = np.repeat(np.arange(len(texts)), counts)
        self.anchor = np.concatenate([np.arange(t.first_anchor, len(t.slots)) for t in texts])
        self.num_text_slots = sum(len(text.slots) - text.num_shared for text in texts)
        self.num_chain_slots = 0
        self._memory = Memory()

    def read_texts(self) -> Tensor:
        """Depth 0 of every chain: hidden states [A, hidden]."""
        parts = [(text.ids, np.arange(text.num_shared, len(text.slots))) for text in self.texts]
        ids = np.concatenate([ids[position] for ids, position in parts])
        position = np.concatenate([position for _, position in parts])
        hidden = self._forward(ids, position, _text_blocks(self.texts, self._device()))
        slots = [self.texts[t].slots[a] for t, a in zip(self.text.tolist(), self.anchor.tolist(), strict=True)]
        return hidden[torch.tensor(slots, device=hidden.device)]

    def labels(self) -> np.ndarray:
        """The text's own token at the place that each chain predicts now, int64 [A]."""
        place = self.anchor + self.depth + 1
        return np.concatenate([t.ids[place[self.text == number]] for number, t in enumerate(self.texts)])

    def tally(self, is_match: np.ndarray, matches: list[np.ndarray]) -> None:
        """Add one to the places of `matches` (one array per pair) whose chain goes on matching."""
        for number, text in enumerate(self.texts):
            mine = self.text == number
            matches[text.number][self.anchor[mine] - text.first_anchor] += is_match[mine]

    def deepen(self, is_wanted: np.ndarray) -> Tensor | None:
        """One more mask slot on every wanted chain that has a token of its text left to predict.

        Args:
            is_wanted: bool [A].

        Returns:
            Hidden states [A, hidden] of the chains that remain, whose names `text` and `anchor` hold; None if none do.
        """
        lengths = np.array([len(text.ids) for text in self.texts])
        kept = np.flatnonzero(is_wanted & (self.anchor + self.depth + 2 < lengths[self.text]))
        if len(kept) == 0:
            return None
        self.text, self.anchor, self.depth = self.text[kept], self.anchor[kept], self.depth + 1
        self.num_chain_slots += len(kept)
        self._memory.kept = torch.from_numpy(kept).to(self._device())
        ids = np.full_like(self.anchor, self.drafter.mask_token_id)
        blocks = _chain_blocks(self.texts, self.text, self.anchor, self._device())
        return self._forward(ids, self.anchor + self.depth, blocks)

    def _device(self) -> torch.device:
        return self.drafter.model.device

    def _forward(self, ids: np.ndarray, position: np.ndarray, blocks: list[Block]) -> Tensor:
        """Hidden states [R, hidden] of R rows, each with its id and rotary position."""
        self._memory.blocks, self._memory.depth = blocks, self.depth
        inputs = [torch.from_numpy(part).to(self._device())[None] for part in (ids, position)]
        with _attention(self.drafter.model, ATTENTION):
            output = self.drafter.model.base_model(
                inputs[0], position_ids=inputs[1], use_cache=False, replay_memory=self._memory
            )
        return output.last_hidden_state[0]


def choices(drafter: Drafter, hidden: Tensor) -> np.ndarray:
    """Draft token of every slot, without holding all logits: [A, hidden] -> int64 [A]."""
    head = drafter.model.get_output_embeddings()
    return torch.cat([drafter.choose(head(chunk)) for chunk in hidden.split(LOGIT_CHUNK)]).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a forward pass, all of one text.

    Attributes:
        keys: slots of the text's first P tokens.
        is_hidden: text tokens that a row must not see, bool [Q, P]; None where row i sees the tokens 0..i.
    """

    start: int
    stop: int
    keys: slice | Tensor
    is_hidden: Tensor | None


def _text_blocks(texts: list[Text], device: torch.device) -> list[Block]:
    """Blocks of depth 0: every text is causal; the rows of one that shares its beginning also see that."""
    blocks, row = [], 0
    for text in texts:
        size = MAX_BLOCK_ROWS if text.num_shared else len(text.slots)
        for start in range(text.num_shared, len(text.slots), size):
            stop = min(start + size, len(text.slots))
            hidden = _is_hidden(np.arange(start, stop), stop, device) if text.num_shared else None
            blocks.append(Block(row, row + stop - start, _keys(text.slots[:stop], device), hidden))
            row += stop - start
    return blocks


def _chain_blocks(texts: list[Text], text: np.ndarray, anchor: np.ndarray, device: torch.device) -> list[Block]:
    """Blocks of a greater depth: each row sees its text up to its anchor (its own chain is added by the memory)."""
    blocks = []
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    for first, past in zip(starts.tolist(), [*starts[1:].tolist(), len(text)], strict=True):
        for start in range(first, past, MAX_BLOCK_ROWS):
            stop = min(start + MAX_BLOCK_ROWS, past)
            num_text = int(anchor[stop - 1]) + 1
            keys = _keys(texts[text[start]].slots[:num_text], device)
            blocks.append(Block(start, stop, keys, _is_hidden(anchor[start:stop], num_text, device)))
    return blocks


def _keys(slots: np.ndarray, device: torch.device) -> slice | Tensor:
    """Where keys stand: a view if they stand side by side, else what to gather."""
    if slots[-1] - slots[0] + 1 == len(slots):
        return slice(int(slots[0]), int(slots[-1]) + 1)
    return torch.from_numpy(slots).to(device)


def _is_hidden(anchor: np.ndarray, num_text: int, device: torch.device) -> Tensor:
    """[Q], P -> bool [Q, P]."""
    return torch.arange(num_text, device=device) > torch.from_numpy(anchor).to(device)[:, None]


class Memory:
    """Keys and values of a pack, per layer: those of its text, and those of the chains that go on.

    Attributes:
        depth: of the rows that attend now; 0 fills the text's part.
        blocks: of these rows.
        kept: which chains of the depth before go on, int64 [A]; set before a greater depth.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.blocks: list[Block] = []
        self.kept: Tensor | None = None
        self._text: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [H / G, T, D] twice
        self._chains: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> [H / G, A, d, D] twice

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of R rows: [H / G, R, G, D], and [H / G, R, D] of their own keys and values, -> like the query."""
        if self.depth == 0:
            self._text[layer] = (key, value)
        else:
            self._chains[layer] = self._extended(layer, key[:, :, None], value[:, :, None])
        text_key, text_value = self._text[layer]
        outputs = []
        for block in self.blocks:
            rows = slice(block.start, block.stop)
            text = (text_key[:, block.keys], text_value[:, block.keys])
            if self.depth == 0:
                outputs.append(_attend_text(query[:, rows], *text, block.is_hidden, scaling))
            else:
                chain_key, chain_value = (part[:, rows] for part in self._chains[layer])
                outputs.append(
                    _attend_chains(query[:, rows], *text, chain_key, chain_value, block.is_hidden, scaling)
                )
        return torch.cat(outputs, dim=1)

    def _extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The chains that go on, with one more slot each: [H / G, A, d, D] twice."""
        if self.depth == 1:
            return key, value
        old_key, old_value = (part[:, self.kept] for part in self._chains[layer])
        return torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)


def _attend_text(query: Tensor, key: Tensor, value: Tensor, is_hidden: Tensor | None, scaling: float) -> Tensor:
    """Rows over text alone: [H / G, Q, G, D] over [H / G, P, D]."""
    groups = query.shape[2]
    heads = query.transpose(1, 2).flatten(0, 1)[None]  # [1, H, Q, D]
    key, value = (part.repeat_interleave(groups, dim=0)[None] for part in (key, value))  # [1, H, P, D]
    mask = None if is_hidden is None else ~is_hidden
    out = F.scaled_dot_product_attention(heads, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)
    return out[0].unflatten(0, (-1, groups)).transpose(1, 2)


def _attend_chains(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    chain_key: Tensor,
    chain_value: Tensor,
    is_hidden: Tensor,
    scaling: float,
) -> Tensor:
    """Rows over text and over the d slots of their own chains, in one softmax (in float32).

    Args:
        query: [H / G, Q, G, D].
        text_key, text_value: [H / G, P, D].
        chain_key, chain_value: [H / G, Q, d, D].
        is_hidden: bool [Q, P].
    """
    num_text, shape = text_key.shape[1], query.shape
    text_scores = (query.flatten(1, 2) @ text_key.mT).view(*shape[:3], num_text)  # [H / G, Q, G, P]
    text_scores = text_scores.masked_fill(is_hidden[:, None], -torch.inf)
    scores = torch.cat([text_scores, query @ chain_key.mT], dim=-1) * scaling  # [H / G, Q, G, P + d]
    weight = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    from_text = weight[..., :num_text].flatten(1, 2) @ text_value
    return from_text.view(shape) + weight[..., num_text:] @ chain_value


def replay_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    replay_memory: Memory,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with `transformers` as ATTENTION.

    Args:
        query: [1, H, R, D].
        key: [1, H / G, R, D].
        value: [1, H / G, R, D].
        replay_memory: what the rows see.

    Returns:
        Output [1, R, H, D] and None for the attention weights.
    """
    grouped = query[0].unflatten(0, (key.shape[1], -1)).transpose(1, 2)  # [H / G, R, G, D]
    out = replay_memory.attend(int(module.layer_idx), grouped, key[0], value[0], scaling)
    return out.transpose(0, 1).flatten(1, 2)[None], None


AttentionInterface.register(ATTENTION, replay_attention)


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model with another attention function for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
