"""What a training set costs: tokens per second and core, memory by number of rows, slots of the packs that are used.

    python benchmarks/data.py                      # about five minutes on two cores
    python benchmarks/data.py --store-rows 100000 1000000 10000000 --encode-rows 10000 100000 1000000 \\
        --prepare-rows 10000 100000 1000000        # an hour, 15 GB of disk

Chats are those that LLaMA-Factory ships as samples (Alpaca and ShareGPT schema, English and Chinese, tool calls,
reasoning). Where more rows are needed they are multiplied, for memory the short ones only: every copy has the words of
its question in another order, so that no two are duplicates. Prints tables and writes benchmarks/results/DATE-data.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from chats import TOKENIZERS, Chat, encoder_of, is_short, multiplied, real_chats, write_chats
from datasets.arrow_writer import ArrowWriter
from memory import Cost, cost_of, growth
from pages import command, markdown, origin, write_page
from torch.utils.data import DataLoader

from pard_train.config import DataConfig, DraftConfig, ObjectiveConfig, PrepareConfig, SourceConfig
from pard_train.data.benchmarks import load_benchmark
from pard_train.data.dedupe import content_key, question_text, signature
from pard_train.data.encoding import DOCUMENTS_FOLDER, encode_corpus
from pard_train.data.packing import PackedDataset, PardCollator
from pard_train.data.prompts import contamination_by, prepare
from pard_train.data.store import TokenStore
from pard_train.layout import PADDING_DOCUMENT
from pard_train.runs import MANIFEST_FILE, num_cores, read_json

NUM_REAL = 6000  # chats, multiplied from all real ones, that tokenization is timed on
NUM_WORKERS = 2
NUM_READ = 400  # packs that are read from a store
SLOT_BUDGET = 16384
DRAFTS = {"K 8, r 0.7, min 0.2": DraftConfig(), "K 16, r 0.7, min 0.1": DraftConfig(16, 0.7, 0.1)}


# ---------------------------------------------------------------------------------------------------------------------
# Tasks, each in a process of its own
# ---------------------------------------------------------------------------------------------------------------------


def encode(chats_file: Path, tokenizer: str, num_workers: int) -> Path:
    """Encode a file of chats. Returns the folder of tokens."""
    datasets.disable_progress_bars()
    folder = chats_file.with_name(f"{chats_file.stem}-{tokenizer}-{num_workers}")
    config = DataConfig(
        source=str(chats_file), max_length=2048, overlong="truncate", bad_rows="set_aside", num_workers=num_workers
    )
    encode_corpus(config, encoder_of(tokenizer), folder)
    return folder


def read(folder: Path) -> dict[str, float]:
    """Plan the packs of four epochs over a store, and have workers read some of them."""
    start = time.perf_counter()
    store = TokenStore.open(folder)
    dataset = PackedDataset(store, store.slot_bounds(DraftConfig()), slot_budget=SLOT_BUDGET, num_epochs=4, seed=0)
    planned = time.perf_counter()
    collate = PardCollator(DraftConfig(), ObjectiveConfig(), 0, SLOT_BUDGET)
    steps = np.random.default_rng(0).integers(len(dataset), size=NUM_READ).tolist()
    for _ in DataLoader(dataset, sampler=steps, collate_fn=collate, num_workers=NUM_WORKERS):
        pass
    speed = NUM_READ * SLOT_BUDGET / (time.perf_counter() - planned) / NUM_WORKERS
    return {"documents": len(store), "packs": len(dataset) / 4, "plan": planned - start, "speed": speed}


def prepare_file(chats_file: Path) -> dict[str, int]:
    """Prepare a file of chats. Returns the count of rows by fate."""
    datasets.disable_progress_bars()
    folder = chats_file.with_name(f"{chats_file.stem}-prompts")
    config = PrepareConfig(sources={"chats": SourceConfig(path=str(chats_file))}, num_workers=NUM_WORKERS)
    prepare(config, folder, seed=0)
    return read_json(folder / MANIFEST_FILE)["counts"]["chats"]


def write_store(folder: Path, sample: Path, num_documents: int) -> int:
    """A store that has the documents of a sample again and again, written by Arrow directly. Returns its bytes."""
    documents = datasets.load_from_disk(str(sample / DOCUMENTS_FOLDER))
    block = documents.data.table.combine_chunks()
    target = folder / DOCUMENTS_FOLDER
    target.mkdir(parents=True)
    path = target / "data-00000-of-00001.arrow"
    with ArrowWriter(path=str(path), features=documents.features) as writer:
        for start in range(0, num_documents, len(block)):
            writer.write_table(pa.Table.from_batches(block.slice(0, num_documents - start).to_batches()))
        writer.finalize()
    for name in (f"{DOCUMENTS_FOLDER}/state.json", f"{DOCUMENTS_FOLDER}/dataset_info.json", MANIFEST_FILE):
        (folder / name).write_text((sample / name).read_text())
    return path.stat().st_size


def use_of_slots(folder: Path, draft: DraftConfig, slot_budget: int, max_length: int) -> tuple[int, float, float]:
    """Packs of one epoch over the documents up to a length, and the shares of their slots planned and drawn."""
    store = TokenStore.open(folder)
    is_short_enough = store.lengths() <= max_length
    bounds = store.slot_bounds(draft)[is_short_enough]
    documents = [store[i] for i in np.flatnonzero(is_short_enough).tolist()]
    dataset = PackedDataset(documents, bounds, slot_budget=slot_budget, num_epochs=1, seed=0)
    collate = PardCollator(draft, ObjectiveConfig(), 0, slot_budget)
    batches = (collate([dataset[i]]) for i in range(len(dataset)))
    used = sum(int((batch["document"] != PADDING_DOCUMENT).sum()) for batch in batches)
    return len(dataset), bounds.sum() / (len(dataset) * slot_budget), used / (len(dataset) * slot_budget)


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def tokenization(chats_file: Path) -> Iterator[list[str]]:
    """Tokens per second and core, and bytes on disk."""
    yield ["tokenizer", "processes", "rows", "tokens", "tokens/s", "tokens/s per core", "bytes per token"]
    for tokenizer in TOKENIZERS:
        for num_workers in sorted({1, num_cores()}):
            folder = cost_of(encode, chats_file, tokenizer, num_workers).result
            manifest = read_json(folder / MANIFEST_FILE)
            counts, speed = manifest["counts"], manifest["speed"]
            size = sum(file.stat().st_size for file in (folder / DOCUMENTS_FOLDER).glob("*.arrow"))
            numbers = [num_workers, counts["rows"], counts["tokens"], speed["tokens_per_second"]]
            numbers.append(speed["tokens_per_second_per_worker"])
            yield [tokenizer, *(f"{number:,}" for number in numbers), f"{size / counts['tokens']:.1f}"]


def packing(chats_file: Path) -> Iterator[list[str]]:
    """Share of the slots that documents fill, as planned and as drawn."""
    yield ["tokenizer", "COD", "slots of a pack", "longest document", "packs", "planned", "drawn"]
    for tokenizer in TOKENIZERS:
        folder = cost_of(encode, chats_file, tokenizer, 1).result
        for name, draft in DRAFTS.items():
            for slot_budget, max_length in ((4096, 512), (16384, 512), (16384, 2048)):
                packs, planned, drawn = use_of_slots(folder, draft, slot_budget, max_length)
                sizes = [f"{slot_budget:,}", f"{max_length:,}", f"{packs:,}"]
                yield [tokenizer, name, *sizes, f"{planned:.2%}", f"{drawn:.2%}"]


def encoding_memory(work: Path, chats: Sequence[Chat], numbers: Sequence[int]) -> Iterator[list[str]]:
    """Memory of encode.py by rows."""
    yield ["rows", "tokens", "seconds", "main process MB", "worker MB"]
    costs = []
    for number in numbers:
        costs.append(cost_of(encode, write_chats(multiplied(chats, number), work / f"e{number}.jsonl"), "SmolLM2", 2))
        tokens = read_json(costs[-1].result / MANIFEST_FILE)["counts"]["tokens"]
        yield [f"{number:,}", f"{tokens:,}", *_seconds_and_memory(costs[-1])]
    yield ["growth", "", "", *_growth(numbers, costs)]


def reading_memory(work: Path, chats_file: Path, numbers: Sequence[int]) -> Iterator[list[str]]:
    """Memory of a training process and of its loader's workers by documents, four epochs planned."""
    yield ["documents", "GB on disk", "seconds to plan", "slots/s per worker", "main process MB", "worker MB"]
    sample, costs = cost_of(encode, chats_file, "SmolLM2", 1).result, []
    for number in numbers:
        folder = work / f"store{number}"
        size = write_store(folder, sample, number)
        costs.append(cost_of(read, folder))
        result = costs[-1].result
        speeds = [f"{result['plan']:.1f}", f"{result['speed']:,.0f}"]
        yield [f"{number:,}", f"{size / 1e9:.2f}", *speeds, *_seconds_and_memory(costs[-1])[1:]]
        (folder / DOCUMENTS_FOLDER / "data-00000-of-00001.arrow").unlink()
    yield ["growth", "", "", "", *_growth(numbers, costs)]


