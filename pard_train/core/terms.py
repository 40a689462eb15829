"""The terms of the loss at one slot, and the targets they compare the draft with.

A term reads the draft's log-probabilities of a few tokens only: the label, and the k tokens of the target's cached
scores. With q = softmax(z) and g_v = -d loss / d log q_v, its gradient by the logits z is

    d loss / d z = sum(g) * q - g

for every term, so a head that works on a chunk of slots at a time needs no second tensor of the size of the logits.

The target's distribution p is unknown outside of its top k. `kl_term` normalizes p over the k tokens;
`acceptance_term` counts nothing outside. Each docstring states the consequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pard_train.config import ObjectiveConfig

# Legend: S supervised slots (or those of a chunk), k tokens of the target's top k.


@dataclass(frozen=True)
class SlotTargets:
    """Training targets of S supervised slots.

    Attributes:
        labels: int64 [S].
        weight: float32 [S], a constant.
        teacher_ids: the target's top k tokens at the label's position, int [S, k]; None if no term needs them.
        teacher_logprobs: their log-probabilities in nats at the true context, float [S, k].
    """

    labels: Tensor
    weight: Tensor
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, where: slice) -> SlotTargets:
        teacher = (None if part is None else part[where] for part in (self.teacher_ids, self.teacher_logprobs))
        return SlotTargets(self.labels[where], self.weight[where], *teacher)

    def known_tokens(self) -> Tensor:
        """Tokens whose log-probabilities the terms read, int64 [S, 1 + k]: the label, then the target's top k."""
        labels = self.labels[:, None]
        return labels if self.teacher_ids is None else torch.cat([labels, self.teacher_ids.long()], dim=1)


class Term(NamedTuple):
    """A term of S slots.

    Attributes:
        loss: in nats, float32 [S].
        neg_grad: minus its derivative by each log-probability that it reads, float32 [S, n]; a constant.
    """

    loss: Tensor
    neg_grad: Tensor


def ce_term(logprobs: Tensor) -> Term:
    """Cross entropy of the label, -log q(label) (PARD, arXiv 2504.18583, equation 6).

    Args:
        logprobs: the draft's of the label, float32 [S, 1].
    """
    return Term(-logprobs[:, 0], torch.ones_like(logprobs))


def kl_term(logprobs: Tensor, teacher_logprobs: Tensor) -> Term:
    """Forward KL divergence sum_v p log(p / q) from the target to the draft (PARD-2, arXiv 2605.08632).

    p is normalized over the k known tokens. So it is a distribution, the minimum is 0, and the gradient is q - p as for
    a label. The cost: the draft learns that nothing lies outside of the top k. A bucket for the rest would need q
    outside as a difference of close numbers.

    Args:
        logprobs: the draft's of the k tokens, float32 [S, k].
        teacher_logprobs: the target's of the same, float [S, k].

    Example: p = (0.6, 0.2) becomes (3/4, 1/4); against q = (1/2, 1/2) the loss is 3/4 log 3/2 + 1/4 log 1/2.

        >>> kl_term(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.6, 0.2]]).log()).loss
        tensor([0.1308])
    """
    teacher = teacher_logprobs.float().softmax(dim=1)
    return Term(-(torch.special.entr(teacher) + teacher * logprobs).sum(dim=1), teacher)


def acceptance_term(logprobs: Tensor, teacher_logprobs: Tensor) -> Term:
    """-log of the probability that speculative sampling accepts a draft token, -log sum_v min(p, q) (arXiv 2602.23881).

    The sum runs over the k known tokens with p as it is. Acceptance outside is not counted, so the loss is an upper
    bound and at least -log of p's sum over the k.

    Args:
        logprobs: the draft's of the k tokens, float32 [S, k].
        teacher_logprobs: the target's of the same, float [S, k].

    Example: p = (0.6, 0.2) and q = (1/2, 1/2) have 0.5 + 0.2 in common.

        >>> acceptance_term(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.6, 0.2]]).log()).loss.exp()
        tensor([1.4286])
    """
    teacher = teacher_logprobs.float()
    log_rate = torch.minimum(logprobs, teacher).logsumexp(dim=1)  # finite where q itself would underflow
    share = (logprobs.detach() - log_rate.detach()[:, None]).exp()  # of each token in the acceptance rate, if q < p
    return Term(-log_rate, torch.where(logprobs < teacher, share, 0.0))


def mix_terms(logprobs: Tensor, teacher_logprobs: Tensor | None, objective: ObjectiveConfig) -> Term:
    """The terms of an objective, each times its factor.

    Args:
        logprobs: the draft's of `SlotTargets.known_tokens`, float32 [S, 1 + k].
        teacher_logprobs: float [S, k]; None if no term needs them.
        objective: factors ce, kd and lk.
    """
    loss, neg_grad = ce_term(logprobs[:, :1])
    if teacher_logprobs is None:
        return Term(objective.ce * loss, objective.ce * neg_grad)
    kd, lk = (term(logprobs[:, 1:], teacher_logprobs) for term in (kl_term, acceptance_term))
    return Term(
        objective.ce * loss + objective.kd * kd.loss + objective.lk * lk.loss,
        torch.cat([objective.ce * neg_grad, objective.kd * kd.neg_grad + objective.lk * lk.neg_grad], dim=1),
    )
