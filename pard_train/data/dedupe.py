"""Deduplication and decontamination of chats by their questions.

From strict to loose: equal but for case, spaces and Unicode form (`content_key`), nearly all words equal (`signature`,
`near_duplicates`), a run of words in common with a benchmark (`Contamination`). Answers do not count, because targets
write them anew.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
from datasketch import MinHash

# Legend: N rows, H hashes of a signature.

NUM_HASHES = 64  # an overlap J is estimated to within sqrt(J * (1 - J) / 64): 0.05 at 0.8
SHINGLE_WORDS = 3
MAX_COMPARISONS = 64  # rows of a bucket that its other rows are compared with
BLOCK_ROWS = 1 << 16  # rows of signatures held in memory at a time: 16 MB
MIN_WHOLE_WORDS = 5  # a benchmark's prompt as short as "Tell me a story" would be found everywhere

_MARKS = {"system": "\x01", "user": "\x02", "tool": "\x03"}
_NO_MARKS = str.maketrans(dict.fromkeys(_MARKS.values(), " "))
# Thai, Lao, Burmese, Khmer, kana and Han are written without spaces: each character counts as a word.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
_WORD_OR_SYMBOL = re.compile(rf"{_WORD.pattern}|\S")
_PERMUTATIONS = MinHash(NUM_HASHES, seed=1).permutations
_BAND_WEIGHTS = np.random.RandomState(1).randint(1 << 62, size=NUM_HASHES, dtype=np.uint64) * 2 + 1


def question_text(messages: Sequence[Mapping[str, str]]) -> str:
    """Text that identifies a chat: all turns but the assistant's, each after a control character for its role."""
    asked = [m for m in messages if m["role"] != "assistant"]
    return "\n".join(f"{_MARKS[m['role']]}\n{m['content'].translate(_NO_MARKS)}" for m in asked)


