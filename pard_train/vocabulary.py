"""The rows of a vocabulary, in the embedding and the output head: appended, replaced, and that of the mask token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def vocabulary_tensors(model: PreTrainedModel) -> list[Tensor]:
    """The embedding, the output head unless tied, and the head's bias if it has one; each [V, ...]."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    tensors = [embedding] if head.weight is embedding else [embedding, head.weight]
    bias = getattr(head, "bias", None)
    return tensors if bias is None else [*tensors, bias]


@torch.no_grad()
def resize_vocabulary(model: PreTrainedModel, num_rows: int) -> None:
    """Append rows, each the mean of the existing rows, so that none can win an arg max.

    The logit of a mean row is the mean of all logits, which is below the largest. (A zero row would have logit 0, above
    a vocabulary whose logits are all negative.) Tied embeddings stay tied.

    Raises:
        ValueError: if `num_rows` is below the present number.
    """
    old = model.config.vocab_size
    if num_rows < old:
        raise ValueError(f"cannot shrink a vocabulary of {old} rows to {num_rows}")
    if num_rows == old:
        return
    means = [tensor.float().mean(dim=0) for tensor in vocabulary_tensors(model)]
    _set_num_rows(model, num_rows)
    for tensor, mean in zip(vocabulary_tensors(model), means, strict=True):
        tensor[old:] = mean.to(tensor.dtype)


def _set_num_rows(model: PreTrainedModel, num_rows: int) -> None:
    kind = type(model.get_output_embeddings())
    model.resize_token_embeddings(num_rows, mean_resizing=False)
    model.get_output_embeddings().__class__ = kind  # transformers replaces a head that is not tied by a plain one


@torch.no_grad()
def replace_vocabulary(model: PreTrainedModel, rows: list[list[int]]) -> None:
    """Replace embedding and head: each new row is the mean of some old rows. Tied embeddings stay tied.

    Args:
        model: of any number of rows.
        rows: old rows of every new one; one without any becomes the mean of the others.
    """
    num = model.get_input_embeddings().weight.shape[0]  # a base may lack rows for its tokenizer's last entries
    rows = [[i for i in some if i < num] for some in rows]
    ids = torch.tensor([i for some in rows for i in some])
    lengths = torch.tensor([len(some) for some in rows])
    new = []
    for tensor in vocabulary_tensors(model):
        means = F.embedding_bag(ids, tensor.float().reshape(len(tensor), -1), lengths.cumsum(0) - lengths, mode="mean")
        means[lengths == 0] = means[lengths > 0].mean(dim=0)
        new.append(means.reshape(len(rows), *tensor.shape[1:]).to(tensor.dtype))
    _set_num_rows(model, len(rows))
    for tensor, means in zip(vocabulary_tensors(model), new, strict=True):
        tensor.copy_(means)


@torch.no_grad()
def add_mask_token(model: PreTrainedModel, mask_token_id: int) -> None:
    """Set the row of the mask token to the mean of the others. Appends the row if the id is one past the end."""
    if mask_token_id == model.config.vocab_size:
        resize_vocabulary(model, mask_token_id + 1)
        return
    for tensor in vocabulary_tensors(model):
        is_other = torch.arange(len(tensor), device=tensor.device) != mask_token_id
        tensor[mask_token_id] = tensor[is_other].float().mean(dim=0).to(tensor.dtype)
