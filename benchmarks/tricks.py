"""Trains a draft as recipes/train.py does, with changes to its steps that no recipe has: what are they worth?

    python benchmarks/tricks.py --mask-rate 100 experiment=quickstart cod=pard output_dir=outputs/tricks/mask-rate \\
        data.source=outputs/quickstart/answers/answers.jsonl trainer.max_steps=60 monitor.every_steps=0
    python recipes/evaluate.py ... drafts.mask_rate=outputs/tricks/mask-rate/draft ...

Settings are those of recipes/train.py. Resume is not for these runs: a checkpoint does not hold what a trick remembers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pard_train.acceptance.counting import walk
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, DraftConfig
from pard_train.data import packing
from pard_train.data.chat import Document
from pard_train.device import default_device
from pard_train.generation.proposers import Drafter
from pard_train.layout import DrawKey, chain_limits, count_at_depth, supervised_runs
from pard_train.mask_token import required_mask_token_of
from pard_train.model import load_causal_lm, write_model_folder
from pard_train.program import hydra_program
from pard_train.training.callbacks import UsesTrainer
from pard_train.training.trainer import DRAFT_FOLDER, INITIAL_FOLDER, train
from pard_train.validation import validate_train

WARMUP_OF_AVERAGE = 10  # steps in which an average over the last steps forgets faster
MUON_MOMENTUM = 0.9


def parse() -> tuple[argparse.Namespace, list[str]]:
    """Tricks, and the settings of the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask-rate", type=float, default=1.0, help="times the learning rate for the mask row")
    parser.add_argument("--mask-alone", type=int, default=0, help="first steps in which only the mask row learns")
    parser.add_argument("--layer-decay", type=float, default=1.0, help="of the learning rate, from a layer to the next")
    parser.add_argument("--first-weight", type=float, default=1.0, help="times the weight of depth 0")
    parser.add_argument("--starts-of", help="draft: anchors at which it starts drafting get chains more often")
    parser.add_argument("--starts-weight", type=float, default=3.0, help="how much more often")
    parser.add_argument("--muon", action="store_true", help="Muon for the matrices of the layers")
    parser.add_argument("--average", type=float, default=0.0, help="decay of an average over steps; writes average/")
    parser.add_argument("--mix", type=float, nargs="*", default=[], help="shares of the draft in mixes with its start")
    return parser.parse_known_args()


