"""Chunked output head: the loss of supervised slots without materializing all of their logits.

The logits of a pack are its largest tensor: 152 thousand tokens by ten thousand slots in float32 take 6 GB, and their
gradient as much. Here the head runs over one chunk of slots at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pard_train.config import ObjectiveConfig
from pard_train.core.cpu.products import add_outer, linear
from pard_train.core.terms import SlotTargets, mix_terms

# Legend: S supervised slots, C slots of a chunk, V vocabulary, D hidden size, k tokens of the target's top k.

# Each chunk reads and writes the gradient of the whole head, so a chunk has many slots, whatever the vocabulary: with
# 152 thousand tokens their bfloat16 logits are 1.2 GB, and 0.16 GB in float32 on a CPU.
CHUNK_SLOTS, CHUNK_SLOTS_CPU = 4096, 256
EAGER_DEVICES = ("cpu",)  # elsewhere `_loss_and_gradient` is compiled, to read the logits as rarely as possible
# Config keys of models that change the logits after the head, so that its logits are not the model's.
AFTER_THE_HEAD = ("logits_scaling", "logit_scale", "final_logit_softcapping")

# Factors of the weights, from the draft's log-probabilities of the labels; all [S].
Reweigh = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SlotScores:
    """Loss of S supervised slots.

    Attributes:
        loss: sum of weight * terms, a float32 scalar with a gradient.
        losses: cross entropy of each slot in nats, whatever the terms are, float32 [S].
        is_correct: whether the arg max is the label, bool [S].
    """

    loss: Tensor
    losses: Tensor
    is_correct: Tensor


def score_slots(
    hidden: Tensor, head: nn.Linear, targets: SlotTargets, objective: ObjectiveConfig, reweigh: Reweigh | None = None
) -> SlotScores:
    """Weighted loss of slots through the output head, holding the logits of one chunk at a time.

    The gradients of hidden states and head are computed together with the loss of a chunk: three matrix products, as
    many as with all logits at once. So the weights must be known before. With `reweigh` they depend on the draft: a
    pass over all chunks without gradients, a fourth product, computes the labels' probabilities first.

    Args:
        hidden: [S, D].
        head: D -> V.
        targets: of S slots.
        objective: its terms.
        reweigh: factors of the weights, constants.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        settings = (targets, objective, reweigh, torch.is_grad_enabled())
        return SlotScores(*_ChunkedLoss.apply(hidden.to(dtype), head.weight, head.bias, *settings))