def content_key(text: str) -> int:
    """Hash (64 bits) of a text, whatever its case, spaces and Unicode form (NFC); the same on every machine."""
    return int.from_bytes(hashlib.blake2b(_plain(text).encode(), digest_size=8).digest(), "big")


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """Which rows are the first with their key: bool [N] for uint64 [N]."""
    is_first = np.zeros(len(keys), dtype=bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    return is_first


def is_held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which rows are kept out of training: bool [N]. It depends on a row's own key only, not on other rows."""
    return keys < fraction * 2.0**64


def shuffled(keys: np.ndarray, seed: int) -> np.ndarray:
    """Rows in an order that depends on their keys and a seed, and is independent of `is_held_out`: int64 [N]."""
    ranks = np.fromiter((content_key(f"{seed} {key}") for key in keys), dtype=np.uint64, count=len(keys))
    return np.argsort(ranks, kind="stable")


def signature(messages: Sequence[Mapping[str, str]]) -> np.ndarray:
    """MinHash of the user's messages: uint32 [NUM_HASHES].

    The share of equal hashes estimates the overlap (Jaccard index) of two sets of word 3-grams. Symbols count as words:
    3x + 5 and 3x - 5 are two questions. Fewer than three words are one shingle. The system prompt is no part of the
    set, or a long one would make all its short questions near duplicates; chats with different ones share no hash.
    """
    words = _WORD_OR_SYMBOL.findall(_plain(_text_of(messages, "user")))
    shingles = [" ".join(gram) for gram in _grams(words, SHINGLE_WORDS)] or [" ".join(words)]
    sketch = MinHash(NUM_HASHES, scheme="affine32", permutations=_PERMUTATIONS, hashfunc=zlib.crc32)
    sketch.update_batch([shingle.encode() for shingle in shingles])
    return sketch.hashvalues ^ np.uint32(content_key(_text_of(messages, "system")) >> 32)


def near_duplicates(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Which rows to drop, so that of near duplicates the first stays: bool [N] for signatures uint32 [N, H].

    Every dropped row shares at least `threshold` (between 0 and 1) of its hashes with an earlier one. No two kept rows
    do that share a whole band (see `band_width`), unless MAX_COMPARISONS rows of that band precede them. That bound
    keeps the time at N log N for a million rows that begin alike. Memory: 60 bytes per row, without the signatures.
    """
    num_rows, num_hashes = signatures.shape
    width = band_width(threshold, num_hashes)
    is_dropped = np.zeros(num_rows, dtype=bool)
    for start in range(0, num_hashes - width + 1, width):
        keys = _band_keys(signatures[:, start : start + width])
        waiting = np.flatnonzero(~is_dropped)
        waiting = waiting[np.argsort(keys[waiting], kind="stable")]  # bucket by bucket, each in the order of rows
        for _ in range(MAX_COMPARISONS):
            waiting, first = _with_duplicates(waiting, keys[waiting])
            if not len(waiting):
                break
            is_near = _agreement(signatures, waiting, first) >= threshold
            is_dropped[waiting[is_near & (waiting != first)]] = True
            waiting = waiting[~is_near]
    return is_dropped


def band_width(threshold: float, num_hashes: int = NUM_HASHES) -> int:
    """Hashes w per band: the most that find two rows with an overlap of the threshold t nine times in ten.

    Rows are compared if all hashes of one of their H // w bands agree: with probability 1 - (1 - t**w) ** (H // w).

    >>> band_width(0.8)  # 10 bands of 6 hashes: 1 - (1 - 0.262) ** 10 = 0.952
    6
    """
    widths = range(1, num_hashes + 1)
    return max((w for w in widths if 1 - (1 - threshold**w) ** (num_hashes // w) >= 0.9), default=1)


class Contamination:
    """Finds pieces of benchmarks in other texts: runs of words (letters and digits, whatever the case) in common.

    A run that several prompts of one benchmark share is a template and does not count. A prompt without a distinctive
    run of `overlap_words` words, such as a shorter one, counts as a whole.
    """

    def __init__(self, prompts: Mapping[str, Sequence[str]], overlap_words: int):
        self._benchmark_of: dict[tuple[str, ...], str] = {}
        for name, texts in prompts.items():
            self._benchmark_of |= dict.fromkeys(_distinctive_runs(texts, overlap_words), name)
        self._lengths = sorted({len(run) for run in self._benchmark_of})

    def find(self, text: str) -> str | None:
        """Name of a benchmark that a text shares a run of words with, or None."""
        words = _WORD.findall(_plain(text))
        runs = chain.from_iterable(_grams(words, length) for length in self._lengths)
        return next(filter(None, map(self._benchmark_of.get, runs)), None)


def _distinctive_runs(prompts: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Runs of words that occur in one prompt only."""
    distinct = {tuple(_WORD.findall(_plain(prompt))) for prompt in prompts}
    count = Counter(chain.from_iterable(set(_grams(words, length)) for words in distinct))
    for words in distinct:
        own = [run for run in _grams(words, length) if count[run] == 1]
        if own or len(words) >= MIN_WHOLE_WORDS:
            yield from own or [words]


def _band_keys(band: np.ndarray) -> np.ndarray:
    """Numbers, uint64 [N], that are equal where all hashes of a band [N, w] are."""
    keys = np.empty(len(band), dtype=np.uint64)
    for at in range(0, len(band), BLOCK_ROWS):
        keys[at : at + BLOCK_ROWS] = band[at : at + BLOCK_ROWS].astype(np.uint64) @ _BAND_WEIGHTS[: band.shape[1]]
    return keys


def _with_duplicates(rows: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows sorted by key: those that share their key, and for each of them the first row with it."""
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    is_alone = is_first & np.append(is_first[1:], True)
    rows, is_first = rows[~is_alone], is_first[~is_alone]
    return rows, rows[is_first][np.cumsum(is_first) - 1]


def _agreement(signatures: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Share of equal hashes of pairs of rows, float64 [n]."""
    share = np.empty(len(left))
    for at in range(0, len(left), BLOCK_ROWS):
        part = slice(at, at + BLOCK_ROWS)
        share[part] = (signatures[left[part]] == signatures[right[part]]).mean(axis=1)
    return share


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _text_of(messages: Sequence[Mapping[str, str]], role: str) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] == role)


def _grams(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(length)), strict=False)
