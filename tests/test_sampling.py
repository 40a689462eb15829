"""Speculative sampling gives the target's distribution exactly, whatever the draft."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from pard_train.generation.sampling import GREEDY, NO_TOKEN, Sampling, SequenceRandom, draw, probabilities, verify

# Probabilities are quarters, so that every bound on a uniform number (p, and the shares of what is left of it) is a
# multiple of a 12th. The mean over the middles of 12 cells is then the integral over all uniform numbers: an exact
# distribution, not a sample.
PARTS, CELLS = 4, 12
MIDDLES = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
VOCABULARY = 3


def random_probs(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Probabilities in quarters, some of them zero: [*shape, VOCABULARY]."""
    generator = torch.Generator().manual_seed(seed)
    throws = torch.randint(VOCABULARY, (*shape, PARTS), generator=generator)
    return torch.nn.functional.one_hot(throws, VOCABULARY).sum(-2).float() / PARTS


def every_outcome(draft: tuple[int, ...], target_probs: torch.Tensor) -> dict[tuple[int, ...], Fraction]:
    """Exact probability of everything that one step may emit after this draft."""
    uniforms = torch.tensor(list(itertools.product(MIDDLES.tolist(), repeat=len(draft) + 1)), dtype=torch.float64)
    number = len(uniforms)
    kept, own = verify(
        torch.tensor([draft]).expand(number, -1),
        target_probs[None].expand(number, -1, -1),
        uniforms,
    )
    pairs, counts = torch.unique(torch.stack([kept, own]), dim=1, return_counts=True)
    return {
        (*draft[:k], token): Fraction(count, number)
        for (k, token), count in zip(pairs.T.tolist(), counts.tolist(), strict=True)
    }


def exact(value: torch.Tensor) -> Fraction:
    """A probability in quarters."""
    return Fraction(round(value.item() * PARTS), PARTS)


@pytest.mark.parametrize("seed", range(10))
def test_every_emitted_token_has_exactly_the_targets_distribution(seed: int) -> None:
    first = random_probs((), seed)  # the target's after the text
    after = random_probs((VOCABULARY,), seed + 100)  # after each first token
    last = random_probs((VOCABULARY, VOCABULARY), seed + 200)  # after each pair
    draft_probs = random_probs((2,), seed + 300)  # how often each draft is proposed
    emitted: dict[tuple[int, ...], Fraction] = {}
    for draft in itertools.product(range(VOCABULARY), repeat=2):
        chance = exact(draft_probs[0, draft[0]]) * exact(draft_probs[1, draft[1]])
        target_probs = torch.stack([first, after[draft[0]], last[draft]])
        if chance == 0:
            continue
        outcomes = every_outcome(draft, target_probs)
        for tokens, probability in outcomes.items():
            emitted[tokens] = emitted.get(tokens, Fraction(0)) + chance * probability
    assert sum(emitted.values()) == 1

    def mass(*prefix: int, longer_than: int = 0) -> Fraction:
        return sum((p for t, p in emitted.items() if t[: len(prefix)] == prefix and len(t) > longer_than), Fraction(0))

    for x in range(VOCABULARY):
        assert mass(x) == exact(first[x])
        for y in range(VOCABULARY):  # the second token, in the steps that have one
            assert mass(x, y) == mass(x, longer_than=1) * exact(after[x, y])
            for z in range(VOCABULARY):
                assert mass(x, y, z) == mass(x, y, longer_than=2) * exact(last[x, y, z])


def test_a_most_likely_draft_is_kept_as_often_as_the_target_would_say_it() -> None:
    target_probs = torch.tensor([[1 / 4, 2 / 4, 1 / 4], [0, 0, 1]])
    outcomes = every_outcome((1,), target_probs)
    assert outcomes == {(1, 2): Fraction(2, 4), (0,): Fraction(1, 4), (2,): Fraction(1, 4)}


def test_at_temperature_zero_the_rule_is_the_greedy_one() -> None:
    torch.manual_seed(0)
    probs = probabilities(torch.randn(1, 4, 7), GREEDY)
    best = probs.argmax(-1)[0].tolist()
    wrong = (best[1] + 1) % 7
    for draft, num_kept in (([best[0], best[1], best[2]], 3), ([best[0], wrong, best[2]], 1), ([wrong], 0)):
        if draft == [wrong] and wrong == best[0]:
            continue
        uniforms = torch.rand(1, len(draft) + 1, dtype=torch.float64)
        kept, own = verify(torch.tensor([draft]), probs[:, : len(draft) + 1], uniforms)
        assert kept.item() == num_kept
        assert own.item() == best[num_kept]


def test_rows_with_fewer_draft_tokens_fare_as_they_would_alone() -> None:
    torch.manual_seed(3)
    target_probs = random_probs((200, 4), 1)
    drafts, uniforms = torch.randint(VOCABULARY, (200, 3)), torch.rand(200, 4, dtype=torch.float64)
    lengths = torch.randint(4, (200,))
    padded = drafts.masked_fill(torch.arange(3) >= lengths[:, None], NO_TOKEN)
    kept, own = verify(padded, target_probs, uniforms)
    for row, length in enumerate(lengths.tolist()):
        alone_kept, alone_own = verify(
            drafts[row : row + 1, :length],
            target_probs[row : row + 1, : length + 1],
            torch.cat([uniforms[row, :length], uniforms[row, -1:]])[None],
        )
        assert (kept[row], own[row]) == (alone_kept[0], alone_own[0])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_temperature_and_top_p_are_what_their_definitions_say(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    for row in torch.randn(20, 12, dtype=torch.float64).tolist():
        weights = [2.718281828459045 ** (value / temperature) for value in row]
        probs = [weight / sum(weights) for weight in weights]
        nucleus: list[int] = []
        for token in sorted(range(12), key=lambda t: -probs[t]):
            if sum(probs[t] for t in nucleus) >= top_p:
                break
            nucleus.append(token)
        total = sum(probs[t] for t in nucleus)
        expected = [probs[t] / total if t in nucleus else 0.0 for t in range(12)]
        found = probabilities(torch.tensor(row), Sampling(temperature, top_p))
        assert found.dtype == torch.float32
        assert torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_a_draw_inverts_the_cumulated_weights_and_never_takes_what_has_none() -> None:
    weights = torch.tensor([0.0, 2.0, 0.0, 6.0, 0.0])
    uniforms = torch.tensor([0.0, 0.24, 0.25, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.expand(5, -1), uniforms).tolist() == [1, 1, 3, 3, 3]


def test_the_random_numbers_of_an_answer_do_not_depend_on_the_batch() -> None:
    sampling = Sampling(1.0, seed=4)
    alone = SequenceRandom([[1, 2]], sampling).uniform([0], 6)[0]
    together = SequenceRandom([[9], [1, 2], [1, 2]], sampling)
    first, second = together.uniform([1], 2)[0], together.uniform([0, 1], 4)[1]
    assert torch.equal(torch.cat([first, second]), alone)
    assert not torch.equal(together.uniform([2], 6)[0], alone)  # the same question, asked again
    assert not torch.equal(SequenceRandom([[1, 2]], Sampling(1.0, seed=5)).uniform([0], 6)[0], alone)
