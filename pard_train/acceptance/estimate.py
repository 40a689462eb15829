"""Expected acceptance at a temperature above 0, from cached distributions, where exact replay is impossible.

What speculative sampling keeps is a matter of chance. Of a draft token that was drawn from q it keeps sum_v min(p(v),
q(v)) on average, and of one that is simply the most likely token x of q it keeps p(x); p is what the target draws from
(arXiv 2211.17192, section 3). The target's log-probabilities are cached (`scores.py`); the draft's distributions come
from one packed forward pass per depth, as in replay. Two ways lead from there to a number of steps:

along    The text was drawn from the target in this very way. Given that the text has x in a place, the draft token for
         that place was kept with probability min(1, q(x) / p(x)) (or, if it is the most likely one: if it is x). The
         tokens of one draft do not depend on each other, so the expected steps, given the text, are exact.
average  Any text. The chance to keep a token is the one on average over the next token at the text's own context. But a
         chain that was kept may have left the text, and what is kept says something about what follows.

Both are estimates. The texts are a sample, and of p only the k most likely tokens are known: what the others may have
at the temperature is counted so that too little is kept rather than too much. `outside` tells how much that is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pard_train.acceptance.chains import PackedChains, pack_texts
from pard_train.acceptance.counting import counts_per_prompt, tau_interval
from pard_train.acceptance.replay import LOGIT_CHUNK, SLOT_BUDGET
from pard_train.generation.proposers import Drafter
from pard_train.generation.sampling import Sampling, probabilities

# Legend: N tokens of an answer, A chains, K draft tokens, V vocabulary, k tokens cached per place.

MIN_SURVIVAL = 1e-4  # a chain that is kept more rarely is not deepened: it would add less than this to a step


@dataclass(frozen=True)
class ScoredText:
    """A text with what the target thinks of its answer, as `scores.py` caches it.

    Attributes:
        label_logprobs: log p(token | text before it) at temperature 1, float [N].
        top_ids: the k most likely tokens of every place, int [N, k].
        top_logprobs: their log-probabilities, float [N, k], largest first.
        prompt_id: texts of one prompt are drawn together for the interval.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    label_logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    prompt_id: str


@dataclass(frozen=True)
class Estimate:
    """Expected acceptance of P prompts at one K.

    Attributes:
        method: along | average.
        histogram: expected number of steps that accept 0..K draft tokens, [K + 1].
        tau_low, tau_high: bootstrap 95% interval over prompts.
        outside: mean probability of the target that the cached tokens do not cover.
    """

    method: str
    num_draft_tokens: int
    num_prompts: int
    num_turns: int
    num_tokens: int
    histogram: list[float]
    tau_low: float
    tau_high: float
    outside: float

    @property
    def num_steps(self) -> float:
        """Expected target forward passes."""
        return sum(self.histogram)

    @property
    def tau(self) -> float:
        """Tokens per expected target forward pass."""
        return self.num_tokens / self.num_steps

    def record(self) -> dict[str, Any]:
        """The fields of acceptance.json that follow from it, with `mode` estimate."""
        at_least = np.cumsum(self.histogram[::-1])[::-1]  # [K + 1]
        return {
            "mode": "estimate",
            "estimated": self.method,
            "num_draft_tokens": self.num_draft_tokens,
            "num_prompts": self.num_prompts,
            "num_turns": self.num_turns,
            "num_tokens": self.num_tokens,
            "num_steps": self.num_steps,
            "tau": self.tau,
            "tau_low": self.tau_low,
            "tau_high": self.tau_high,
            "histogram": self.histogram,
            "survival": (at_least[1:] / at_least[0]).tolist(),
            "conditional": [float(b / a) if a else None for a, b in pairwise(at_least)],
            "outside": self.outside,
        }


