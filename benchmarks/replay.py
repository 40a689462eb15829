"""How fast replay is, and how exact: against live decoding, and against a replay without its ideas.

    python benchmarks/replay.py                             # SmolLM2-135M as draft and target, CPU or GPU, float32
    python benchmarks/replay.py --dtype bfloat16            # with the disagreement between replay and live decoding
    python benchmarks/replay.py --draft outputs/my-draft/draft --target Qwen/Qwen2.5-7B-Instruct --prompts 32

Prints a table and writes benchmarks/results/DATE-replay-DEVICE-DTYPE.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import command, origin, write_page
from transformers import PreTrainedModel

from pard_train.acceptance.chains import PromptAnswer
from pard_train.acceptance.counting import Trace, pool, walk
from pard_train.acceptance.replay import choose_tokens, replay_all
from pard_train.config import DraftConfig, ModelConfig
from pard_train.data.benchmarks import load_benchmark
from pard_train.data.chat import ChatEncoder
from pard_train.device import default_device, device_name
from pard_train.downloads import local_model
from pard_train.generation.decoding import Decoded, Limits, decode, decode_batch, end_ids_of
from pard_train.generation.proposers import Drafter
from pard_train.generation.runner import Runner
from pard_train.layout import SlotLayout, is_visible, lay_out_document, slot_tokens
from pard_train.model import DTYPES, inspect_base, load_causal_lm, load_tokenizer, write_initial_draft


@dataclass(frozen=True)
class Row:
    """One way to get at the acceptance of the same answers."""

    name: str
    seconds: float
    slots: int  # rows that went through the draft model
    traces: list[Trace]  # of the answers
    num_own_texts: int  # answers that are the target's own, token for token


def main() -> None:
    """Measure, print and write."""
    arguments = parse()
    device, dtype = default_device(), DTYPES[arguments.dtype]
    target_path = local_model(arguments.target)
    target, tokenizer = load_causal_lm(target_path, dtype=dtype).to(device).eval(), load_tokenizer(target_path)
    drafter = load_drafter(arguments.draft, target_path, dtype, device)
    limits = Limits(arguments.tokens, end_ids_of(target_path, tokenizer))
    encoder = ChatEncoder(tokenizer)
    prompts = [
        encoder.encode_prompt(list(prompt.turns[0]))
        for name in arguments.benchmarks
        for prompt in load_benchmark(name, -(-arguments.prompts // len(arguments.benchmarks))).prompts
    ][: arguments.prompts]
    runner = Runner(target)
    assert drafter.runner  # prepare both before timing
    texts, seconds = timed(lambda: decode_batch(runner, prompts, limits))
    print(f"{len(prompts)} answers written in {seconds:.1f} s", flush=True)
    pairs = [(prompt, text.tokens) for prompt, text in zip(prompts, texts, strict=True)]
    rows = measure(drafter, runner, pairs, limits, arguments)
    page = render(rows, pairs, arguments, seconds)
    print(page)
    write_page(f"replay-{device.type}-{arguments.dtype}", page, figures(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", help="draft folder; without one, the target with an untrained mask token")
    parser.add_argument("--target", default="pypi:SmolLM2-135M-Instruct")
    parser.add_argument("--benchmarks", nargs="+", default=["humaneval", "gsm8k", "mt-bench"])
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96, help="of each answer at most")
    parser.add_argument("--k", type=int, default=8, help="draft tokens per step")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="of everything but live decoding; the median counts")
    return parser.parse_args()


def load_drafter(path: str | None, target_path: str, dtype: torch.dtype, device: torch.device) -> Drafter:
    """The draft given, or an untrained one."""
    if path is not None:
        return Drafter.load(path, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "draft"
        write_initial_draft(inspect_base(ModelConfig(path=target_path), DraftConfig()), 8, made)
        return Drafter.load(str(made), dtype=dtype, device=device)


def measure(
    drafter: Drafter, runner: Runner, pairs: Sequence[PromptAnswer], limits: Limits, arguments: argparse.Namespace
) -> list[Row]:
    """Every way in turn, on the same answers."""
    k, rounds = arguments.k, arguments.rounds
    live, seconds = timed(
        lambda: [
            Decoded(list(decode(runner, prompt, limits, drafter=drafter, num_draft_tokens=k))) for prompt, _ in pairs
        ]
    )
    traces = [Trace(answer.accepted, len(answer.tokens)) for answer in live]
    num_masks = (k - 1) * sum(len(trace.accepted) for trace in traces)
    num_text = sum(len(prompt) + trace.num_tokens - 1 for (prompt, _), trace in zip(pairs, traces, strict=True))
    num_own_texts = sum(answer.tokens == text for answer, (_, text) in zip(live, pairs, strict=True))
    rows = [Row("live decoding", seconds, num_text + num_masks, traces, num_own_texts)]
    naive_model = Runner(drafter.model).model  # with the same packed weights
    naive_model.set_attn_implementation("sdpa")

    def add(name: str, run: Callable[[], tuple[list[np.ndarray], int]]) -> None:
        results = [timed(run) for _ in range(rounds)]
        (matches, slots), _ = results[0]
        median = float(np.median([seconds for _, seconds in results]))
        rows.append(Row(name, median, slots, [walk(m.tolist(), k) for m in matches], len(pairs)))

    def one_by_one() -> tuple[list[np.ndarray], int]:
        with counted_rows(drafter) as rows:
            return [replay_all(drafter, [pair], k)[0] for pair in pairs], sum(rows)

    def packed(pairs: Sequence[PromptAnswer] = pairs) -> tuple[list[np.ndarray], int]:
        with counted_rows(drafter) as rows:
            return replay_all(drafter, pairs, k), sum(rows)

    add("naive replay: every chain to full depth, dense mask", lambda: naive_replay(drafter, naive_model, pairs, k))
    add("replay, one answer at a time", one_by_one)
    add("replay, packed", packed)
    written_live = [(prompt, answer.tokens) for (prompt, _), answer in zip(pairs, live, strict=True)]
    add("replay, packed, of the texts that live decoding wrote", lambda: packed(written_live))
    return rows


@contextmanager
def counted_rows(drafter: Drafter) -> Iterator[list[int]]:
    """Rows of every forward pass of the draft model within the context."""
    rows: list[int] = []
    handle = drafter.runner.model.base_model.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    try:
        yield rows
    finally:
        handle.remove()


@torch.inference_mode()
def naive_replay(
    drafter: Drafter, model: PreTrainedModel, pairs: Sequence[PromptAnswer], num_draft_tokens: int
) -> tuple[list[np.ndarray], int]:
    """All anchors, all depths, in one forward pass per answer with one dense mask: (matches, slots)."""
    found, num_slots = [], 0
    for prompt, answer in pairs:
        ids = np.array(prompt + answer)
        lengths = np.where(np.arange(len(ids)) >= len(prompt) - 1, num_draft_tokens - 1, 0)
        lengths = np.minimum(lengths, np.maximum(len(ids) - 2 - np.arange(len(ids)), 0))
        layout = lay_out_document(lengths)
        parts = (layout.document, layout.anchor, layout.depth)
        on_device = SlotLayout(*(torch.from_numpy(part).to(model.device) for part in parts))
        slots = torch.from_numpy(slot_tokens(layout, ids, drafter.mask_token_id)).to(model.device)
        hidden = model.base_model(
            slots[None],
            position_ids=on_device.position[None],
            attention_mask=is_visible(on_device, on_device)[None, None],
            use_cache=False,
        ).last_hidden_state[0]
        is_asked = (layout.anchor >= len(prompt) - 1) & (layout.position + 1 < len(ids))
        asked = layout[is_asked]
        is_match = choose_tokens(drafter, hidden[torch.from_numpy(is_asked)]) == ids[asked.position + 1]
        table = np.zeros((len(answer), num_draft_tokens), dtype=bool)
        table[asked.anchor - len(prompt) + 1, asked.depth] = is_match
        found.append(table.cumprod(axis=1).sum(axis=1))
        num_slots += len(layout)
    return found, num_slots


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds."""
    _wait()
    started = time.perf_counter()
    result = run()
    _wait()
    return result, time.perf_counter() - started


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def render(rows: Sequence[Row], pairs: Sequence[PromptAnswer], arguments: argparse.Namespace, writing: float) -> str:
    """The page."""
    live, packed, of_live_texts = rows[0], rows[-2], rows[-1]
    num_tokens = sum(len(answer) for _, answer in pairs)
    num_prompt = sum(len(prompt) for prompt, _ in pairs)
    tau = num_tokens / sum(len(trace.accepted) for trace in packed.traces)
    draft = arguments.draft or "the same with an untrained mask token"
    lines = [
        f"# Replay against live decoding, {time.strftime('%Y-%m-%d')}",
        "",
        f"{device_name()}, {torch.get_num_threads()} threads, {arguments.dtype}; {origin()}.",
        f"Target {arguments.target}, draft {draft}, K = {arguments.k}; "
        f"{len(pairs)} prompts of {', '.join(arguments.benchmarks)}: {num_prompt:,} prompt tokens, n = {num_tokens:,} "
        f"answer tokens, tau {tau:.3f}, n * tau = {num_tokens * tau:,.0f}.",
        "",
        f"    {command()}",
        "",
        "| way | seconds | times faster than live | slots | (slots - prompt tokens) / (n * tau) | steps as live |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.name} | {row.seconds:.2f} | {live.seconds / row.seconds:.1f} | {row.slots:,} | "
            f"{(row.slots - num_prompt) / (num_tokens * tau):.2f} | {agreement(row, live)} |"
            for row in rows
        ),
        "",
        f"The target wrote its answers in {writing:.1f} s, once for all drafts, all K and all later replays. Live "
        "decoding runs draft and target for one K; the replays give every K up to this one. Slots of live decoding are "
        "those of the draft. Texts that begin alike share the slots of what they share, so a packed replay may use "
        "fewer slots than there are prompt tokens.",
        "",
        disagreement(packed, of_live_texts, live, arguments.k),
        "",
    ]
    return "\n".join(lines)


def figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Seconds of every way, and how much faster than live decoding the packed replay is."""
    live, packed = rows[0], rows[-2]
    return {"speedup": live.seconds / packed.seconds, "seconds": {row.name: row.seconds for row in rows}}


def agreement(row: Row, live: Row) -> str:
    """Answers with the very same steps."""
    return f"{sum(a == b for a, b in zip(row.traces, live.traces, strict=True))} of {len(live.traces)} answers"


def disagreement(packed: Row, of_live_texts: Row, live: Row, k: int) -> str:
    """How far replay and live decoding are from each other, on the target's texts and on those that live wrote."""
    own, same_texts, tau = (pool(row.traces, k).tau for row in (packed, of_live_texts, live))
    num_agreeing = sum(
        next(
            (i for i, (a, b) in enumerate(zip(ours.accepted, theirs.accepted, strict=False)) if a != b),
            len(ours.accepted),
        )
        for ours, theirs in zip(of_live_texts.traces, live.traces, strict=True)
    )
    num_steps = sum(len(trace.accepted) for trace in live.traces)
    return (
        f"Live decoding gave the target's own text in {live.num_own_texts} of {len(live.traces)} answers; "
        f"tau is {tau:.4f} live and {own:.4f} by replay of the target's texts, {abs(own / tau - 1):.2%} apart. On the "
        f"texts that live decoding wrote, replay gives {same_texts:.4f}, {abs(same_texts / tau - 1):.2%} apart, and "
        f"{num_agreeing:,} of {num_steps:,} steps come before the first that differs in its answer."
    )


if __name__ == "__main__":
    main()
