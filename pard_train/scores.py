"""What a target thinks of every supervised token: its log-probability and the most likely alternatives, cached on disk.

Training then has a teacher (CAT, arXiv 2605.08632; KD; LK, arXiv 2602.23881) without a target in memory, however large
the target is. Of S supervised tokens, in the order of the store's documents, a folder of scores holds

    label_logprobs.npy  float16 [S]      log p(token | the true text before it), in nats
    top_ids.npy         int32   [S, k]   the k most likely tokens, most likely first
    top_logprobs.npy    float16 [S, k]   and their log-probabilities

which is 2 + 6 k bytes per token, and `done.npy` (bool [D]), so that a run that was killed goes on with what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pard_train.chat import Document
from pard_train.errors import UserError
from pard_train.store import TokenStore, new_array

# Legend: B documents of a batch, L tokens of the longest, S supervised tokens, H hidden size, V vocabulary, k top_k.

ROWS_PER_CHUNK = 1024  # positions whose logits are in memory at once: 0.6 GB in float32 for 152k tokens
_FILES = {"label_logprobs": np.float16, "top_ids": np.int32, "top_logprobs": np.float16, "done": np.bool_}


@dataclass(frozen=True)
class Scores:
    """Memory-mapped scores of a store. Shapes as in the module's text; `first[i]` is document i's first token."""

    label_logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    done: np.ndarray
    first: np.ndarray

    @classmethod
    def open(cls, folder: Path, store: TokenStore, *, top_k: int, create: bool = False) -> Scores:
        """The scores of a store. Raises UserError if they belong to another one or are missing."""
        first = np.concatenate([[0], np.cumsum(store.num_supervised())])
        shapes = {
            "label_logprobs": (int(first[-1]),),
            "top_ids": (int(first[-1]), top_k),
            "top_logprobs": (int(first[-1]), top_k),
            "done": (len(store),),
        }
        arrays = {}
        for name, shape in shapes.items():
            path = folder / f"{name}.npy"
            if create and not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
                new_array(partial, _FILES[name], shape)
                partial.rename(path)
            if not path.exists():
                raise UserError(f"{path} is missing: make it with data_scripts/score.py")
            arrays[name] = np.load(path, mmap_mode="r+" if create else "r")
            if arrays[name].shape != shape:
                raise UserError(
                    f"{path} has shape {arrays[name].shape}, but the tokens need {shape}: it belongs to other tokens "
                    "or another top_k; delete the folder, or choose another"
                )
        return cls(**arrays, first=first)

    def of_document(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(label_logprobs, top_ids, top_logprobs) of one document's supervised tokens."""
        where = slice(int(self.first[index]), int(self.first[index + 1]))
        return self.label_logprobs[where], self.top_ids[where], self.top_logprobs[where]


def write_scores(
    load_target: Callable[[], PreTrainedModel], store: TokenStore, scores: Scores, batch_tokens: int
) -> None:
    """Fill in what is missing, every rank its share.

    Args:
        load_target: called once, and only if something is missing.
        store: the tokens.
        scores: opened for writing.
        batch_tokens: tokens of a forward pass, padding included; a longer document goes alone.
    """
    state = PartialState()
    batches = list(_batches(store.lengths(), np.flatnonzero(~scores.done), batch_tokens))
    state.wait_for_everyone()  # or a rank would leave out what another has already marked, and take other shares
    mine = batches[state.process_index :: state.num_processes]
    if mine:
        target = load_target()
        for batch in tqdm(mine, desc="score", unit=" batches", disable=not state.is_main_process):
            documents = [store[i] for i in batch]
            results = score_documents(target, documents, scores.top_ids.shape[1])
            start = 0
            for index, document in zip(batch, documents, strict=True):
                stop = start + int(document.loss_mask.sum())
                for array, values in zip(scores.of_document(index), results, strict=True):
                    array[:] = values[start:stop].numpy()
                scores.done[index] = True  # after its values: what is marked is whole
                start = stop
    state.wait_for_everyone()


def _batches(lengths: np.ndarray, documents: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Documents of similar length, longest first, so that too large a batch fails at once."""
    batch: list[int] = []
    for index in documents[np.argsort(-lengths[documents], kind="stable")].tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score_documents(target: PreTrainedModel, documents: list[Document], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the supervised tokens of B documents, one after the other.

    Documents are padded on the right, where causal attention cannot see.

    Args:
        target: a causal LM.
        documents: of which no token is supervised that has no token before it.
        top_k: k.

    Returns:
        float16 [S], int32 [S, k], float16 [S, k] on the CPU.
    """
    length = max(len(d.input_ids) for d in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.int64)
    label = torch.zeros(len(documents), length, dtype=torch.bool)
    for number, document in enumerate(documents):
        ids[number, : len(document.input_ids)] = torch.from_numpy(document.input_ids)
        label[number, : len(document.input_ids)] = torch.from_numpy(document.loss_mask)
    row, column = torch.nonzero(label, as_tuple=True)
    hidden = target.base_model(ids.to(target.device), use_cache=False).last_hidden_state[row, column - 1]  # [S, H]
    head, labels = target.get_output_embeddings(), ids[row, column].to(target.device)
    parts = [
        _score_rows(head(hidden[start : start + ROWS_PER_CHUNK]), labels[start : start + ROWS_PER_CHUNK], top_k)
        for start in range(0, len(labels), ROWS_PER_CHUNK)
    ]
    label_logprobs, top_ids, top_logprobs = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return label_logprobs, top_ids, top_logprobs


def _score_rows(logits: Tensor, labels: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.float().log_softmax(dim=-1)  # [S, V]
    top = logprobs.topk(top_k, dim=-1)
    return logprobs.gather(1, labels[:, None])[:, 0].half(), top.indices.int(), top.values.half()