@torch.inference_mode()
def estimate_acceptance(
    drafter: Drafter,
    texts: Sequence[ScoredText],
    num_draft_tokens: int,
    sampling: Sampling,
    *,
    is_own_sample: bool,
    slot_budget: int = SLOT_BUDGET,
) -> Estimate:
    """Expected acceptance of a draft on cached texts.

    Args:
        drafter: draft model; `is_sampled` says whether it draws its tokens or takes the most likely ones.
        texts: with the target's scores.
        num_draft_tokens: K.
        sampling: how the target draws, at a temperature above 0.
        is_own_sample: the texts were drawn from the target in this way (`along`); otherwise any texts (`average`).
        slot_budget: text slots of a pack.

    Raises:
        ValueError: at temperature 0, where replay is exact.
    """
    if sampling.is_greedy:
        raise ValueError("temperature 0 needs no estimate: replay is exact")
    counts, prompts, outside = [], [], []
    histogram = np.zeros(num_draft_tokens + 1)
    for pack in pack_texts([(t.prompt_ids, t.answer_ids) for t in texts], slot_budget):
        target = _Target.of([texts[text.number] for text in pack], sampling, drafter.model.config.vocab_size)
        chains = PackedChains(drafter, pack)
        kept = _kept(chains, target, num_draft_tokens, sampling, is_own_sample=is_own_sample)
        for text, mine in zip(pack, np.split(kept, np.cumsum(chains.lengths)[:-1]), strict=True):
            steps = expected_steps(mine)
            histogram += steps
            counts.append((len(mine), float(steps.sum())))
            prompts.append(texts[text.number].prompt_id)
        outside.append(target.outside)
    per_prompt = counts_per_prompt(counts, prompts)
    low, high = tau_interval(per_prompt)
    return Estimate(
        method="along" if is_own_sample else "average",
        num_draft_tokens=num_draft_tokens,
        num_prompts=len(per_prompt),
        num_turns=len(counts),
        num_tokens=int(per_prompt[:, 0].sum()),
        histogram=histogram.tolist(),
        tau_low=low,
        tau_high=high,
        outside=float(np.concatenate(outside).mean()),
    )


def expected_steps(kept: np.ndarray) -> np.ndarray:
    """Expected number of steps of one answer, by the number of draft tokens that they accept.

    Args:
        kept: [N, K]: probability that the draft token of depth d of a step that starts at token j is kept, given that
            those before it were.

    Returns:
        [K + 1]. A step that reaches the end of the answer accepts at most what is left of it.

    Example: two tokens, K = 1. The first step keeps token 0 half of the time and then adds token 1 of its own. Else
    token 0 is the target's, and another step keeps token 1 with probability 0.8:

        >>> expected_steps(np.array([[0.5], [0.8]])).tolist()
        [0.6, 0.9]
    """
    num_tokens, num_draft_tokens = kept.shape
    starts = np.zeros(num_tokens + num_draft_tokens + 1)  # probability that a step starts here
    starts[0] = 1.0
    histogram = np.zeros(num_draft_tokens + 1)
    for place in range(num_tokens):
        most = min(num_draft_tokens, num_tokens - place)
        survival = np.concatenate([[1.0], np.cumprod(kept[place, :most]), [0.0]])  # accepts at least 0, 1, ..., most
        steps = starts[place] * -np.diff(survival)
        histogram[: most + 1] += steps
        starts[place + 1 : place + most + 2] += steps
    return histogram


# ---------------------------------------------------------------------------------------------------------------------
# What is kept of each draft token
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """What the target draws from at every answer token of a pack.

    Attributes:
        labels: the text's own tokens, int64 [A].
        label_probs: their probabilities, [A].
        top_ids, top_probs: of the cached tokens, [A, k].
        outside: probability that these do not cover, [A].
    """

    labels: np.ndarray
    label_probs: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray

    @property
    def outside(self) -> np.ndarray:
        """See the class."""
        return np.maximum(1 - self.top_probs.sum(axis=1), 0)

    @classmethod
    def of(cls, texts: Sequence[ScoredText], sampling: Sampling, num_rows: int) -> _Target:
        """The scores of some texts, one after the other, at a temperature."""
        top_logprobs = np.concatenate([text.top_logprobs for text in texts]).astype(np.float64)
        label_logprobs = np.concatenate([text.label_logprobs for text in texts]).astype(np.float64)
        top_probs, log_total = temper(top_logprobs, sampling.temperature, num_rows)
        label_probs = np.exp(label_logprobs / sampling.temperature - log_total)  # not less than they are
        if sampling.top_p < 1:
            is_inside = top_probs.cumsum(axis=1) - top_probs < sampling.top_p
            total = np.where(is_inside, top_probs, 0.0).sum(axis=1, keepdims=True)
            least = np.where(is_inside, top_logprobs, np.inf).min(axis=1)
            label_probs = np.where(label_logprobs >= least - 1e-3, label_probs / total[:, 0], 0.0)
            top_probs = np.where(is_inside, top_probs / total, 0.0)
        return cls(
            np.concatenate([text.answer_ids for text in texts]).astype(np.int64),
            np.minimum(label_probs, 1.0),
            np.concatenate([text.top_ids for text in texts]).astype(np.int64),
            top_probs,
        )


