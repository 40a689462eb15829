"""What counts as the same question and as a piece of a benchmark, against all-pairs and all-substrings oracles."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import conversations

from pard_train.data.dedupe import (
    BLOCK_ROWS,
    MAX_COMPARISONS,
    MIN_WHOLE_WORDS,
    NUM_HASHES,
    Contamination,
    band_width,
    content_key,
    first_of_each,
    is_held_out,
    near_duplicates,
    question_text,
    shuffled,
    signature,
)

THRESHOLD = 0.8
WHOLE_UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
WORDS = st.lists(st.text("abcdefgxyz", min_size=1, max_size=4), max_size=8)
few_words = st.lists(st.sampled_from("abc"), max_size=14)
ODD_TEXTS = ["", " \n\t ", "🙂", "🙂🙃", "你好", "ภาษาไทย", "x" * 100_000, "so it goes " * 9_000]


def ask(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """A chat whose user says these texts, with an answer to each."""
    turns = [{"role": "system", "content": system}] if system is not None else []
    for text in texts:
        turns += [{"role": "user", "content": text}, {"role": "assistant", "content": "Well."}]
    return turns


def keys_of(texts: list[str]) -> np.ndarray:
    """Keys as an array."""
    return np.array([content_key(text) for text in texts], dtype=np.uint64)


def random_signatures(num_rows: int, *, seed: int) -> np.ndarray:
    """Signatures of rows that have nothing in common."""
    return np.random.default_rng(seed).integers(1 << 32, size=(num_rows, NUM_HASHES), dtype=np.uint32)


def word_3_grams(text: str) -> set[tuple[str, ...]]:
    """By hand."""
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def overlap(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    """Exact Jaccard index."""
    return len(left & right) / len(left | right)


def edited(text: str, num_edits: int, draw: random.Random) -> str:
    """The text with some words replaced."""
    words = text.split()
    for place in draw.sample(range(len(words)), num_edits):
        words[place] = f"new{draw.randrange(10**9)}"
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


def test_a_chat_is_identified_by_what_is_asked_and_not_by_its_answers() -> None:
    chat = ask("What is up?", "And down?", system="Be brief.")
    answered = [{**m, "content": "other"} if m["role"] == "assistant" else m for m in chat]
    assert question_text(chat) == question_text(answered)
    assert content_key(question_text(chat[:-1])) == content_key(question_text(chat))


def test_equal_words_in_other_roles_or_turns_are_other_questions() -> None:
    chats = [
        ask("a b"),
        ask("a", "b"),
        ask("b", system="a"),
        ask("", system="a b"),
        ask("a b", system=""),
        ask("user a b"),
        [*ask("a")[:1], {"role": "tool", "content": "b"}],
        ask("a \x02 b"),
    ]
    found = [content_key(question_text(chat)) for chat in chats]
    assert len(set(found[:-1])) == len(found) - 1
    assert found[-1] == found[0]  # a control character of the data is no turn


@given(WHOLE_UNICODE)
def test_a_key_is_blind_to_unicode_form_and_spaces(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert content_key(unicodedata.normalize(form, text)) == content_key(text)
    assert content_key("\n " + "\t\u3000".join(text.split()) + " ") == content_key(text)


@given(st.text("aZ bÉß ñÜ ПрИ Σσ ﬁ"))
def test_a_key_is_blind_to_case(text: str) -> None:
    assert content_key(text.upper()) == content_key(text.lower()) == content_key(text.title()) == content_key(text)


def test_an_exponent_is_no_digit() -> None:
    assert content_key("3² + 4²") != content_key("32 + 42")


@given(WORDS, WORDS)
def test_other_words_give_another_key(left: list[str], right: list[str]) -> None:
    assert (content_key(" ".join(left)) == content_key(" ".join(right))) == (left == right)


def test_a_key_is_a_number_of_64_bits_that_never_changes() -> None:
    assert content_key("Hello, World!") == 4870045032163135244
    assert all(0 <= content_key(text) < 2**64 for text in ODD_TEXTS)
    assert len(set(keys_of(ODD_TEXTS).tolist())) == len(ODD_TEXTS) - 1  # no text and no visible text are the same


@given(st.lists(st.integers(0, 5)))
def test_of_equal_keys_the_first_row_stays(keys: list[int]) -> None:
    expected = [key not in keys[:row] for row, key in enumerate(keys)]
    assert first_of_each(np.array(keys, dtype=np.uint64)).tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Split and order
# ---------------------------------------------------------------------------------------------------------------------


def test_other_data_moves_no_row_between_training_and_held_out() -> None:
    texts = [f"question {i}" for i in range(2000)]
    alone = dict(zip(texts, is_held_out(keys_of(texts), 0.1).tolist(), strict=True))
    mixed = random.Random(0).sample([*texts, *(f"other {i}" for i in range(3000))], k=5000)
    with_others = dict(zip(mixed, is_held_out(keys_of(mixed), 0.1).tolist(), strict=True))
    assert all(with_others[text] == alone[text] for text in texts)
    more = is_held_out(keys_of(texts), 0.2)
    assert all(more[row] for row, text in enumerate(texts) if alone[text])  # a larger share only adds


@pytest.mark.parametrize("fraction", [0.01, 0.3])
def test_the_held_out_share_is_the_one_asked_for(fraction: float) -> None:
    num_rows = 20_000
    held_out = is_held_out(keys_of([str(i) for i in range(num_rows)]), fraction)
    assert abs(held_out.mean() - fraction) < 4 * np.sqrt(fraction * (1 - fraction) / num_rows)
    assert not is_held_out(np.zeros(3, dtype=np.uint64), 0.0).any()


def test_the_order_follows_from_contents_and_seed_wherever_rows_stood() -> None:
    keys = keys_of([str(i) for i in range(500)])
    order = shuffled(keys, 7)
    assert sorted(order.tolist()) == list(range(500))
    elsewhere = np.random.default_rng(0).permutation(keys)
    assert np.array_equal(elsewhere[shuffled(elsewhere, 7)], keys[order])
    assert not np.array_equal(order, shuffled(keys, 8))
    fewer = keys[100:]
    assert np.array_equal(fewer[shuffled(fewer, 7)], [key for key in keys[order] if key in set(fewer)])


def test_held_out_rows_stand_anywhere_in_the_order() -> None:
    keys = keys_of([str(i) for i in range(20_000)])
    ranks = np.empty(len(keys))
    ranks[shuffled(keys, 0)] = np.linspace(0, 1, len(keys))
    held_out = ranks[is_held_out(keys, 0.1)]
    assert abs(held_out.mean() - 0.5) < 4 / np.sqrt(12 * len(held_out))


# ---------------------------------------------------------------------------------------------------------------------
# Near duplicates
# ---------------------------------------------------------------------------------------------------------------------


def test_equal_hashes_estimate_the_overlap_of_word_3_grams() -> None:
    draw = random.Random(0)
    errors = []
    for number in range(300):
        text = " ".join(f"w{draw.randrange(2000)}" for _ in range(100))
        other = edited(text, number % 30, draw)
        estimate = (signature(ask(text)) == signature(ask(other))).mean()
        errors.append(estimate - overlap(word_3_grams(text), word_3_grams(other)))
    assert abs(np.mean(errors)) < 4 * 0.0625 / np.sqrt(300)  # sqrt(J * (1 - J) / 64) is at most 0.0625
    assert np.std(errors) < 0.0625


def test_planted_duplicates_are_found_and_nothing_else_is_dropped() -> None:
    draw = random.Random(1)
    texts = [" ".join(f"w{draw.randrange(500)}" for _ in range(draw.randint(20, 90))) for _ in range(400)]
    near = [edited(text, 1, draw) for text in texts if len(text.split()) > 70]
    far = [edited(text, 12, draw) for text in texts if len(text.split()) > 40]
    rows = [*texts, *near, *far]
    signatures = np.stack([signature(ask(text)) for text in rows])
    is_dropped = near_duplicates(signatures, THRESHOLD)
    grams = [word_3_grams(text) for text in rows]
    highest = np.array([max((overlap(grams[i], grams[j]) for j in range(i)), default=0.0) for i in range(len(rows))])
    assert len(near) > 80
    assert is_dropped[highest > 0.9].mean() > 0.98
    assert (highest > 0.9).sum() == len(near)
    assert not is_dropped[highest < 0.5].any()
    assert (highest < 0.5).sum() > 400


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from([0.08, 0.25, 0.5, 0.75]), st.integers(2, 12))
def test_a_row_goes_for_an_earlier_one_and_no_found_pair_stays(
    seed: int, num_rows: int, threshold: float, num_values: int
) -> None:
    signatures = np.random.default_rng(seed).integers(num_values, size=(num_rows, 12), dtype=np.uint32)
    is_dropped = near_duplicates(signatures, threshold)
    is_near = (signatures[:, None] == signatures[None]).mean(axis=2) >= threshold
    width = band_width(threshold, 12)
    bands = [signatures[:, at : at + width] for at in range(0, 12 - width + 1, width)]
    for row in np.flatnonzero(is_dropped):
        assert is_near[row, :row].any()
    for first, second in combinations(np.flatnonzero(~is_dropped), 2):
        assert not (is_near[first, second] and any((band[first] == band[second]).all() for band in bands))


def test_in_a_chain_of_edits_the_first_text_stays_and_each_later_one_has_an_earlier_neighbour() -> None:
    links = random_signatures(1, seed=0).repeat(7, axis=0)
    for row in range(7):  # 6 other hashes per step: neighbours agree in 0.91, texts three steps apart in 0.72
        links[row, : 6 * row] = random_signatures(7, seed=1)[0, : 6 * row]
    order = [3, 0, 6, 1, 2, 4, 5]
    is_dropped = near_duplicates(links[order], THRESHOLD)
    assert not is_dropped[:3].any()  # steps 3, 0 and 6 are far from each other
    assert is_dropped[3:].all()


def test_copies_are_found_across_blocks_and_in_a_memory_map(tmp_path: Path) -> None:
    num_rows = 2 * BLOCK_ROWS + 1000
    signatures = np.lib.format.open_memmap(tmp_path / "s.npy", "w+", np.uint32, (num_rows, NUM_HASHES))
    signatures[:] = random_signatures(num_rows, seed=2)
    copies = np.arange(num_rows - 1000, num_rows)
    signatures[copies] = signatures[copies - 2 * BLOCK_ROWS]
    is_dropped = near_duplicates(signatures, THRESHOLD)
    assert np.flatnonzero(is_dropped).tolist() == copies.tolist()
    everything = np.broadcast_to(signatures[:1], (num_rows, NUM_HASHES))
    assert np.flatnonzero(~near_duplicates(everything, THRESHOLD)).tolist() == [0]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_a_pair_at_the_threshold_shares_a_band_as_often_as_the_formula_says(threshold: float) -> None:
    width = band_width(threshold)
    num_bands = NUM_HASHES // width
    expected = 1 - (1 - threshold**width) ** num_bands
    is_equal = np.random.default_rng(3).random((20_000, num_bands, width)) < threshold
    found = is_equal.all(axis=2).any(axis=1).mean()
    assert abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)
    assert expected >= 0.9
    assert 1 - (1 - threshold ** (width + 1)) ** (NUM_HASHES // (width + 1)) < 0.9
    assert band_width(0.8) == 6


@pytest.mark.parametrize("place", range(NUM_HASHES))
def test_no_hash_is_left_out_of_the_bands(place: int) -> None:
    signatures = random_signatures(2, seed=5)
    assert not near_duplicates(signatures, 1 / NUM_HASHES).any()
    signatures[1, place] = signatures[0, place]
    assert near_duplicates(signatures, 1 / NUM_HASHES).tolist() == [False, True]


@pytest.mark.parametrize(("num_others", "is_found"), [(MAX_COMPARISONS - 1, True), (MAX_COMPARISONS, False)])
def test_a_bucket_of_other_texts_costs_a_bounded_number_of_comparisons(num_others: int, is_found: bool) -> None:
    signatures = random_signatures(num_others + 2, seed=4)
    width = band_width(THRESHOLD)
    signatures[-1] = signatures[-2]
    signatures[-1, width::width] += 1  # the pair differs in every band but the first
    signatures[:, :width] = signatures[0, :width]  # which all rows share
    assert (signatures[-1] == signatures[-2]).mean() >= THRESHOLD
    assert near_duplicates(signatures, THRESHOLD).tolist() == [False] * (num_others + 1) + [is_found]


def test_no_rows_have_no_duplicates() -> None:
    assert near_duplicates(np.empty((0, NUM_HASHES), dtype=np.uint32), THRESHOLD).tolist() == []
    assert first_of_each(np.empty(0, dtype=np.uint64)).tolist() == []
    assert shuffled(np.empty(0, dtype=np.uint64), 0).tolist() == []


def test_a_sign_or_a_system_prompt_makes_another_question() -> None:
    manual = " ".join(f"rule{number}" for number in range(200))
    chats = [
        ask("Solve 3x + 5 = 11"),
        ask("solve  3X + 5 = 11"),
        ask("Solve 3x - 5 = 11"),
        ask("Solve 3x + 5 = 11", system=manual),
        ask("Who was Euler?", system=manual),
        ask("Who was  Euler?", system=manual),
        ask("Who was Euler?", system=f"{manual}."),
    ]
    signatures = np.stack([signature(chat) for chat in chats])
    assert signatures.dtype == np.uint32
    assert near_duplicates(signatures, THRESHOLD).tolist() == [False, True, False, False, False, True, False]


def test_odd_texts_have_signatures_of_their_own() -> None:
    signatures = np.stack([signature(ask(text)) for text in ODD_TEXTS])
    for (i, left), (j, right) in combinations(enumerate(signatures), 2):
        assert (left == right).mean() == (1.0 if (i, j) == (0, 1) else 0.0)  # no text, no visible text


def test_chinese_texts_are_compared_by_characters() -> None:
    text = "请用简单的话解释一下为什么天空在白天是蓝色的而在日落的时候会变成红色" * 2
    near, far = text.replace("红色", "橙色", 1), text[::-1]
    base, *others = (signature(ask(t)) for t in (text, near, far))
    assert (base == others[0]).mean() >= THRESHOLD
    assert (base == others[1]).mean() < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of benchmarks
# ---------------------------------------------------------------------------------------------------------------------


def expected_benchmarks(prompts: dict[str, list[list[str]]], length: int, text: list[str]) -> set[str]:
    """Benchmarks that share a telling run with a text, straight from the definition."""

    def runs(words: list[str], size: int) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]

    found = set()
    for name, listed in prompts.items():
        distinct = [words for i, words in enumerate(listed) if words not in listed[:i]]
        for words in distinct:
            others = [run for other in distinct if other is not words for run in runs(other, length)]
            own = [run for run in runs(words, length) if run not in others]
            if not own and len(words) >= MIN_WHOLE_WORDS:
                own = [tuple(words)]
            if any(run in runs(text, len(run)) for run in own):
                found.add(name)
    return found


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(st.sampled_from("PQ"), st.lists(few_words, max_size=4)), st.integers(2, 8), few_words)
def test_contamination_is_what_a_search_of_all_runs_finds(
    prompts: dict[str, list[list[str]]], length: int, text: list[str]
) -> None:
    expected = expected_benchmarks(prompts, length, text)
    found = Contamination({n: [" ".join(p) for p in listed] for n, listed in prompts.items()}, length).find(
        " ".join(text)
    )
    assert found in expected if expected else found is None


def test_a_benchmark_is_found_whatever_surrounds_its_words() -> None:
    prompts = [question_text(chat) for chat in conversations(50, seed=5) if len(question_text(chat).split()) > 20]
    contamination = Contamination({"tiny": prompts}, 8)
    for prompt in prompts:
        assert contamination.find(f"Please: <<{prompt.upper().replace(' ', '; ')}>> Thanks!") == "tiny"
    clean = [question_text(chat) for chat in conversations(50, seed=6)]
    assert sum(contamination.find(text) is not None for text in clean) == 0


def test_a_template_is_no_content_but_what_follows_it_is() -> None:
    template = "Solve the following problem step by step and write the final answer in a box"
    contents = ["how many apples are left after lunch", "which train of the two arrives first"]
    contamination = Contamination({"maths": [f"{template}: {content}" for content in contents]}, 8)
    assert contamination.find(f"{template}: what is the area of this garden of roses") is None
    assert contamination.find(f"I wonder {contents[0]} at noon") is None  # seven words, all of its own
    assert contamination.find(f"in a box, {contents[0]}") == "maths"


def test_a_prompt_listed_twice_is_still_content() -> None:
    prompt = "why does the moon look larger when it is near the horizon than above"
    assert Contamination({"sky": [prompt, prompt.title()]}, 8).find(prompt) == "sky"


def test_a_short_prompt_counts_as_a_whole_unless_it_is_found_everywhere() -> None:
    contamination = Contamination({"chat": ["Name three rivers of Peru", "Hi", "", "🙂"]}, 13)
    assert contamination.find("Could you name three rivers of Peru, please?") == "chat"
    assert contamination.find("Name three rivers of Chile") is None
    assert [contamination.find(text) for text in ("Hi", "Hi there", *ODD_TEXTS)] == [None] * (2 + len(ODD_TEXTS))


def test_chinese_characters_are_words() -> None:
    contamination = Contamination({"zh": ["小明有五个苹果。他吃了两个。还剩下几个苹果。"]}, 13)
    assert contamination.find("问题 小明有五个苹果他吃了两个还剩下几个") == "zh"
    assert contamination.find("小红有三本书。她借给朋友一本。现在她有几本书。") is None


def test_no_benchmarks_contaminate_nothing() -> None:
    assert Contamination({}, 13).find("anything at all") is None


def test_everything_is_the_same_in_every_process() -> None:
    program = """
import random
import numpy as np
from pard_train.data.dedupe import *
draw = random.Random(0)
texts = [" ".join(map(str, draw.choices(range(50), k=10 + i // 2))) for i in range(60)]
texts += [text + " 1" for text in texts[::2]]
chats = [[{"role": "user", "content": text}] for text in texts]
keys = np.array([content_key(question_text(chat)) for chat in chats], dtype=np.uint64)
signatures = np.stack([signature(chat) for chat in chats])
contamination = Contamination({"a": texts[:30], "b": texts[20:40]}, 8)
print(shuffled(keys, 1), is_held_out(keys, 0.5), signatures.sum(axis=0))
print(np.flatnonzero(near_duplicates(signatures, 0.5)), [contamination.find(text) for text in texts])
"""
    outputs = []
    for hash_seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = [sys.executable, "-c", program]
        outputs.append(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
    assert outputs[0] == outputs[1]
    assert all(part in outputs[0] for part in ("True", "'a'", "'b'", "None", " 64 "))