def preparing(work: Path, chats: Sequence[Chat], numbers: Sequence[int]) -> Iterator[list[str]]:
    """Time and memory of prepare.py by rows."""
    yield ["rows", "left out", "rows/s", "seconds", "main process MB", "worker MB"]
    costs = []
    for number in numbers:
        costs.append(cost_of(prepare_file, write_chats(multiplied(chats, number), work / f"p{number}.jsonl")))
        left_out = number - costs[-1].result["train"] - costs[-1].result.get("held_out", 0)
        speed = f"{number / costs[-1].seconds:,.0f}"
        yield [f"{number:,}", f"{left_out:,}", speed, *_seconds_and_memory(costs[-1])]
    yield ["growth", "", "", "", *_growth(numbers, costs)]


def comparing(chats: Sequence[Chat]) -> Iterator[list[str]]:
    """Microseconds that one core takes to compare a chat."""
    benchmarks = [load_benchmark(name) for name in PrepareConfig().decontaminate]
    contamination = contamination_by(benchmarks, PrepareConfig().overlap_words)
    texts = [question_text(chat["messages"]) for chat in chats]
    yield ["step", "microseconds a row"]
    steps: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
        "content key (equal questions)": (content_key, texts),
        "signature (near duplicates)": (signature, [chat["messages"] for chat in chats]),
        f"contamination by {', '.join(benchmark.name for benchmark in benchmarks)}": (contamination.find, texts),
    }
    for name, (step, values) in steps.items():
        start = time.process_time()
        for value in values:
            step(value)
        yield [name, f"{(time.process_time() - start) / len(values) * 1e6:,.0f}"]


