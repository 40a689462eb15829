"""Live speculative decoding: one draft and one target forward pass per step, with KV caches for both models.

Greedy output equals the target's own greedy text for any draft; sampled output has the target's distribution for any
draft (`sampling.verify`). Texts of a batch advance independently, and finished answers leave it. Greedy means the arg
max of the target's logits: penalties and forced tokens of the target's generation config are ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pard_train.downloads import local_model
from pard_train.generation.proposers import Proposer
from pard_train.generation.runner import Runner
from pard_train.generation.sampling import GREEDY, NO_TOKEN, Sampling, SequenceRandom, probabilities, verify
from pard_train.model import load_config

# Legend: B unfinished answers, K draft tokens, V vocabulary of the target.


@dataclass(frozen=True)
class Step:
    """What one target forward pass adds to one answer.

    Attributes:
        tokens: emitted, up to the end of the turn or the length limit.
        num_accepted: how many of them are accepted draft tokens; the rest, at most one, is the target's own.
    """

    tokens: list[int]
    num_accepted: int


@dataclass(frozen=True)
class Decoded:
    """One answer, step by step."""

    steps: list[Step]

    @property
    def tokens(self) -> list[int]:
        """All emitted tokens."""
        return [token for step in self.steps for token in step.tokens]

    @property
    def accepted(self) -> list[int]:
        """Accepted draft tokens of each step."""
        return [step.num_accepted for step in self.steps]


@dataclass(frozen=True)
class Limits:
    """When an answer ends."""

    max_new_tokens: int
    end_ids: frozenset[int]

    def cut(self, tokens: list[int], num_so_far: int) -> list[int]:
        """Cut `tokens`, which follow `num_so_far` others, after the first end-of-turn id and at the limit."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.end_ids), len(tokens))
        return tokens[: min(end, self.max_new_tokens - num_so_far)]

    def is_over(self, tokens: list[int]) -> bool:
        """Whether an answer is finished."""
        return len(tokens) >= self.max_new_tokens or (bool(tokens) and tokens[-1] in self.end_ids)


