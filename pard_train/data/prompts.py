"""Clean prompts from any chats: deduplicated, decontaminated, mixed by weight, and split into training and held-out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from pard_train.config import PrepareConfig, SourceConfig
from pard_train.data.benchmarks import Benchmark, load_benchmark
from pard_train.data.dedupe import (
    NUM_HASHES,
    Contamination,
    content_key,
    first_of_each,
    is_held_out,
    near_duplicates,
    question_text,
    shuffled,
    signature,
)
from pard_train.data.encoding import REJECTS_FILE, map_rows
from pard_train.data.rows import OnBadRow, Rejects, Row, read_rows, source_version, stop
from pard_train.data.schemas import to_chat
from pard_train.data.store import new_array
from pard_train.errors import RowError, UserError
from pard_train.runs import (
    MANIFEST_FILE,
    fingerprint,
    new_folder,
    num_cores,
    provenance,
    read_json,
    require_same,
    write_json,
)

PROMPTS_FOLDER = "prompts"
TRAIN_FILE = "train.jsonl"
HELD_OUT_FOLDER = "held_out"
BENCHMARK_PREFIX = "benchmark:"
ROWS_PER_WORKER = 2000  # fewer are not worth a process

# Outcomes of a row, in the order in which they are decided; the first that applies counts.
DUPLICATE, NEAR_DUPLICATE, CONTAMINATED = "duplicate", "near_duplicate", "contaminated"
HELD_OUT, NOT_DRAWN, TRAIN = "held_out", "not_drawn", "train"
OUTCOMES = (DUPLICATE, NEAR_DUPLICATE, CONTAMINATED, HELD_OUT, NOT_DRAWN, TRAIN)

_CHATS = datasets.Features({"chat": datasets.Value("string"), "source": datasets.Value("string")})
_MEASURES = datasets.Features(
    {
        **_CHATS,
        "key": datasets.Value("uint64"),
        "signature": datasets.List(datasets.Value("uint32")),
        "benchmark": datasets.Value("string"),  # whose prompts the chat shares, or empty
    }
)


def prepare(config: PrepareConfig, folder: Path, *, seed: int) -> tuple[Path, list[Path]]:
    """Write the training prompts to one file and the held-out ones to one per source; return their paths.

    Skips a folder made with the same sources and rules. Raises UserError at a source or row that cannot be read, if
    nothing is left, or if the folder holds other prompts.
    """
    rules = {name: value for name, value in asdict(config).items() if name != "num_workers"}
    versions = {name: _version(source) for name, source in config.sources.items()}
    versions |= {f: load_benchmark(f).fingerprint for f in config.decontaminate if Path(f).is_file()}
    identity = {"seed": seed, "config": rules, "versions": versions}
    if (folder / MANIFEST_FILE).exists():
        made = read_json(folder / MANIFEST_FILE)["identity"]
        require_same(made, identity, what=f"{folder} holds prompts of other sources or settings")
        written = read_json(folder / MANIFEST_FILE)["files"]
        found = {name: source_version(SourceConfig(path=str(folder / name))) for name in written}
        require_same(written, found, what=f"{folder} was changed after it was written", fix="delete the folder")
    else:
        with new_folder(folder) as partial:
            chats, rejected = _read_sources(config, partial)
            benchmarks = [load_benchmark(source) for source in config.decontaminate]
            contamination = contamination_by(benchmarks, config.overlap_words)
            measured = _measure(chats, config, contamination, partial / "compare.arrow")
            order = shuffled(measured.data.column("key").to_numpy(), seed)
            outcomes = _decide(measured, order, config, partial)
            counts = _write_chats(measured, outcomes, order, partial, rejected)
            for scratch in [*partial.glob("*.arrow"), *partial.glob("*.npy")]:
                scratch.unlink()
            files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*.jsonl"))
            manifest = {
                "identity": identity,
                "benchmarks": {b.name: {"prompts": len(b.prompts), "version": b.fingerprint} for b in benchmarks},
                "counts": counts,
                "files": {name: source_version(SourceConfig(path=str(partial / name))) for name in files},
                "made_by": provenance(),
            }
            write_json(partial / MANIFEST_FILE, manifest)
    return folder / TRAIN_FILE, sorted((folder / HELD_OUT_FOLDER).glob("*.jsonl"))


def _version(source: SourceConfig) -> str:
    """Content hash or hub revision."""
    return fingerprint(_benchmark_rows(source)) if _is_benchmark(source) else source_version(source)


def _is_benchmark(source: SourceConfig) -> bool:
    return source.path.startswith(BENCHMARK_PREFIX)


def _benchmark_rows(source: SourceConfig) -> list[Row]:
    """The first turn of every prompt: a follow-up needs the answer before it."""
    prompts = load_benchmark(source.path.removeprefix(BENCHMARK_PREFIX), source.max_rows).prompts
    return [{"messages": list(prompt.turns[0])} for prompt in prompts]


def _read_sources(config: PrepareConfig, folder: Path) -> tuple[datasets.Dataset, dict[str, int]]:
    """Every chat of every source in one schema, stored as JSON, and the rows of each source that were rejected."""
    rejected: dict[str, Rejects] = {}
    used: Counter[str] = Counter()
    path = folder / "chats.arrow"
    with ArrowWriter(path=str(path), features=_CHATS) as writer:
        for name, source in config.sources.items():
            rejected[name] = Rejects(folder / REJECTS_FILE)
            chats = _read_chats(source, rejected[name] if config.bad_rows == "set_aside" else stop)
            for chat in tqdm(chats, desc=f"read {name}", unit=" rows"):
                writer.write({"chat": json.dumps(chat, ensure_ascii=False), "source": name})
                used[name] += 1
            if source.weight is not None and not used[name]:
                raise _no_share(name, rejected[name].summary())
        if not used:
            summaries = "; ".join(f"{name}: {rejects.summary()}" for name, rejects in rejected.items())
            raise UserError(f"prepare.sources have no row that can be used: {summaries}")
        writer.finalize()
    return datasets.Dataset.from_file(str(path)), {name: rejects.num_rows for name, rejects in rejected.items()}


def _no_share(name: str, why: str) -> UserError:
    return UserError(f"prepare.sources.{name} has a weight but no row ({why}): remove the source, or correct its rows")


def _read_chats(source: SourceConfig, on_bad_row: OnBadRow) -> Iterator[dict[str, Any]]:
    if _is_benchmark(source):
        rows: Iterable[tuple[Row, str]] = (
            (row, f"{source.path}[{i}]") for i, row in enumerate(_benchmark_rows(source))
        )
    else:
        rows = read_rows(source, on_bad_row)
    for row, origin in rows:
        try:
            chat = to_chat(row, source, origin)
        except RowError as error:
            on_bad_row(error, json.dumps(row, ensure_ascii=False, default=str))
        else:
            kept = {"messages": chat.messages, "tools": chat.tools, "finish_reason": chat.finish_reason}
            yield {key: value for key, value in kept.items() if value is not None} | {"origin": origin}


def contamination_by(benchmarks: Sequence[Benchmark], overlap_words: int) -> Contamination:
    """Overlap search against the benchmarks' prompts. Each turn is a text of its own: short ones count as a whole."""
    prompts = {b.name: [question_text(list(turn)) for p in b.prompts for turn in p.turns] for b in benchmarks}
    return Contamination(prompts, overlap_words)