def _seconds_and_memory(cost: Cost) -> list[str]:
    return [f"{cost.seconds:,.0f}", f"{cost.main:,.0f}", f"{cost.worker:,.0f}"]


def _growth(numbers: Sequence[int], costs: Sequence[Cost]) -> list[str]:
    return [growth(numbers, [cost.main for cost in costs]), growth(numbers, [cost.worker for cost in costs])]


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return f"{processor}, {num_cores()} cores, {memory:.0f} GB"


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encode-rows", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--store-rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--prepare-rows", type=int, nargs="+", default=[5_000, 20_000, 80_000])
    parser.add_argument("--work", default=None, help="folder for files in between; its disk must hold them")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process, or nothing is per core
    chats = real_chats()
    short = [chat for chat in chats if is_short(chat)]
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        real = write_chats(iter(chats), work / "real.jsonl")
        many = write_chats(multiplied(chats, NUM_REAL), work / "many.jsonl")
        few = write_chats(iter(short), work / "short.jsonl")
        sections = {
            f"Tokenization: {NUM_REAL:,} chats, reading and writing included": tokenization(many),
            f"Packing: {len(chats):,} real chats, one epoch": packing(real),
            "Memory while encoding, by rows": encoding_memory(work, short, arguments.encode_rows),
            "Memory while training, by documents": reading_memory(work, few, arguments.store_rows),
            "Preparing, by rows": preparing(work, short, arguments.prepare_rows),
            f"Comparing {len(chats):,} real chats": comparing(chats),
        }
        page = ["# Data at scale", "", f"{time.strftime('%Y-%m-%d')}, {machine()}."]
        for title, rows in sections.items():
            print(f"\n{title}")
            page += ["", f"## {title}", "", markdown(rows)]
    page += ["", "## Made by", "", f"`{command()}`; {origin()}."]
    write_page("data", "\n".join(page) + "\n")


if __name__ == "__main__":
    main()