def temper(top_logprobs: np.ndarray, temperature: float, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities at a temperature from the largest log-probabilities at temperature 1.

    What the tokens that are not known weigh at the temperature lies between two cases: they are all alike, or a few of
    them are as likely as the last known one. At temperature 1 both are what is left.

    Args:
        top_logprobs: [A, k], largest first.
        temperature: above 0.
        num_rows: V.

    Returns:
        The least probabilities that the known tokens can have, [A, k], and the log of the least that they may have been
        divided by, [A].
    """
    num_others = max(num_rows - top_logprobs.shape[1], 1)
    rest = np.maximum(1 - np.exp(top_logprobs).sum(axis=1), 0.0)
    alike = num_others * (rest / num_others) ** (1 / temperature)
    few = rest * np.exp(top_logprobs[:, -1] * (1 / temperature - 1))
    weights = np.exp(top_logprobs / temperature)
    most, least = (weights.sum(axis=1) + tail(alike, few) for tail in (np.maximum, np.minimum))
    return weights / most[:, None], np.log(least)


def _kept(
    chains: PackedChains, target: _Target, num_draft_tokens: int, sampling: Sampling, *, is_own_sample: bool
) -> np.ndarray:
    """Probability that each draft token is kept, [A, K]; 0 past the end and where a chain hardly gets to."""
    kept = np.zeros((len(chains.chain), num_draft_tokens))
    survival = np.ones(len(chains.chain))
    hidden: Tensor | None = chains.read_texts()
    while hidden is not None:
        parts = list(_draft_probabilities(chains.drafter, hidden, target, chains.chain + chains.depth, sampling))
        of_label, of_top = (np.concatenate(part) for part in zip(*parts, strict=True))
        place = chains.chain + chains.depth  # an answer's tokens and its chains are counted alike
        if is_own_sample:
            now = np.minimum(1.0, of_label / np.maximum(target.label_probs[place], 1e-12))
        elif chains.drafter.is_sampled:
            now = np.minimum(of_top, target.top_probs[place]).sum(axis=1)
        else:
            now = (of_top * target.top_probs[place]).sum(axis=1)
        kept[chains.chain, chains.depth] = now
        survival[chains.chain] *= now
        is_wanted = survival[chains.chain] > MIN_SURVIVAL
        hidden = chains.deepen(is_wanted) if chains.depth + 1 < num_draft_tokens else None
    return kept


def _draft_probabilities(
    drafter: Drafter, hidden: Tensor, target: _Target, place: np.ndarray, sampling: Sampling
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The draft's probabilities of the text's own token and of the target's k most likely, chunk by chunk.

    Of a draft that takes the most likely token, that token has probability 1.
    """
    head = drafter.runner.model.get_output_embeddings()
    own = sampling if drafter.is_sampled else Sampling()
    for start in range(0, len(hidden), LOGIT_CHUNK):
        chunk, rows = hidden[start : start + LOGIT_CHUNK], place[start : start + LOGIT_CHUNK]
        probs = probabilities(drafter.sayable(head(chunk)), own)
        probs = torch.nn.functional.pad(probs, (0, drafter.model.config.vocab_size - probs.shape[1]))
        ids = np.concatenate([target.labels[rows, None], target.top_ids[rows]], axis=1)
        found = probs.gather(1, torch.from_numpy(ids).to(probs.device)).double().cpu().numpy()
        yield found[:, 0], found[:, 1:]
