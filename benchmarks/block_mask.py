"""FlexAttention's block mask: from the ends of runs, as we build it, and from all pairs, as PyTorch does.

    python benchmarks/block_mask.py                    # a minute on two cores
    python benchmarks/block_mask.py --slots 32768      # 11 GB for PyTorch's way

Packs of documents of 512 tokens, all of them answers, K = 8. Writes benchmarks/results/DATE-block-mask-DEVICE.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from pages import command, markdown, origin, write_page
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from training import peak, reset_peak, wait

from pard_train.config import DraftConfig
from pard_train.core.block_mask import chain_block_mask
from pard_train.device import default_device, device_name
from pard_train.layout import DrawKey, SlotLayout, lay_out_document, sample_chain_lengths

LENGTH = 512
REPEATS = 3


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", nargs="+", type=int, default=[4096, 8192, 16384])
    device = default_device()
    rows = [["slots", "ours: s", "GB", "all pairs: s", "GB", "blocks that are looked at, of all"]]
    for size in parser.parse_args().slots:
        layout = build_layout(size, device)
        ours, seconds, memory = measured(lambda layout=layout: chain_block_mask(layout), device)
        theirs, pair_seconds, pair_memory = measured(lambda mask=ours: from_all_pairs(mask), device)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
        figures = [f"{seconds:.4f}", f"{memory / 1e9:.2f}", f"{pair_seconds:.2f}", f"{pair_memory / 1e9:.2f}"]
        rows.append([f"{size:,}", *figures, f"{1 - ours.sparsity() / 100:.1%}"])
    lines = [
        f"# Block masks, {time.strftime('%Y-%m-%d')}",
        "",
        f"{device_name()}, {torch.get_num_threads()} threads; {origin()}. "
        f"Median of {REPEATS}; peak memory of the first.",
        "",
        f"    {command()}",
        "",
        markdown(rows),
        "",
    ]
    write_page(f"block-mask-{device.type}", "\n".join(lines))


def build_layout(size: int, device: torch.device) -> SlotLayout:
    """A pack of exactly `size` slots, the last document cut."""
    documents: list[SlotLayout] = []
    while sum(map(len, documents)) < size:
        number = len(documents)
        chains = sample_chain_lengths(np.ones(LENGTH, dtype=bool), DraftConfig(), DrawKey(0, 0, number))
        documents.append(lay_out_document(chains, number))
    parts = ([getattr(document, name) for document in documents] for name in ("document", "anchor", "depth"))
    return SlotLayout(*(torch.from_numpy(np.concatenate(part)[:size]).to(device) for part in parts))


def from_all_pairs(mask: BlockMask) -> BlockMask:
    """PyTorch's own way, by the same rule."""
    return create_block_mask(mask.mask_mod, None, None, *mask.seq_lengths, device=mask.kv_indices.device)


def measured(build: Callable[[], BlockMask], device: torch.device) -> tuple[BlockMask, float, float]:
    """The mask, seconds of building it, and bytes at its peak."""
    before = reset_peak(device)
    mask = build()
    memory, times = peak(device) - before, []
    for _ in range(REPEATS):
        wait()
        started = time.perf_counter()
        mask = build()
        wait()
        times.append(time.perf_counter() - started)
    return mask, float(np.median(times)), memory


if __name__ == "__main__":
    main()
