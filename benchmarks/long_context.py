"""What long documents cost: a training step and a replay by length, with short answers and with long ones.

    python benchmarks/long_context.py                              # two minutes of one core
    python benchmarks/long_context.py --lengths 1024 4096          # shorter

A tiny model with random weights and random tokens, float32 on the CPU. Seconds are those of the processor, which other
programs change little. Prints tables and writes benchmarks/results/DATE-long-context-NAME.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from pages import command, markdown, origin, write_page
from training import peak, reset_peak
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from pard_train.acceptance.replay import replay_all
from pard_train.config import DraftConfig, ObjectiveConfig
from pard_train.core.attention import IMPLEMENTATIONS
from pard_train.core.cpu.products import use_onednn
from pard_train.core.objectives import PackLoss
from pard_train.data.chat import Document
from pard_train.data.packing import Member, PardCollator
from pard_train.device import device_name
from pard_train.generation.proposers import Drafter
from pard_train.layout import DrawKey, slot_bounds, supervised_runs
from pard_train.mask_token import set_draft_keys

ROWS, MASK_TOKEN, K = 4096, 4095, 8
SHORT = 256  # tokens of a short answer
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "num_key_value_heads": 1}
CASES = {  # name -> (tokens of the prompt at a length, most anchors with chains, longest document)
    "long prompt, 256 tokens of answer": (lambda length: length - SHORT, None, 32768),
    "all answer, 1,024 anchors": (lambda length: 1, 1024, 32768),
    "all answer, every anchor": (lambda length: 1, None, 8192),
    "replay": (lambda length: length - SHORT, None, 32768),
}
CPU = torch.device("cpu")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 8192, 16384, 32768])
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--name", default="cpu", help="end of the page's name")
    arguments = parser.parse_args()
    train_step(next(iter(CASES)), 512), replay_once(512)  # the first calls load and choose kernels
    tables: list[str] = []
    for name in arguments.cases:
        longest = CASES[name][2]
        tables += ["", markdown(rows(name, [length for length in arguments.lengths if length <= longest]))]
        write_page(
            f"long-context-{arguments.name}", render(tables)
        )  # so far: a run that is cut off leaves what it has measured


def render(tables: list[str]) -> str:
    """The page."""
    lines = [
        f"# Cost by length of the document, {time.strftime('%Y-%m-%d')}",
        "",
        f"{device_name()}, {torch.get_num_threads()} thread, float32; {origin()}.",
        f"Two layers of {SHAPE['hidden_size']}, {ROWS:,} rows, K = {K}, retention 0.7 to 0.2. A step is one document, "
        "once: its pack, forward, backward, AdamW. Replay computes the acceptance of an answer of 256 tokens after a "
        "prompt that fills the rest. Seconds are those of the processor, since other programs ran. Memory is the "
        "growth of the process's resident memory.",
        "",
        f"    {command()}",
        *tables,
        "",
        "Growth is the power of the length from the row before.",
        "",
    ]
    return "\n".join(lines)


def rows(name: str, lengths: list[int]) -> Iterator[list[str]]:
    """The table of one case, row by row."""
    yield ["what", "tokens", "slots", "slots per token", "seconds", "growth", "peak memory MB", "growth"]
    before: tuple[int, float, float] | None = None
    for length in lengths:
        held = reset_peak(CPU)
        slots, seconds = replay_once(length) if name == "replay" else train_step(name, length)
        memory = max(peak(CPU) - held, 1e5) / 1e6
        powers = ["", ""]
        if before:
            pairs = zip((seconds, memory), before[1:], strict=True)
            powers = [f"{math.log(new / old, length / before[0]):.2f}" for new, old in pairs]
        counts = [f"{slots:,}", f"{slots / length:.2f}"] if slots else ["", ""]
        yield [name, f"{length:,}", *counts, f"{seconds:.2f}", powers[0], f"{memory:,.0f}", powers[1]]
        before = length, seconds, memory


def build_model() -> PreTrainedModel:
    """The tiny draft model, with random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPE, num_hidden_layers=2, vocab_size=ROWS, max_position_embeddings=65536, tie_word_embeddings=True
    )
    set_draft_keys(config, MASK_TOKEN, K)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=IMPLEMENTATIONS["split"])
    use_onednn(model)
    return model


def train_step(name: str, length: int) -> tuple[int, float]:
    """Slots of a step and its seconds, the building of the pack included."""
    prompt, max_anchors, _ = CASES[name]
    draft = DraftConfig(num_draft_tokens=K, max_anchors=max_anchors)
    tokens = np.random.default_rng(0).integers(0, MASK_TOKEN, length)
    document = Document(tokens, np.arange(length) >= prompt(length), "x")
    runs = supervised_runs(document.loss_mask)
    budget = int(slot_bounds(np.array([length]), runs, np.zeros(len(runs), dtype=int), draft)[0])
    collate, model = PardCollator(draft, ObjectiveConfig(), MASK_TOKEN, budget), build_model().train()
    loss_of, optimizer = PackLoss(model, "split", K), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    start = time.process_time()
    batch = collate([[Member(document, DrawKey(0, 0, 0))]])
    loss, _ = loss_of(model, batch, 1 / float(batch["weight"].sum()))
    loss.backward()
    optimizer.step()
    return int((batch["document"] >= 0).sum()), time.process_time() - start


def replay_once(length: int) -> tuple[int, float]:
    """Seconds of the replay of one answer; its slots depend on what is accepted."""
    tokens = np.random.default_rng(0).integers(0, MASK_TOKEN, length).tolist()
    drafter = Drafter(build_model().eval(), range(MASK_TOKEN))  # type: ignore[arg-type]  # its length is all that counts
    start = time.process_time()
    replay_all(drafter, [(tokens[:-SHORT], tokens[-SHORT:])], K)
    return 0, time.process_time() - start


if __name__ == "__main__":
    main()
