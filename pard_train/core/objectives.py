"""The training objective: weights of slots, the loss of a pack, and statistics per depth.

loss = sum(weight * terms) / (sum of static weights over all ranks and accumulation steps). Every supervised slot
counts: depth 0 is ordinary next-token prediction, depth d predicts d + 1 tokens past the anchor (PARD, equation 6).
The terms are in `terms.py`. The weights are here, and multiply.

Depth decay and CAT are static: they depend on the data only, so the collator puts them into `weight`, whose sum is
known before the forward pass. D-PACE depends on the draft, so it is a factor of the terms and not part of the sum.
A sum that depends on the draft would take a pass over the global batch before the first gradient, and would cancel the
effect of the weights on the batch as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pard_train.architectures import windows_of
from pard_train.config import ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS, attention_inputs
from pard_train.core.head import Reweigh, SlotHead, gives_plain_logits
from pard_train.core.terms import SlotTargets, mix_terms
from pard_train.layout import IGNORE_INDEX, SlotLayout

# Legend: T slots, S supervised slots, A chains, K draft tokens, V vocabulary, k tokens of the target's top k.


def slot_weights(depth: Tensor, labels: Tensor, config: ObjectiveConfig) -> Tensor:
    """Weight of every slot: depth_decay ** depth where it is supervised, else 0.

    Args:
        depth: int [T].
        labels: int [T], IGNORE_INDEX where nothing is supervised.

    Returns:
        float32 [T].
    """
    decay = torch.tensor(config.depth_decay, dtype=torch.float32, device=depth.device) ** depth
    return torch.where(labels != IGNORE_INDEX, decay, 0.0)


def cat_weights(label_logprobs: np.ndarray, label: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """CAT: the target's probability of the chain's labels before a slot's own (PARD-2, arXiv 2605.08632).

    Slots after tokens that the target finds unlikely weigh less. Depth 0 has weight 1.

    Args:
        label_logprobs: the target's, of a document's R supervised tokens at their true contexts, in nats, [R].
        label: index of each slot's label among the R, int [S]. The labels of a chain are consecutive.
        depth: int [S].

    Returns:
        float32 [S].

    Example: labels of probability 1/2, 1/4 and 1/8, and the chain of the first one's anchor:

        >>> cat_weights(np.log([0.5, 0.25, 0.125]), np.array([0, 1, 2]), np.array([0, 1, 2])).tolist()
        [1.0, 0.5, 0.125]
    """
    sums = np.concatenate([[0.0], np.cumsum(label_logprobs, dtype=np.float64)])  # of the labels before each
    return np.exp(sums[label] - sums[label - depth]).astype(np.float32)


def dpace_weights(layout: SlotLayout, label_probs: Tensor, alpha: float) -> Tensor:
    """D-PACE: expected gain in accepted tokens from a correct draft token (arXiv 2605.18810).

    Depth j of a chain weighs sum_{m >= j} prod_{i <= m} q_i with q_i = (1 - alpha) * p_draft(label_i) + alpha: the
    expected number of accepted draft tokens from depth j on, if q_i is the probability that depth i is accepted. The
    sum ends with the chain, also where COD cut it.

    Args:
        layout: the supervised slots only, tensors [S]. With a slot, all lower depths of its chain are present.
        label_probs: the draft's, float [S]; treated as constants.
        alpha: 0 uses label_probs as they are, 1 counts the remaining slots.

    Returns:
        float32 [S].

    Example: one chain of two slots, q = (1/2, 1/2): 1/2 + 1/4, and 1/4.

        >>> layout = SlotLayout(torch.tensor([0, 0]), torch.tensor([5, 5]), torch.tensor([0, 1]))
        >>> dpace_weights(layout, torch.tensor([0.5, 0.5]), alpha=0.0).tolist()
        [0.75, 0.25]
    """
    row, num_chains = _chain_of(layout)
    table = label_probs.new_zeros(num_chains, int(layout.depth.max()) + 1 if len(layout) else 1)  # [A, K]
    table[row, layout.depth] = (1 - alpha) * label_probs.detach() + alpha
    return table.cumprod(dim=1).flip(1).cumsum(dim=1).flip(1)[row, layout.depth].float()


def _chain_of(layout: SlotLayout) -> tuple[Tensor, int]:
    """Number of each slot's chain, int64 [S], and how many chains there are."""
    chains, row = torch.unique(torch.stack([layout.document, layout.anchor], dim=1), dim=0, return_inverse=True)
    return row, len(chains)


