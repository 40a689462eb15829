"""The output head over supervised slots: their loss without ever holding all of their logits.

The logits of a pack are its largest tensor by far: 4 bytes for each of 152 thousand tokens of the vocabulary and each
of ten thousand slots are 6 GB, and their gradient is as large. Here a chunk of slots at a time goes through the head.
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
EAGER_DEVICES = ("cpu",)  # elsewhere `_sweep` is compiled, to go over the logits as often as it must and no more
# What some models do to the logits after the head; the loss of the head alone would not be theirs.
AFTER_THE_HEAD = ("logits_scaling", "logit_scale", "final_logit_softcapping")

# Factors of the weights, from the draft's log-probabilities of the labels; all [S].
Reweigh = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SlotScores:
    """What the head says about S supervised slots.

    Attributes:
        loss: sum of weight * terms, a float32 scalar with a gradient.
        losses: cross entropy of each slot in nats, whatever the terms are, float32 [S].
        is_correct: whether the arg max is the label, bool [S].
    """

    loss: Tensor
    losses: Tensor
    is_correct: Tensor


def score_slots(
    hidden: Tensor,
    head: nn.Linear,
    targets: SlotTargets,
    objective: ObjectiveConfig,
    reweigh: Reweigh | None = None,
) -> SlotScores:
    """Weighted loss of slots through the output head, never holding the logits of more than a chunk of them.

    The gradients of hidden states and head are computed with the loss, while a chunk's logits are at hand: three matrix
    products, as many as with all logits at once. So the weights must be known before. `reweigh` has them depend on the
    draft: a pass over all chunks without gradients, a fourth product, finds the labels' probabilities first.

    Args:
        hidden: [S, D].
        head: D -> V.
        targets: of S slots.
        objective: its terms.
        reweigh: gives factors of the weights, float32 [S], constants.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        settings = (targets, objective, reweigh, torch.is_grad_enabled())
        return SlotScores(*_ChunkedLoss.apply(hidden.to(dtype), head.weight, head.bias, *settings))