def end_ids_of(path: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a turn of this model: those of its generation config and of the tokenizer."""
    try:
        configured = GenerationConfig.from_pretrained(local_model(path)).eos_token_id
    except OSError:  # older folders keep it in config.json
        configured = load_config(path).eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def decode(
    target: PreTrainedModel | Runner,
    prompt_ids: list[int],
    limits: Limits,
    *,
    drafter: Proposer | None = None,
    num_draft_tokens: int = 0,
    sampling: Sampling = GREEDY,
) -> Iterator[Step]:
    """Decode one answer, step by step; speculative with a drafter, plain without.

    The first step prefills the prompt and verifies the first draft in the same pass.

    Args:
        target: target model. Pass a Runner for several prompts, because building one takes time.
        prompt_ids: the rendered prompt, at least one token.
        limits: when the answer ends.
        drafter: proposes up to K tokens per step; None decodes one token at a time.
        num_draft_tokens: K.
        sampling: how tokens are chosen.

    Yields:
        One Step per target forward pass.
    """
    for steps in _decode(target, [prompt_ids], limits, drafter, num_draft_tokens, sampling):
        yield steps[0]


def decode_batch(
    target: PreTrainedModel | Runner,
    prompts: Sequence[list[int]],
    limits: Limits,
    *,
    drafter: Proposer | None = None,
    num_draft_tokens: int = 0,
    sampling: Sampling = GREEDY,
) -> list[Decoded]:
    """Decode a batch of answers, each as `decode` would: it does not depend on the rest of the batch.

    Each answer advances by what it accepts. The KV cache has the length of the longest text for every prompt.
    """
    answers: list[list[Step]] = [[] for _ in prompts]
    if not prompts:
        return []
    for steps in _decode(target, prompts, limits, drafter, num_draft_tokens, sampling):
        for row, step in steps.items():
            answers[row].append(step)
    return [Decoded(steps) for steps in answers]


@torch.inference_mode()
def _decode(
    target: PreTrainedModel | Runner,
    prompts: Sequence[list[int]],
    limits: Limits,
    drafter: Proposer | None,
    num_draft_tokens: int,
    sampling: Sampling,
) -> Iterator[dict[int, Step]]:
    """One step of every unfinished answer, by index of its prompt, per target forward pass."""
    runner = target if isinstance(target, Runner) else Runner(target, is_packed=False)  # packing takes longer than that
    random = None if sampling.is_greedy else SequenceRandom(prompts, sampling)
    max_length = max(map(len, prompts)) + limits.max_new_tokens + num_draft_tokens
    width = 1 + num_draft_tokens if drafter is not None else 1
    batch = runner.start(len(prompts), max_length, width=width, num_logits=width)
    stream = drafter.start(len(prompts), max_length, num_draft_tokens) if drafter is not None else None
    texts = [list(prompt) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = [row for row, output in enumerate(outputs) if not limits.is_over(output)]
    while rows:
        running = [texts[row] for row in rows]
        drafts = stream.propose(running) if stream else [[] for _ in rows]
        logits = batch.extend(running, drafts)
        uniforms = None if random is None else random.uniform(rows, 1 + num_draft_tokens)
        emitted = _verify(logits, drafts, sampling, uniforms)
        steps = {}
        for row, (num_accepted, tokens) in zip(rows, emitted, strict=True):
            tokens = limits.cut(tokens, len(outputs[row]))
            steps[row] = Step(tokens, min(num_accepted, len(tokens)))
            texts[row] += tokens
            outputs[row] += tokens
        yield steps
        unfinished = [i for i, row in enumerate(rows) if not limits.is_over(outputs[row])]
        if unfinished and len(unfinished) < len(rows):
            batch.keep(unfinished)
            if stream:
                stream.keep(unfinished)
        rows = [rows[i] for i in unfinished]


def _verify(
    logits: Tensor, drafts: list[list[int]], sampling: Sampling, uniforms: Tensor | None
) -> list[tuple[int, list[int]]]:
    """For every answer, the number of accepted draft tokens, and these followed by the target's own token.

    Args:
        logits: [B, M + 1, V], aligned at the end, where M <= K is the most draft tokens of any answer.
        drafts: tokens of each answer.
        sampling: how tokens are chosen.
        uniforms: float64 [B, K + 1], also if fewer tokens are proposed; None if greedy.
    """
    if uniforms is None:
        chosen = logits.argmax(dim=-1).tolist()  # after the text, and after each draft token
        owns = [row[len(row) - len(draft) - 1 :] for row, draft in zip(chosen, drafts, strict=True)]
        accepted = [num_leading_matches(draft, own) for draft, own in zip(drafts, owns, strict=True)]
        return [(n, [*draft[:n], own[n]]) for n, draft, own in zip(accepted, drafts, owns, strict=True)]
    most = max(map(len, drafts))
    device = logits.device
    lengths = torch.tensor([len(draft) for draft in drafts], device=device)
    places = (torch.arange(most + 1, device=device) + (most - lengths)[:, None]).clamp(max=most)  # aligned at the start
    probs = probabilities(logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), sampling)
    padded = torch.tensor([draft + [NO_TOKEN] * (most - len(draft)) for draft in drafts], device=device)
    used = torch.cat([uniforms[:, :most], uniforms[:, -1:]], dim=1).to(device)
    num_accepted, own_tokens = verify(padded.long(), probs, used)
    numbered = zip(num_accepted.tolist(), drafts, own_tokens.tolist(), strict=True)
    return [(n, [*draft[:n], own]) for n, draft, own in numbered]


def num_leading_matches(draft: list[int], own: list[int]) -> int:
    """Leading draft tokens that equal the target's own.

    >>> num_leading_matches([5, 6, 7], [5, 6, 9, 1])
    2
    """
    return next((i for i, (d, t) in enumerate(zip(draft, own, strict=False)) if d != t), len(draft))