class DepthStatistics(NamedTuple):
    """Sums per depth over supervised slots; all float64 [K], so that they add up over steps and ranks.

    Attributes:
        slots: supervised slots.
        correct: of those, whose arg max is the label.
        accepted: of those, whose whole chain up to here is correct, as greedy verification accepts them.
        loss: sum of cross entropies.
    """

    slots: Tensor
    correct: Tensor
    accepted: Tensor
    loss: Tensor

    @classmethod
    def zeros(cls, num_draft_tokens: int, device: torch.device | str = "cpu") -> DepthStatistics:
        """Empty sums for K depths."""
        return cls(*torch.zeros(len(cls._fields), num_draft_tokens, dtype=torch.float64, device=device))

    @classmethod
    def of_slots(cls, layout: SlotLayout, is_correct: Tensor, losses: Tensor, num_draft_tokens: int) -> DepthStatistics:
        """Statistics of S supervised slots.

        Args:
            layout: the supervised slots only, tensors [S]. With a slot, all lower depths of its chain are present.
            is_correct: bool [S].
            losses: float [S].
            num_draft_tokens: K.
        """
        sums = cls.zeros(num_draft_tokens, is_correct.device)
        is_accepted = _is_accepted(layout, is_correct, num_draft_tokens)
        for total, own in zip(sums, (torch.ones_like(losses), is_correct, is_accepted, losses), strict=True):
            total.index_add_(0, layout.depth, own.double())
        return sums

    def add(self, other: DepthStatistics) -> None:
        """Add another step's sums in place."""
        for mine, theirs in zip(self, other, strict=True):
            mine += theirs

    def metrics(self) -> dict[str, float]:
        """Accuracy and loss per depth, and the expected accepted length.

        `accepted_length` is 1 + sum over depths of P(all draft tokens up to there are correct): the mean number of
        tokens per target pass if the text were the target's own greedy text and every anchor equally frequent.
        """
        slots = self.slots.clamp(min=1)
        accuracy, loss = (self.correct / slots).tolist(), (self.loss / slots).tolist()
        result = {
            "accepted_length": 1 + float((self.accepted / slots).sum()),
            "supervised_slots": float(self.slots.sum()),
        }
        for depth, num_slots in enumerate(self.slots.tolist()):
            if num_slots:
                result[f"accuracy/depth_{depth}"] = accuracy[depth]
                result[f"loss/depth_{depth}"] = loss[depth]
        return result


def _is_accepted(layout: SlotLayout, is_correct: Tensor, num_draft_tokens: int) -> Tensor:
    """Whether each slot and all lower depths of its chain are correct, bool [S]."""
    row, num_chains = _chain_of(layout)
    table = torch.zeros(num_chains, num_draft_tokens, dtype=torch.int64, device=row.device)  # [A, K]
    table[row, layout.depth] = is_correct.long()
    return table.cumprod(dim=1)[row, layout.depth].bool()


class PackLoss:
    """The loss of one pack, and its statistics per depth.

    Args:
        model: before it is wrapped (DDP, DeepSpeed, torch.compile).
        attention: dense | split | flex.
        num_draft_tokens: K.
        objective: terms and weights; None is plain cross entropy.
    """

    def __init__(
        self, model: PreTrainedModel, attention: str, num_draft_tokens: int, objective: ObjectiveConfig | None = None
    ):
        self.attention, self.windows, self.num_draft_tokens = attention, windows_of(model.config), num_draft_tokens
        model.set_attn_implementation(IMPLEMENTATIONS[attention])  # others would ignore the masks
        self.objective = objective or ObjectiveConfig()
        head = model.get_output_embeddings()
        self.head = SlotHead(cast(nn.Linear, head)) if gives_plain_logits(model) else None
        self.is_checked = False

    def __call__(
        self, model: nn.Module, inputs: dict[str, Tensor], scale: Tensor | float
    ) -> tuple[Tensor, DepthStatistics]:
        """Sum of weight * terms times `scale` over supervised slots, and their statistics.

        Args:
            model: wrapped for training.
            inputs: from PardCollator, on the model's device.
            scale: factor of the loss, a constant.
        """
        layout = SlotLayout(*(inputs[name][0] for name in ("document", "anchor", "depth")))
        supervised = torch.nonzero(inputs["labels"][0] != IGNORE_INDEX).squeeze(1)  # [S]
        torch._dynamo.maybe_mark_dynamic(supervised, 0)  # else `torch.compile` specializes on the first S
        forward = partial(
            model,
            input_ids=inputs["input_ids"],
            position_ids=layout.position[None],
            logits_to_keep=supervised,
            use_cache=False,
            **attention_inputs(self.attention, layout, self.windows),
        )
        layout, labels = layout[supervised], inputs["labels"][0, supervised]
        teacher = [inputs[name][0] for name in ("teacher_ids", "teacher_logprobs") if self.objective.needs_teacher]
        targets = SlotTargets(labels, inputs["weight"][0, supervised] * scale, *teacher)
        alpha = self.objective.dpace_alpha if self.objective.dpace else None
        reweigh = None if alpha is None else lambda logprobs: dpace_weights(layout, logprobs.exp(), alpha)
        loss, losses, is_correct = self._scores(forward, targets, reweigh)
        return loss, DepthStatistics.of_slots(layout, is_correct, losses, self.num_draft_tokens)

    def _scores(
        self, forward: Callable[[], Any], targets: SlotTargets, reweigh: Reweigh | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss (differentiable); cross entropy [S] and whether the arg max is the label [S] (constants)."""
        if self.head is None:
            return _scores_of_logits(forward().logits[0].float(), targets, self.objective, reweigh)
        with self.head.scoring(targets, self.objective, reweigh):
            loss = forward().logits  # the head returned the loss
        scores = self.head.scores
        assert scores is not None
        if not self.is_checked:  # once, because it synchronizes with the device
            both = (value.detach().nan_to_num() for value in (loss, scores.loss))
            assert torch.equal(*both), "the model changes what its head returns"
            self.is_checked = True
        return loss, scores.losses, scores.is_correct


def _scores_of_logits(
    logits: Tensor, targets: SlotTargets, objective: ObjectiveConfig, reweigh: Reweigh | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from all logits, float32 [S, V], for models that change them after the head."""
    logprobs = logits.gather(1, targets.known_tokens()) - logits.logsumexp(dim=1, keepdim=True)  # [S, 1 + k]
    losses = -logprobs[:, 0].detach()
    weight = targets.weight if reweigh is None else targets.weight * reweigh(-losses)
    loss = (mix_terms(logprobs, targets.teacher_logprobs, objective).loss * weight).sum()
    return loss, losses, logits.detach().argmax(dim=-1) == targets.labels