def _chunks(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """One chunk of slots after the other, all of about one size, with its logits [C, V]."""
    limit = CHUNK_SLOTS_CPU if hidden.device.type == "cpu" else CHUNK_SLOTS
    num_chunks = max(1, -(-len(hidden) // limit))
    rows = max(1, -(-len(hidden) // num_chunks))
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        yield piece, linear(hidden[piece], matrix, bias)


def _score_chunk(
    logits: Tensor, targets: SlotTargets, weight: Tensor, objective: ObjectiveConfig, has_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What a chunk of slots says, in float32 whatever the dtype of its logits.

    Args:
        logits: [C, V]; overwritten, with their own gradient where that is asked for.
        targets: of C slots.
        weight: float32 [C].
        objective: its terms.
        has_slope: whether the gradient is asked for.

    Returns:
        Cross entropy and terms, float32 [C], and whether the arg max is the label, bool [C].
    """
    known = targets.known_tokens()  # [C, 1 + k]
    inputs, sweep = (logits, logits.gather(1, known), known, targets.teacher_logprobs, weight), _sweep
    if logits.device.type not in EAGER_DEVICES:
        sweep = _compiled_sweep()
        for tensor in filter(torch.is_tensor, inputs):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # else a chunk of another size would be compiled for again
    losses, terms, is_correct, slope_of_known = sweep(*inputs, objective, has_slope)
    if slope_of_known is not None:
        logits.scatter_(1, known, slope_of_known)
    return losses, terms, is_correct


def _sweep(
    logits: Tensor,
    of_known: Tensor,
    known: Tensor,
    teacher_logprobs: Tensor | None,
    weight: Tensor,
    objective: ObjectiveConfig,
    has_slope: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The part of `_score_chunk` that goes over all logits, and nothing that would keep a compiler from one kernel.

    Args:
        logits: [C, V]; become the softmax's part of their gradient.
        of_known: those of the known tokens, [C, 1 + k].
        known: int64 [C, 1 + k].
        teacher_logprobs: float [C, k] or None.
        weight: float32 [C].
        objective: its terms.
        has_slope: whether the gradient is asked for.

    Returns:
        As `_score_chunk`, and the gradients of the known tokens' logits, which are not those in `logits`.
    """
    values = logits.float()
    top, choice = values.max(dim=1, keepdim=True)
    is_correct = choice[:, 0] == known[:, 0]
    exponents = values.sub_(top).exp_()
    total = exponents.sum(dim=1, keepdim=True)
    logprobs = of_known.float() - top - total.log()
    terms, pull = mix_terms(logprobs, teacher_logprobs, objective)
    if not has_slope:
        return -logprobs[:, 0], terms, is_correct, None
    pull = pull * weight[:, None]
    all_pull = pull.sum(dim=1, keepdim=True)
    logits.copy_(exponents.mul_(all_pull / total))
    # From the exact softmax: rounded to bfloat16 first, that of a token learnt well would be 1, and its gradient 0.
    slope_of_known = logprobs.exp() * all_pull - _sum_equal(known, pull)
    return -logprobs[:, 0], terms, is_correct, slope_of_known.to(logits.dtype)


@functools.cache
def _compiled_sweep() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    return torch.compile(_sweep)


def _sum_equal(known: Tensor, pull: Tensor) -> Tensor:
    """Pull of each known token from all places it is known from, [C, 1 + k]: the label may be one of the top k."""
    is_label = known[:, 1:] == known[:, :1]
    of_label = pull[:, :1] + (pull[:, 1:] * is_label).sum(dim=1, keepdim=True)
    return torch.cat([of_label, torch.where(is_label, of_label, pull[:, 1:])], dim=1)


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
        has_backward: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # One cast for all chunks: under autocast the master weights are float32.
        parts = (hidden, matrix.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
        weight = targets.weight
        if reweigh is not None:
            weight = weight * reweigh(_label_logprobs(*parts, targets))
        losses, terms = (torch.empty_like(weight) for _ in range(2))
        is_correct = torch.empty_like(targets.labels, dtype=torch.bool)
        gradients = _Gradients.zeros(hidden, matrix, bias) if has_backward else None
        for piece, logits in _chunks(*parts):
            scores = _score_chunk(logits, targets[piece], weight[piece], objective, has_backward)
            losses[piece], terms[piece], is_correct[piece] = scores
            if gradients is not None:
                gradients.add(piece, logits, *parts[:2])  # by now their gradient
        ctx.gradients = gradients
        ctx.mark_non_differentiable(losses, is_correct)
        return terms @ weight, losses, is_correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # held by nobody else: the optimizer's own from here on
        hidden, matrix, bias = gradients.scaled(upstream)
        return hidden, matrix, bias, None, None, None, None


def _label_logprobs(hidden: Tensor, matrix: Tensor, bias: Tensor | None, targets: SlotTargets) -> Tensor:
    """Log-probability of every label, float32 [S]."""
    result = torch.empty_like(targets.weight)
    for piece, logits in _chunks(hidden, matrix, bias):
        labels, weight = targets.labels[piece], targets.weight[piece]
        losses, _, _ = _score_chunk(logits, SlotTargets(labels, weight), weight, ObjectiveConfig(), has_slope=False)
        result[piece] = -losses
    return result


@dataclass(frozen=True)
class _Gradients:
    """Of hidden states [S, D] in their dtype; of matrix [V, D] and bias [V] in float32 until they are complete."""

    hidden: Tensor
    matrix: Tensor
    bias: Tensor | None
    dtype: torch.dtype  # of the parameters

    @classmethod
    def zeros(cls, hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> _Gradients:
        def empty(parameter: Tensor) -> Tensor:
            return torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format)

        return cls(torch.zeros_like(hidden), empty(matrix), None if bias is None else empty(bias), matrix.dtype)

    def add(self, piece: slice, slope: Tensor, hidden: Tensor, matrix: Tensor) -> None:
        """Add a chunk: `slope` [C, V] is the gradient of its logits."""
        self.hidden[piece] = linear(slope, matrix.T)
        add_outer(self.matrix, slope, hidden[piece])
        if self.bias is not None:
            self.bias.add_(slope.sum(dim=0, dtype=torch.float32))

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """In place, and in the dtype of what they are gradients of."""
        bias = None if self.bias is None else self.bias.mul_(factor).to(self.dtype)
        return self.hidden.mul_(factor), self.matrix.mul_(factor).to(self.dtype), bias


def gives_plain_logits(model: PreTrainedModel) -> bool:
    """Whether the model's logits are what its linear head returns, nothing done to them after."""
    is_plain = all(getattr(model.config, name, None) in (None, 1.0) for name in AFTER_THE_HEAD)
    return is_plain and isinstance(model.get_output_embeddings(), nn.Linear)


class SlotHead:
    """A model's output head that can give the loss of slots in place of their logits.

    The model calls its head as ever, so that what wraps the model (autocast, DDP, ZeRO-3, which gathers the head's
    weight while the head runs) works as ever. Outside of `scoring`, the head gives logits.
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
        """While it lasts, one forward of the model over S slots returns their loss as its `logits`, and fills `scores`.

        Args:
            targets: of S slots.
            objective: its terms.
            reweigh: as in `score_slots`.
        """
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