def _measure(
    chats: datasets.Dataset, config: PrepareConfig, contamination: Contamination, path: Path
) -> datasets.Dataset:
    """Content key and signature of every chat, and the benchmark it overlaps with."""
    num_workers = min(config.num_workers or num_cores(), max(1, len(chats) // ROWS_PER_WORKER))
    options = {"contamination": contamination, "has_signature": config.near_duplicates < 1}
    return map_rows(chats, _measure_batch, path, _MEASURES, num_workers, **options)


def _measure_batch(batch: dict[str, list], contamination: Contamination, has_signature: bool) -> dict[str, Any]:
    chats = [_asked(json.loads(chat)) for chat in batch["chat"]]
    texts = [question_text(messages) for messages in chats]
    return {
        **batch,
        "key": np.array([content_key(text) for text in texts], dtype=np.uint64),
        "signature": [signature(messages) if has_signature else [] for messages in chats],
        "benchmark": [contamination.find(text) or "" for text in texts],
    }


def _asked(chat: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages of a chat after its tools, as a system prompt: with other tools it is another question."""
    tools = [{"role": "system", "content": json.dumps(chat["tools"], sort_keys=True)}] if "tools" in chat else []
    return tools + chat["messages"]


def _decide(measured: datasets.Dataset, order: np.ndarray, config: PrepareConfig, folder: Path) -> np.ndarray:
    """Outcome of every row, str objects [N]. `order` is a permutation of the rows."""
    keys = measured.data.column("key").to_numpy()
    outcomes = np.full(len(measured), TRAIN, dtype=object)
    is_left = first_of_each(keys)
    outcomes[~is_left] = DUPLICATE
    if config.near_duplicates < 1:
        left = np.flatnonzero(is_left)
        signatures = _signatures(measured, is_left, folder / "signatures.npy")
        outcomes[left[near_duplicates(signatures, config.near_duplicates)]] = NEAR_DUPLICATE
    benchmark = _names(measured, "benchmark")
    is_contaminated = (outcomes == TRAIN) & (benchmark != "")
    outcomes[is_contaminated] = f"{CONTAMINATED}:" + benchmark[is_contaminated]
    outcomes[(outcomes == TRAIN) & is_held_out(keys, config.held_out_fraction)] = HELD_OUT
    outcomes[_not_drawn(outcomes, _names(measured, "source"), order, config)] = NOT_DRAWN
    return outcomes


def _signatures(measured: datasets.Dataset, is_wanted: np.ndarray, path: Path) -> np.ndarray:
    """Signatures of the rows wanted, uint32 [M, NUM_HASHES], in a file: 256 bytes a row, the other columns 100."""
    signatures = new_array(path, np.uint32, (int(is_wanted.sum()), NUM_HASHES))
    row = place = 0
    for chunk in measured.data.column("signature").chunks:
        wanted = chunk.flatten().to_numpy().reshape(-1, NUM_HASHES)[is_wanted[row : row + len(chunk)]]
        signatures[place : place + len(wanted)] = wanted
        row, place = row + len(chunk), place + len(wanted)
    return signatures


def _not_drawn(outcomes: np.ndarray, sources: np.ndarray, order: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Rows that the mix leaves out, int [M]: the last of each source in `order`."""
    candidates = {name: order[((outcomes == TRAIN) & (sources == name))[order]] for name in config.sources}
    available = {name: len(rows) for name, rows in candidates.items()}
    for name, source in config.sources.items():
        if source.weight is not None and not available[name]:
            raise _no_share(name, json.dumps(Counter(outcomes[sources == name].tolist())))
    wanted = mix({name: source.weight for name, source in config.sources.items()}, available, config.num_rows)
    return np.concatenate([rows[wanted[name] :] for name, rows in candidates.items()])


def mix(weights: dict[str, float | None], available: dict[str, int], num_rows: int) -> dict[str, int]:
    """Rows to take of every source: `num_rows` in all, or as many as the shares allow if 0.

    >>> mix({"a": 3.0, "b": 1.0}, {"a": 600, "b": 500}, 0)
    {'a': 600, 'b': 200}

    Weights are relative; None for all takes the sources in proportion to their rows.
    """
    shares = {name: available[name] if weight is None else weight for name, weight in weights.items()}
    scale = min((available[name] / share for name, share in shares.items() if share), default=0.0)
    if num_rows:
        scale = min(scale, num_rows / max(sum(shares.values()), 1e-9))
    exact = {name: scale * share for name, share in shares.items()}
    rows = {name: int(number + 1e-9) for name, number in exact.items()}
    num_left = int(sum(exact.values()) + 1e-9) - sum(rows.values())  # after rounding down, for the largest remainders
    for name in sorted(rows, key=lambda name: rows[name] - exact[name])[:num_left]:
        rows[name] += 1
    return rows


def _write_chats(
    measured: datasets.Dataset, outcomes: np.ndarray, order: np.ndarray, folder: Path, rejected: dict[str, int]
) -> dict[str, dict[str, int]]:
    """Write the files; count rows by source and outcome. `read` is the sum of the other counts."""
    sources, counts = _names(measured, "source"), {}
    (folder / HELD_OUT_FOLDER).mkdir()
    for name, num_rejected in rejected.items():
        found = Counter(outcomes[sources == name].tolist())
        in_order = sorted(found.items(), key=lambda item: OUTCOMES.index(item[0].split(":")[0]))
        counts[name] = {"read": num_rejected + sum(found.values()), "rejected": num_rejected, **dict(in_order)}
        held_out = order[((sources == name) & (outcomes == HELD_OUT))[order]]
        _write_rows(measured, held_out, folder / HELD_OUT_FOLDER / f"{name}.jsonl")
    train = order[(outcomes == TRAIN)[order]]
    if not len(train):
        raise UserError(f"nothing is left to train on: {json.dumps(counts)}")
    _write_rows(measured, train, folder / TRAIN_FILE)
    return counts


def _write_rows(measured: datasets.Dataset, rows: np.ndarray, path: Path) -> None:
    if not len(rows):
        return
    chosen = measured.select_columns(["chat", "source", "key"]).select(rows)
    with path.open("w", encoding="utf-8") as file:
        for row in tqdm(chosen, desc=f"write {path.name}", unit=" rows"):
            chat = json.loads(row["chat"]) | {"id": f"{row['key']:016x}", "source": row["source"]}
            file.write(json.dumps(chat, ensure_ascii=False) + "\n")


def _names(dataset: datasets.Dataset, name: str) -> np.ndarray:
    """A column of few distinct texts, str objects [N] that share memory."""
    codes = dataset.data.column(name).combine_chunks().dictionary_encode()
    return codes.dictionary.to_numpy(zero_copy_only=False)[codes.indices.to_numpy()]