class Tricks(UsesTrainer):
    """Changes steps that the optimizer took. It sees a step before and after, so it works with any optimizer."""

    def __init__(self, chosen: argparse.Namespace, config: Config):
        self.chosen, self.folder = chosen, Path(config.output_dir)
        self.num_draft_tokens = config.draft.num_draft_tokens
        self.before = self.average = dict[str, Tensor]()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "trainer":  # before it makes its optimizer and its batches
            if self.chosen.muon:
                value.optimizer = MuonAndAdamW(value.model, value.args)
            if self.chosen.starts_of:
                dataset, draft = value.train_dataset, self.chosen.starts_of
                weights = start_weights(dataset.documents, draft, self.num_draft_tokens, self.chosen.starts_weight)
                packing.sample_chain_lengths = partial(sample_weighted, weights)
            value.data_collator = partial(weigh_first, value.data_collator, self.chosen.first_weight)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Remember the weights."""
        model = self.trainer.model
        self.mask, self.embeddings = required_mask_token_of(model.config), model.get_input_embeddings().weight
        self.rates = dict(layer_rates(model.named_parameters(), self.chosen.layer_decay))
        self.average = copy_of(model)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Remember the weights before a step."""
        self.before = copy_of(self.trainer.model)

    @torch.no_grad()
    def on_optimizer_step(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Change the step."""
        chosen, step = self.chosen, state.global_step
        for name, weight in self.trainer.model.named_parameters():
            old = self.before[name]
            row = old[self.mask] + (weight[self.mask] - old[self.mask]) * chosen.mask_rate
            weight.copy_(old if step < chosen.mask_alone else old.lerp(weight, self.rates[name]))
            if weight is self.embeddings:
                weight[self.mask] = row
            self.average[name].lerp_(weight, 1 - min(chosen.average, (step + 1) / (step + WARMUP_OF_AVERAGE)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Write the average."""
        if self.chosen.average:
            write(self.folder, "average", self.average)


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights by name."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def layer_rates(named: Iterable[tuple[str, nn.Parameter]], decay: float) -> Iterable[tuple[str, float]]:
    """Share of its step that each weight takes: 1 for the last layer and the norm after it, least for embeddings."""
    names = [name for name, _ in named]
    layers = {name: int(name.split(".layers.")[1].split(".")[0]) for name in names if ".layers." in name}
    last = max(layers.values())
    for name in names:
        below = last - layers.get(name, -1 if "embed" in name else last)
        yield name, decay**below


def weigh_first(collate: Any, factor: float, packs: list[Any]) -> dict[str, Tensor]:
    """A batch in which slots of depth 0 weigh more."""
    batch = collate(packs)
    batch["weight"] = torch.where(batch["depth"] == 0, batch["weight"] * factor, batch["weight"])
    return batch


def start_weights(documents: Sequence[Document], draft: str, num_draft_tokens: int, weight: float) -> list[np.ndarray]:
    """Weight of every token as an anchor, float64 [L] a document: `weight` where `draft` starts a chain when it serves.

    Chains start at the first token of an answer and after each target pass: most often where the last one broke.
    """
    drafter = Drafter.load(draft, dtype=torch.float32, device=default_device())
    spans = [(number, *run) for number, d in enumerate(documents) for run in supervised_runs(d.loss_mask).tolist()]
    texts = [document.input_ids.tolist() for document in documents]
    pairs = [(texts[number][:start], texts[number][start:stop]) for number, start, stop in spans]
    weights = [np.ones(len(document.input_ids)) for document in documents]
    found = replay_all(drafter, pairs, num_draft_tokens, description="replay of the training answers")
    for (number, start, _), matches in zip(spans, found, strict=True):
        steps = np.array(walk(matches.tolist(), num_draft_tokens).accepted) + 1
        weights[number][start - 1 + np.cumsum(steps) - steps] = weight
    return weights


def sample_weighted(weights: list[np.ndarray], loss_mask: np.ndarray, draft: DraftConfig, key: DrawKey) -> np.ndarray:
    """A draw of `layout.sample_chain_lengths` whose permutation favours heavy anchors (Efraimidis and Spirakis)."""
    limits = chain_limits(loss_mask, draft.num_draft_tokens)
    eligible = np.flatnonzero(limits >= 0)
    times = np.random.default_rng([key.seed, key.epoch, key.example]).exponential(size=len(eligible))
    kept = eligible[np.argsort(times / weights[key.example][eligible])]
    lengths = np.zeros(len(loss_mask), dtype=np.int64)
    for depth in range(1, draft.num_draft_tokens):
        kept = kept[limits[kept] >= depth][: count_at_depth(len(eligible), depth, draft)]
        lengths[kept] = depth
    return lengths


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the layers, AdamW for all else, as one optimizer with one schedule."""

    def __init__(self, model: nn.Module, args: Any):
        matrices = {name for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name}
        own, rest = ([w for n, w in model.named_parameters() if (n in matrices) is is_in] for is_in in (True, False))
        rate, betas = args.learning_rate, (args.adam_beta1, args.adam_beta2)
        self.parts = [
            torch.optim.Muon(
                own, lr=rate, weight_decay=0.0, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw"
            ),  # a step as large as one of AdamW
            torch.optim.AdamW(rest, lr=rate, betas=betas, weight_decay=0.0, fused=True),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # the same objects

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """A step of both."""
        for part in self.parts:
            part.step()


def write(folder: Path, name: str, weights: dict[str, Tensor]) -> None:
    """A draft folder with these weights."""
    model = load_causal_lm(str(folder / INITIAL_FOLDER), dtype=torch.float32)
    model.load_state_dict(weights, strict=False)  # a tied head is not among them
    write_model_folder(model, str(folder / INITIAL_FOLDER), folder / name)


def run(chosen: argparse.Namespace, config: Config) -> None:
    """Train, and mix."""
    draft = train(config, [Tricks(chosen, config)])
    start, end = (
        copy_of(load_causal_lm(str(draft.parent / f), dtype=torch.float32)) for f in (INITIAL_FOLDER, DRAFT_FOLDER)
    )
    for share in chosen.mix:
        write(draft.parent, f"mix-{share}", {name: start[name].lerp(end[name], share) for name in start})


if __name__ == "__main__":
    tricks, sys.argv[1:] = parse()

    def _run(config: Config) -> None:
        run(tricks, config)

    hydra_program("train", validate_train, _run)
