"""What a draft knows about itself: are its own probabilities its acceptance, and what would stopping early gain?

    python benchmarks/confidence.py --draft outputs/quickstart/export --target pypi:SmolLM2-135M-Instruct \
        --prompts outputs/quickstart/prompts/held_out/*.jsonl --load outputs/load/load.json

Reliability: draft tokens by the draft's own probability of them against the share that the target accepts, position by
position, where all positions before were accepted. Stopping early: each step verifies the draft tokens up to the first
below a threshold. The gain is against the best fixed K, with the times of a step from load.json, where a draft pass is
counted at the K that is verified. Without --load, steps are timed in our decoder, where a draft pass costs the same
whatever is verified; and the table is repeated for a target of 8 times the cost. The gain is an upper bound.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import command, markdown, origin, write_page

from pard_train.acceptance.chains import PackedChains, pack_texts
from pard_train.acceptance.load import StepTimes
from pard_train.acceptance.replay import SLOT_BUDGET
from pard_train.config import Config
from pard_train.data.benchmarks import load_benchmarks
from pard_train.device import default_device, device_name
from pard_train.evaluation.speed import Latencies, measure_latencies
from pard_train.generation.proposers import Drafter
from pard_train.targets.cases import write_case
from pard_train.targets.target import Target

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TARGET_COSTS = (1, 8)  # times the target's own, where our decoder is timed
BINS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


@torch.inference_mode()
def draft_everywhere(
    drafter: Drafter, pairs: Sequence[tuple[list[int], list[int]]], num_draft_tokens: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per answer of N tokens: probabilities of the draft tokens, [N, K], and whether they are the target's, [N, K].

    Positions past the end of the answer have probability 0 and do not match.
    """
    shapes = [(len(answer), num_draft_tokens) for _, answer in pairs]
    probs, matches = [np.zeros(s) for s in shapes], [np.zeros(s, dtype=bool) for s in shapes]
    for texts in pack_texts(pairs, SLOT_BUDGET, None):
        chains = PackedChains(drafter, texts)
        own_probs = np.zeros((len(chains.chain), num_draft_tokens))
        own_matches = np.zeros(own_probs.shape, dtype=bool)
        head = drafter.runner.model.get_output_embeddings()
        hidden: torch.Tensor | None = chains.prefill()
        while hidden is not None:
            parts = [
                drafter.mask_non_tokens(head(chunk)).float().softmax(dim=-1).max(dim=-1) for chunk in hidden.split(512)
            ]
            own_probs[chains.chain, chains.depth] = torch.cat([part.values for part in parts]).cpu()
            own_matches[chains.chain, chains.depth] = (
                torch.cat([part.indices for part in parts]).cpu().numpy() == chains.labels
            )
            everything = np.ones(len(chains.chain), dtype=bool)
            hidden = chains.deepen(everything) if chains.depth + 1 < num_draft_tokens else None
        stops = np.cumsum(chains.lengths)[:-1]
        for text, p, m in zip(texts, np.split(own_probs, stops), np.split(own_matches, stops), strict=True):
            probs[text.number], matches[text.number] = p, m
    return probs, matches


def reliability(probs: np.ndarray, matches: np.ndarray) -> Iterator[list[str]]:
    """Per bin of probability and draft position: share accepted and number of draft tokens. Arrays [anchors, K]."""
    reached = np.cumprod(np.hstack([np.ones((len(matches), 1)), matches[:, :-1]]), axis=1).astype(bool) & (probs > 0)
    positions = [k for k in range(matches.shape[1]) if reached[:, k].sum() >= 30]
    yield ["draft's probability", *(f"position {k + 1}" for k in positions)]
    for low, high in pairwise(BINS):
        cells = []
        for k in positions:
            inside = reached[:, k] & (probs[:, k] > low) & (probs[:, k] <= high)
            cells.append(f"{matches[inside, k].mean():.2f} of {inside.sum()}" if inside.any() else "-")
        yield [f"{low:.1f} to {high:.1f}", *cells]
    errors = [abs(matches[reached[:, k], k].mean() - probs[reached[:, k], k].mean()) for k in positions]
    yield ["mean probability - share accepted", *(f"{error:.2f}" for error in errors)]


@dataclass(frozen=True)
class Steps:
    """Seconds of a step that drafts `most` tokens and verifies some of them."""

    values_of_k: Sequence[int]
    sizes: Sequence[int]
    seconds: Callable[[int, int, int], float]  # of most, verified, batch size


def steps_in_vllm(load: dict[str, Any]) -> Steps:
    """From load.json, which has draft and verification in one figure."""
    stored = load["step_times"]
    seconds = {int(k): {int(b): s for b, s in by_size.items()} for k, by_size in stored["seconds"].items()}
    times = StepTimes(seconds, {int(k): s for k, s in stored["prefill_seconds"].items()}, stored["prefill_tokens"])
    smallest = min(k for k in seconds if k)
    return Steps(
        times.values_of_k, sorted(seconds[0]), lambda most, verified, size: times.step(max(verified, smallest), size)
    )


