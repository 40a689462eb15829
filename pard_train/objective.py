"""The training objective, and what a step tells about the draft model.

loss = sum(weight * cross entropy) / (sum of weights over all ranks and accumulation steps). Every supervised slot is a
term: depth 0 is ordinary next-token prediction, depth d predicts d + 1 tokens past the anchor (PARD, equation 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from pard_train.attention import attention_inputs
from pard_train.config import ObjectiveConfig
from pard_train.layout import IGNORE_INDEX, SlotLayout
from pard_train.slot_head import SlotHead, gives_plain_logits

# Legend: T slots, S supervised slots, A chains, K draft tokens, V vocabulary.


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


def slot_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy in nats of each supervised slot, in float32.

    Args:
        logits: [S, V].
        labels: int [S].

    Returns:
        float32 [S].
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass
class DepthStatistics:
    """Sums per depth over supervised slots; all float64 [K], so that they add up over steps and ranks.

    Attributes:
        slots: supervised slots.
        correct: of those, whose arg max is the label.
        accepted: of those, whose whole chain up to here is correct: what greedy verification would accept.
        loss: sum of cross entropies.
    """

    slots: Tensor
    correct: Tensor
    accepted: Tensor
    loss: Tensor

    @classmethod
    def zeros(cls, num_draft_tokens: int, device: torch.device | str = "cpu") -> DepthStatistics:
        """Empty sums for K depths."""
        return cls(*(torch.zeros(num_draft_tokens, dtype=torch.float64, device=device) for _ in range(4)))

    @classmethod
    def of_slots(cls, layout: SlotLayout, is_correct: Tensor, losses: Tensor, num_draft_tokens: int) -> DepthStatistics:
        """Statistics of S supervised slots.

        Args:
            layout: the supervised slots only, tensors [S]. With a slot, all lower depths of its chain are present.
            is_correct: bool [S].
            losses: float [S].
            num_draft_tokens: K.
        """
        stats = cls.zeros(num_draft_tokens, is_correct.device)
        stats.slots.index_add_(0, layout.depth, torch.ones_like(losses, dtype=torch.float64))
        stats.correct.index_add_(0, layout.depth, is_correct.double())
        stats.accepted.index_add_(0, layout.depth, _is_accepted(layout, is_correct, num_draft_tokens).double())
        stats.loss.index_add_(0, layout.depth, losses.double())
        return stats

    def add(self, other: DepthStatistics) -> None:
        """Add another step's sums in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine += theirs

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four sums."""
        return self.slots, self.correct, self.accepted, self.loss

    def metrics(self) -> dict[str, float]:
        """Accuracy and loss per depth, and the expected accepted length.

        `accepted_length` is 1 + sum over depths of P(all drafts up to there are right): the mean number of tokens per
        target pass if the text were the target's own greedy text and every anchor were visited alike.
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
    chain_name = torch.stack([layout.document, layout.anchor], dim=1)
    chains, row = torch.unique(chain_name, dim=0, return_inverse=True)
    table = torch.zeros(len(chains), num_draft_tokens, dtype=torch.int64, device=row.device)  # [A, K]
    table[row, layout.depth] = is_correct.long()
    return table.cumprod(dim=1)[row, layout.depth].bool()


class PackLoss:
    """The loss of one pack, and what it tells about the draft model.

    Args:
        model: before anything wraps it.
        attention: dense | split | flex.
        num_draft_tokens: K.
    """

    def __init__(self, model: PreTrainedModel, attention: str, num_draft_tokens: int):
        self.attention, self.num_draft_tokens = attention, num_draft_tokens
        head = model.get_output_embeddings()
        self.head = SlotHead(cast(nn.Linear, head)) if gives_plain_logits(model) else None
        self.is_checked = False

    def __call__(
        self, model: nn.Module, inputs: dict[str, Tensor], scale: Tensor | float
    ) -> tuple[Tensor, DepthStatistics]:
        """Sum of weight * cross entropy times `scale`, over supervised slots only, and their statistics.

        Args:
            model: the model as it is wrapped for training.
            inputs: of PardCollator, on the model's device.
            scale: factor of the loss, a constant.
        """
        layout = SlotLayout(*(inputs[name][0] for name in ("document", "anchor", "depth")))
        labels = inputs["labels"][0]
        supervised = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)  # [S]
        labels, weight = labels[supervised], inputs["weight"][0, supervised] * scale
        forward = partial(
            model,
            input_ids=inputs["input_ids"],
            position_ids=layout.position[None],
            logits_to_keep=supervised,
            use_cache=False,
            **attention_inputs(self.attention, layout),
        )
        loss, losses, is_correct = self._scores(forward, labels, weight)
        return loss, DepthStatistics.of_slots(layout[supervised], is_correct, losses, self.num_draft_tokens)

    def _scores(self, forward: Callable[[], Any], labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss with its gradient; loss [S] and whether the arg max is the label [S], without."""
        if self.head is None:
            logits = forward().logits[0]  # [S, V]
            losses = slot_losses(logits, labels)
            return (losses * weight).sum(), losses.detach(), logits.detach().argmax(dim=-1) == labels
        with self.head.scoring(labels, weight):
            loss = forward().logits  # the head's answer
        scores = self.head.scores
        assert scores is not None
        if not self.is_checked:  # once: it waits for the device
            assert torch.equal(loss.detach(), scores.loss.detach()), "the model changes what its head returns"
            self.is_checked = True
        return loss, scores.losses, scores.is_correct
