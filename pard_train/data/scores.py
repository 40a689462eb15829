"""A target's log-probabilities of supervised tokens and their most likely alternatives, cached on disk.

They are the teacher of CAT (arXiv 2605.08632), KD and LK (arXiv 2602.23881): training needs no target in memory. For S
supervised tokens, in the order of the store's documents, a folder of scores holds

    label_logprobs.npy  float16 [S]      log p(token | the true text before it), in nats
    top_ids.npy         int32   [S, k]   the k most likely tokens, most likely first
    top_logprobs.npy    float16 [S, k]   and their log-probabilities

which is 2 + 6 k bytes per token, and `done.npy` (bool [D]), from which an interrupted run resumes. Probabilities are
normalised over all rows of the target; the k tokens are chosen among the tokenizer's, which every draft has rows for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from pard_train.core.head import gives_plain_logits
from pard_train.data.chat import Document
from pard_train.data.store import TokenStore, new_array
from pard_train.errors import UserError
from pard_train.runs import MANIFEST_FILE, check_sealed, new_file, read_json, require_same

# Legend: D documents, B of a batch, L tokens of the longest, S supervised tokens, C of a chunk, H hidden size,
# V vocabulary, k top_k.

ROWS_PER_CHUNK = 1024  # positions per chunk of logits: 0.6 GB in float32 for 152k tokens
TOKENS_PER_READ = 2**16  # when all scores are summed
_FILES = {"label_logprobs": np.float16, "top_ids": np.int32, "top_logprobs": np.float16, "done": np.bool_}


class TokenScores(NamedTuple):
    """Scores of R supervised tokens in the order of the text."""

    label_logprobs: np.ndarray  # float16 [R]
    top_ids: np.ndarray  # int32 [R, k]
    top_logprobs: np.ndarray  # float16 [R, k]


@dataclass(frozen=True)
class Scores:
    """Memory-mapped scores of a store, with the shapes above; `first[i]` is the index of document i's first token.

    Pickling stores the folder only: another process maps the same files.
    """

    folder: Path
    label_logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    done: np.ndarray
    first: np.ndarray

    @classmethod
    def open(cls, folder: Path, store: TokenStore, *, top_k: int, create: bool = False) -> Scores:
        """Open, or create, the scores of a store. Raises UserError if they are missing or belong to another store."""
        first = np.concatenate([[0], np.cumsum(store.num_supervised())])
        num_tokens = int(first[-1])
        shapes: list[tuple[int, ...]] = [(num_tokens,), (num_tokens, top_k), (num_tokens, top_k), (len(store),)]
        for name, shape in zip(_FILES, shapes, strict=True):
            path = folder / f"{name}.npy"
            if create and not path.exists():
                with new_file(path) as partial:
                    new_array(partial, _FILES[name], shape)
            if not path.exists():
                raise UserError(f"{path} is missing: make it with data_scripts/score.py")
            found = np.load(path, mmap_mode="r").shape
            if found != shape:
                fix = "it belongs to other tokens or another top_k: delete the folder, or choose another"
                raise UserError(f"{path} has shape {found}, but the tokens need {shape}: {fix}")
        return cls.load(folder, first, mode="r+" if create else "r")

    @classmethod
    def load(cls, folder: Path, first: np.ndarray, mode: Literal["r", "r+"] = "r") -> Scores:
        """Map the files without checks."""
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in _FILES}
        return cls(folder=folder, first=first, **arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scores.load, (self.folder, self.first)

    @property
    def manifest(self) -> dict[str, Any]:
        """Target, identity and counts, written once all documents are scored."""
        return read_json(self.folder / MANIFEST_FILE)

    def summary(self) -> str:
        """One line: target, dtype, k and counts."""
        manifest = self.manifest
        target = f"{manifest['target']} in {manifest['identity']['dtype']}, top {manifest['identity']['top_k']}"
        outside = f"{manifest['mass_outside_top_k']:.2%} of the probability outside"
        return f"teacher {target}: {len(self.label_logprobs):,} supervised tokens, {outside}"

    def of_document(self, index: int) -> TokenScores:
        """Scores of one document."""
        where = slice(int(self.first[index]), int(self.first[index + 1]))
        return TokenScores(self.label_logprobs[where], self.top_ids[where], self.top_logprobs[where])

    def mass_outside(self) -> float:
        """Mean probability outside of the k tokens, which kd and lk ignore."""
        starts = range(0, len(self.top_logprobs), TOKENS_PER_READ)
        sums = [np.exp(self.top_logprobs[i : i + TOKENS_PER_READ].astype(np.float64)).sum() for i in starts]
        return max(0.0, 1 - sum(sums) / max(len(self.top_logprobs), 1))


def open_teacher(folder: Path, store: TokenStore) -> Scores:
    """Open the scores of the training data, from data_scripts/score.py.

    Raises UserError if the folder holds no scores, unfinished or damaged ones, or those of other tokens.
    """
    if not (folder / MANIFEST_FILE).is_file():
        choices = ", ".join(sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST_FILE}")))
        fix = f"choose one of {choices}" if choices else "write it, or finish it, with data_scripts/score.py"
        raise UserError(f"data.scores={folder} has no {MANIFEST_FILE}, so no finished scores: {fix}")
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    if "mass_outside_top_k" not in manifest:
        raise UserError(f"data.scores={folder} has no scores of this version: give a folder from data_scripts/score.py")
    require_same(
        _content(manifest["tokens"]),
        _content(store.manifest["identity"]),
        what=f"data.scores={folder} belongs to other tokens than those of this training",
        fix=f"score these with data_scripts/score.py score.tokens={store.folder}",
    )
    check_sealed(folder)
    scores = Scores.open(folder, store, top_k=manifest["identity"]["top_k"])
    if not scores.done.all():
        missing = f"{int((~scores.done).sum()):,} of {len(scores.done):,} documents are not scored"
        raise UserError(f"data.scores={folder}: {missing}: run data_scripts/score.py again, which resumes")
    return scores


def _content(identity: dict[str, Any]) -> dict[str, Any]:
    """The entries of an identity that decide the tokens: all but the path of their source."""
    return {name: value for name, value in identity.items() if name != "source"}


def write_scores(
    load_target: Callable[[], PreTrainedModel],
    store: TokenStore,
    scores: Scores,
    *,
    batch_tokens: int,
    process: PartialState,
    num_tokens: int | None = None,
) -> None:
    """Compute missing scores, shared by the processes of one machine.

    `load_target` is called at most once, if scores are missing. `batch_tokens` per forward pass include padding; a
    longer document is a batch of its own. `num_tokens` as for `score_documents`.
    """
    batches = list(_batches(store.lengths(), np.flatnonzero(~scores.done), batch_tokens))
    process.wait_for_everyone()  # all ranks must list the same batches, so none may mark a document before
    mine = batches[process.process_index :: process.num_processes]
    if mine:
        target = load_target()
        for batch in tqdm(mine, desc="score", unit=" batches", disable=not process.is_main_process):
            documents = [store[i] for i in batch]
            results = score_documents(target, documents, scores.top_ids.shape[1], num_tokens)
            start = 0
            for index, document in zip(batch, documents, strict=True):
                stop = start + int(document.loss_mask.sum())
                for array, values in zip(scores.of_document(index), results, strict=True):
                    array[:] = values[start:stop].numpy()
                scores.done[index] = True  # after its values
                start = stop
    process.wait_for_everyone()


def _batches(lengths: np.ndarray, documents: np.ndarray, batch_tokens: int) -> Iterator[list[int]]:
    """Batches of documents of similar length, longest first, so that running out of memory happens at once."""
    batch: list[int] = []
    for index in documents[np.argsort(-lengths[documents], kind="stable")].tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score_documents(
    target: PreTrainedModel, documents: list[Document], top_k: int, num_tokens: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the supervised tokens of B documents, concatenated: float16 [S], int32 [S, k], float16 [S, k], on CPU.

    The k tokens have ids below `num_tokens`, if given. First tokens of documents must not be supervised.
    """
    # Padding is on the right: causal attention never reads it.
    ids = pad_sequence([torch.from_numpy(d.input_ids) for d in documents], batch_first=True).long()
    label = pad_sequence([torch.from_numpy(d.loss_mask) for d in documents], batch_first=True)
    row, column = torch.nonzero(label, as_tuple=True)
    labels, parts, start = ids[row, column], [], 0
    for logits in _logits(target, ids.to(target.device), row, column - 1):  # of the last device, if there are several
        parts.append(_score_rows(logits, labels[start : start + len(logits)].to(logits.device), top_k, num_tokens))
        start += len(logits)
    label_logprobs, top_ids, top_logprobs = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return label_logprobs, top_ids, top_logprobs


def _logits(target: PreTrainedModel, ids: Tensor, row: Tensor, column: Tensor) -> Iterator[Tensor]:
    """Logits [C, V] at S places (row, column) of `ids`, in order, chunk by chunk."""
    if gives_plain_logits(target):
        hidden = target.base_model(ids, use_cache=False).last_hidden_state[row, column]  # [S, H]
        for start in range(0, len(row), ROWS_PER_CHUNK):
            yield target.get_output_embeddings()(hidden[start : start + ROWS_PER_CHUNK])
        return
    for number in range(len(ids)):  # the model changes its logits after the head (scaling, soft-capping)
        places = column[row == number].to(ids.device)
        yield target(ids[number : number + 1], use_cache=False, logits_to_keep=places).logits[0]


def _score_rows(logits: Tensor, labels: Tensor, top_k: int, num_tokens: int | None) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.float().log_softmax(dim=-1)  # [C, V]
    top = logprobs[:, :num_tokens].topk(top_k, dim=-1)
    return logprobs.gather(1, labels[:, None])[:, 0].half(), top.indices.int(), top.values.half()