def steps_in_our_decoder(latencies: dict[int, Latencies], cost: int) -> Steps:
    """From passes of our decoder by batch size; the target's passes take `cost` times as long."""
    ks = sorted(next(iter(latencies.values())).draft_seconds)

    def seconds(most: int, verified: int, size: int) -> float:
        passes = latencies[size]
        verify = {0: passes.ar_seconds, **passes.verify_seconds}
        draft = np.interp(most, ks, [passes.draft_seconds[k] for k in ks])
        return float(draft + cost * np.interp(verified, sorted(verify), [verify[k] for k in sorted(verify)]))

    return Steps(list(range(ks[0], ks[-1] + 1)), sorted(latencies), seconds)


def seconds_per_token(
    probs: Sequence[np.ndarray],
    matches: Sequence[np.ndarray],
    steps: Steps,
    batch_size: int,
    *,
    most: int,
    threshold: float,
) -> float:
    """Seconds per token, where a step verifies at most so many draft tokens, up to the first below a threshold."""
    seconds = tokens = 0.0
    for p, m in zip(probs, matches, strict=True):
        place = 1  # the prefill gives the first token
        while place < len(p):
            is_low = np.flatnonzero(p[place, :most] < threshold)
            verified = int(is_low[0]) if len(is_low) else most
            wrong = np.flatnonzero(~m[place, :verified])
            accepted = int(wrong[0]) if len(wrong) else verified
            seconds += steps.seconds(most, verified, batch_size)
            tokens += accepted + 1
            place += accepted + 1
    return seconds / tokens


def gains(probs: Sequence[np.ndarray], matches: Sequence[np.ndarray], steps: Steps) -> Iterator[list[str]]:
    """The best fixed K and the best threshold at each batch size, the latter chosen on the same answers."""
    yield ["batch size", "best fixed K", "best threshold", "its K at most", "gain at most"]
    for size in steps.sizes:
        cost = {
            (k, t): seconds_per_token(probs, matches, steps, size, most=k, threshold=t)
            for k in steps.values_of_k
            for t in THRESHOLDS
        }
        fixed = min((key for key in cost if key[1] == 0.0), key=cost.__getitem__)
        best = min(cost, key=cost.__getitem__)
        yield [str(size), str(fixed[0]), f"{best[1]:g}", str(best[0]), f"{cost[fixed] / cost[best] - 1:.1%}"]


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--prompts", nargs="+", required=True, help="benchmark names or JSONL files")
    parser.add_argument("--load", type=Path, help="load.json of recipes/load.py, for the times of a step in vLLM")
    parser.add_argument("--num-draft-tokens", type=int, nargs="+", default=[1, 2, 4, 8], help="K timed without --load")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="timed without --load")
    parser.add_argument("--max-prompts", type=int, default=12, help="per benchmark")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--answers", type=Path, default=Path("outputs/confidence"), help="folder of cached answers")
    arguments = parser.parse_args()
    target = Target(arguments.target, Config(targets=[arguments.target]))
    cases = [
        write_case(target, benchmark, arguments.answers, max_new_tokens=arguments.max_new_tokens)
        for benchmark in load_benchmarks(arguments.prompts, arguments.max_prompts)
    ]
    pairs = [(turn.prompt_ids, turn.answer.ids) for case in cases for turn in case.turns]
    drafter = Drafter.load(arguments.draft, dtype=torch.float32, device=default_device())
    if arguments.load:
        load = json.loads(arguments.load.read_text())
        tables = {f"Steps of {load['target']} in vLLM {load['engine_version']}": steps_in_vllm(load)}
    else:
        context, ks, runner = (
            int(np.median([len(p) + len(a) // 2 for p, a in pairs])),
            arguments.num_draft_tokens,
            target.runner(),
        )
        timed = {size: measure_latencies(runner, drafter, ks, size, context) for size in arguments.batch_sizes}
        tables = {
            f"Steps of our decoder on {device_name()}, the target {cost} times its cost": steps_in_our_decoder(
                timed, cost
            )
            for cost in TARGET_COSTS
        }
    target.unload()
    most = max(max(steps.values_of_k) for steps in tables.values())
    probs, matches = draft_everywhere(drafter, pairs, most)
    curve = markdown(reliability(np.concatenate(probs), np.concatenate(matches)))
    gain = "\n\n".join(f"{title}:\n\n{markdown(gains(probs, matches, steps))}" for title, steps in tables.items())
    page = f"""# Confidence of a draft

{len(pairs)} answers of {target.label}, {sum(map(len, probs))} anchors, float32; {origin()}.

`{command()}`

Share accepted by the draft's own probability of its token, where all positions before were accepted:

{curve}

Stopping at the first draft token below a threshold, against the best fixed K. The threshold is chosen on the same
answers, so the gain is an upper bound.

{gain}
"""
    write_page("confidence", page)


if __name__ == "__main__":
    main()
