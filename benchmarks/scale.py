"""Memory, traffic and step time of training on 1 to 512 GPUs, by arithmetic, beside DeepSpeed's own estimators.

    python benchmarks/scale.py page=docs/explanation/scale.md

Prints the tables of the page, and writes them into it. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

WEIGHTS = 494_032_768  # Qwen2.5-0.5B, tied head
LARGEST_LAYER = 896 * 151_936  # its embedding
PACK_FLOPS = 48.6e12  # of a pack of 16,384 slots, K = 8 (docs/explanation/speed.md)
RATE = 0.4 * 989.5e12  # FLOP/s that are reached of an H100's peak: an assumption
NODE, INSIDE, BETWEEN = 8, 450e9, 50e9  # GPUs of a node; bytes/s per GPU and direction: NVLink, a 400 Gbit/s adapter
GPUS = (1, 8, 64, 512)
MODES = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def memory(mode: str, num_gpus: int) -> float:
    """Bytes of weights, gradients and optimizer states on one GPU.

    DDP keeps float32 weights (autocast): 4 weights, 4 gradients, 4 in buckets, 8 states. DeepSpeed with bf16 keeps 2
    weights, 2 gradients, and for the optimizer 4 weights, 4 gradients, 8 states. A stage shards what the one before
    shards, and: (1) the optimizer's, (2) gradients, (3) weights, of which the largest layer is gathered.
    """
    n = num_gpus
    parts = {
        "DDP": 16 + (4 if n > 1 else 0),
        "ZeRO-1": 2 + 2 + 16 / n,
        "ZeRO-2": 2 + 18 / n,
        "ZeRO-3": 20 / n,
    }
    return parts[mode] * WEIGHTS + (2 * LARGEST_LAYER if mode == "ZeRO-3" else 0)


def traffic(mode: str, num_gpus: int) -> float:
    """Bytes that one GPU sends per step, with rings: (n - 1) / n of the weights for each pass over them."""
    bytes_per_weight = {"DDP": 2 * 4, "ZeRO-1": 2 * 2, "ZeRO-2": 2 * 2, "ZeRO-3": 3 * 2}[mode]
    return bytes_per_weight * WEIGHTS * (num_gpus - 1) / num_gpus


def step_seconds(mode: str, num_gpus: int) -> tuple[float, float]:
    """Seconds of computing one pack, and of the traffic. The slowest link of a ring bounds it."""
    return PACK_FLOPS / RATE, traffic(mode, num_gpus) / (INSIDE if num_gpus <= NODE else BETWEEN)


def estimated(mode: str, num_gpus: int) -> float | None:
    """What DeepSpeed's estimators say of one GPU without offloading."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as stage2

    node, nodes = min(num_gpus, NODE), max(1, num_gpus // NODE)
    if mode == "ZeRO-2":
        return stage2(WEIGHTS, node, nodes, cpu_offload=False)[1]
    if mode == "ZeRO-3":
        return stage3(WEIGHTS, LARGEST_LAYER, node, nodes, cpu_offload=False, cpu_offload_params=False)[1]
    return None


def table() -> list[str]:
    """Rows of the page."""
    heads = [
        "GPUs",
        "mode",
        "memory, GB",
        "DeepSpeed's estimator, GB",
        "sent per step, GB",
        "computing, s",
        "sending, s",
        "share",
    ]
    rows = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for num_gpus in GPUS:
        for mode in MODES:
            theirs = estimated(mode, num_gpus)
            computing, sending = step_seconds(mode, num_gpus)
            cells = [
                f"{num_gpus}",
                mode,
                f"{memory(mode, num_gpus) / 1e9:.2f}",
                f"{theirs / 1e9:.2f}" if theirs else "none",
            ]
            cells += [f"{traffic(mode, num_gpus) / 1e9:.2f}", f"{computing:.3f}", f"{sending:.3f}"]
            rows.append("| " + " | ".join([*cells, f"{computing / (computing + sending):.0%}"]) + " |")
    return rows


def main() -> None:
    """Print the table, and write it into the page."""
    rows = "\n".join(table())
    print(rows)
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    if "page" in given:
        page = Path(given["page"])
        page.write_text(re.sub(r"\| GPUs \| mode .*?\n\n", lambda _: rows + "\n\n", page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