def _chunks(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of slots of about equal size, each with its logits [C, V]."""
    limit = CHUNK_SLOTS_CPU if hidden.device.type == "cpu" else CHUNK_SLOTS
    num_chunks = max(1, -(-len(hidden) // limit))
    rows = max(1, -(-len(hidden) // num_chunks))
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        yield piece, linear(hidden[piece], matrix, bias)


def _score_chunk(
    logits: Tensor, targets: SlotTargets, weight: Tensor, objective: ObjectiveConfig, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of a chunk of slots, in float32 whatever the dtype of its logits.

    Args:
        logits: [C, V]; overwritten, with their own gradient if `needs_gradient`.
        targets: of C slots.
        weight: float32 [C].
        objective: its terms.
        needs_gradient: whether to compute the gradient of the logits.

    Returns:
        Cross entropy and terms, float32 [C], and whether the arg max is the label, bool [C].
    """
    known = targets.known_tokens()  # [C, 1 + k]
    inputs, function = (logits, logits.gather(1, known), known, targets.teacher_logprobs, weight), _loss_and_gradient
    if logits.device.type not in EAGER_DEVICES:
        function = _compiled_loss_and_gradient()
        for tensor in filter(torch.is_tensor, inputs):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # else a chunk of another size recompiles
    losses, terms, is_correct, known_gradient = function(*inputs, objective, needs_gradient)
    if known_gradient is not None:
        logits.scatter_(1, known, known_gradient)
    return losses, terms, is_correct


def _loss_and_gradient(
    logits: Tensor,
    known_logits: Tensor,
    known: Tensor,
    teacher_logprobs: Tensor | None,
    weight: Tensor,
    objective: ObjectiveConfig,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The part of `_score_chunk` that reads all logits, without operations that prevent fusion into one kernel.

    Args:
        logits: [C, V]; overwritten with the softmax's part of their gradient.
        known_logits: of `known`, [C, 1 + k].
        known, teacher_logprobs, weight: int64 [C, 1 + k], float [C, k] or None, and float32 [C].
        objective, needs_gradient: as in `_score_chunk`.

    Returns:
        As `_score_chunk`, and the full gradient of the known tokens' logits.
    """
    values = logits.float()
    top, choice = values.max(dim=1, keepdim=True)
    is_correct = choice[:, 0] == known[:, 0]
    exponents = values.sub_(top).exp_()
    total = exponents.sum(dim=1, keepdim=True)
    logprobs = known_logits.float() - top - total.log()
    terms, neg_grad = mix_terms(logprobs, teacher_logprobs, objective)
    if not needs_gradient:
        return -logprobs[:, 0], terms, is_correct, None
    neg_grad = neg_grad * weight[:, None]
    sum_grad = neg_grad.sum(dim=1, keepdim=True)
    logits.copy_(exponents.mul_(sum_grad / total))
    # From the exact softmax: in bfloat16 the probability of a well-learned token rounds to 1, and its gradient to 0.
    known_gradient = logprobs.exp() * sum_grad - _sum_equal(known, neg_grad)
    return -logprobs[:, 0], terms, is_correct, known_gradient.to(logits.dtype)


@functools.cache
def _compiled_loss_and_gradient() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    return torch.compile(_loss_and_gradient)


def _sum_equal(known: Tensor, neg_grad: Tensor) -> Tensor:
    """Add up the two gradients of a label that is also one of the top k, [C, 1 + k]."""
    is_label = known[:, 1:] == known[:, :1]
    of_label = neg_grad[:, :1] + (neg_grad[:, 1:] * is_label).sum(dim=1, keepdim=True)
    return torch.cat([of_label, torch.where(is_label, of_label, neg_grad[:, 1:])], dim=1)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        bias: Tensor | None,
        targets: SlotTargets,
        objective: ObjectiveConfig,
        reweigh: Reweigh | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss, cross entropies and correctness; also the gradients, kept for `backward`."""
        # One cast for all chunks: under autocast the master weights are float32.
        parts = (hidden, matrix.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        weight = targets.weight
        if reweigh is not None:
            weight = weight * reweigh(_label_logprobs(*parts, targets))
        losses, terms = (torch.empty_like(weight) for _ in range(2))
        is_correct = torch.empty_like(targets.labels, dtype=torch.bool)
        gradients = _Gradients.zeros(hidden, matrix, bias) if needs_gradient else None
        for piece, logits in _chunks(*parts):
            scores = _score_chunk(logits, targets[piece], weight[piece], objective, needs_gradient)
            losses[piece], terms[piece], is_correct[piece] = scores
            if gradients is not None:
                gradients.add(piece, logits, *parts[:2])  # `logits` now holds its gradient
        ctx.gradients = gradients
        ctx.mark_non_differentiable(losses, is_correct)
        return terms @ weight, losses, is_correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients from `forward`, scaled."""
        gradients, ctx.gradients = ctx.gradients, None  # the last reference, so they are changed in place
        hidden, matrix, bias = gradients.scaled(upstream)
        return hidden, matrix, bias, None, None, None, None


def _label_logprobs(hidden: Tensor, matrix: Tensor, bias: Tensor | None, targets: SlotTargets) -> Tensor:
    """Log-probability of every label, float32 [S]."""
    result = torch.empty_like(targets.weight)
    for piece, logits in _chunks(hidden, matrix, bias):
        labels, weight = targets.labels[piece], targets.weight[piece]
        losses, _, _ = _score_chunk(
            logits, SlotTargets(labels, weight), weight, ObjectiveConfig(), needs_gradient=False
        )
        result[piece] = -losses
    return result


@dataclass(frozen=True)
class _Gradients:
    """Gradients of hidden states [S, D] in their dtype; of matrix [V, D] and bias [V] accumulated in float32."""

    hidden: Tensor
    matrix: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of the parameters

    @classmethod
    def zeros(cls, hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> _Gradients:
        """All zero."""

        def empty(parameter: Tensor) -> Tensor:
            return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)

        return cls(torch.zeros_like(hidden), empty(matrix), None if bias is None else empty(bias), matrix.dtype)

    def add(self, piece: slice, gradient: Tensor, hidden: Tensor, matrix: Tensor) -> None:
        """Add a chunk, given the gradient [C, V] of its logits."""
        self.hidden[piece] = linear(gradient, matrix.T)
        add_outer(self.matrix, gradient, hidden[piece])
        if self.bias is not None:
            self.bias.add_(gradient.sum(dim=0, dtype=torch.float32))

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Multiply in place, and cast to the dtype of the parameters."""
        bias = None if self.bias is None else self.bias.mul_(factor).to(self.dtype)
        return self.hidden.mul_(factor), self.matrix.mul_(factor).to(self.dtype), bias


def gives_plain_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits are exactly the output of a linear head."""
    is_plain = all(getattr(model.config, name, None) in (None, 1.0) for name in AFTER_THE_HEAD)
    return is_plain and isinstance(model.get_output_embeddings(), nn.Linear)


class SlotHead:
    """A model's output head that can return the loss of slots in place of their logits.

    The model calls its head as usual, so wrappers of the model keep working (autocast, DDP, and ZeRO-3, which gathers
    the head's weight while the head runs). Outside of `scoring`, the head returns logits.
    """

    def __init__(self, head: nn.Linear):
        self._head, self._logits = head, head.forward
        self._task: tuple[SlotTargets, ObjectiveConfig, Reweigh | None] | None = None
        self.scores: SlotScores | None = None
        head.forward = self._forward  # type: ignore[method-assign]

    @contextmanager
    def scoring(
        self, targets: SlotTargets, objective: ObjectiveConfig, reweigh: Reweigh | None = None
    ) -> Iterator[None]:
        """Within the context, a forward pass over S slots returns their loss as its `logits`, and sets `scores`."""
        self._task, self.scores = (targets, objective, reweigh), None
        try:
            yield
        finally:
            self._task = None

    @torch.compiler.disable
    def _forward(self, hidden: Tensor) -> Tensor:
        if self._task is None:
            return self._logits(hidden)
        self.scores = score_slots(hidden[0], self._head, *self._task)
        return self.scores.loss
