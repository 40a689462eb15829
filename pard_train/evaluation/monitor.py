"""Acceptance while training runs: replay of the targets' cached text every N steps, and the best draft kept.

The targets write their greedy text before training starts, once for all runs with these settings. Each measurement
replays it on a copy of the model in the dtype that recipes/evaluate.py would use, so its figures are those of an
evaluation of that very draft, and nothing of the training (weights, random numbers, attention) is touched.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pard_train.acceptance.counting import walk
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, MonitorConfig
from pard_train.data.benchmarks import load_benchmarks
from pard_train.downloads import cache_folder
from pard_train.errors import UserError
from pard_train.generation.proposers import Drafter
from pard_train.model import DTYPES, check_same_tokenizer, load_config, load_tokenizer
from pard_train.runs import fingerprint, read_json, write_json
from pard_train.targets.cases import Case, write_case
from pard_train.targets.target import load_targets
from pard_train.training.checkpoints import BEST_FILE, BEST_FOLDER
from pard_train.training.trainer import PardTrainer, UsesTrainer, check_output


def build_monitor(config: Config) -> list[TrainerCallback]:
    """The callback that measures acceptance, or nothing where monitor.every_steps is 0.

    Has the targets write what the cache lacks; of several processes the first does and the others wait for it.

    Raises:
        UserError: if the output folder is taken, or a target does not fit the model, before any target is loaded.
    """
    if not config.monitor.every_steps:
        return []
    check_output(config)
    monitor, model = config.monitor, config.model
    benchmarks = load_benchmarks(config.evaluate.benchmarks, monitor.max_prompts)
    targets = load_targets(config)
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code, revision=model.revision)
    for target in targets:
        check_same_tokenizer(tokenizer, target.tokenizer, model.path, target.name)
        load_config(target.name, trust_remote_code=model.trust_remote_code)
    cases = []
    cache_folder().mkdir(parents=True, exist_ok=True)
    limit, system = monitor.max_new_tokens, config.evaluate.system_prompt
    with FileLock(cache_folder() / "target_text.lock"), _accelerator_of_this_rank():
        for target in targets:
            cases += [
                write_case(target, benchmark, cache_folder(), max_new_tokens=limit, system_prompt=system)
                for benchmark in benchmarks
            ]
            target.unload()
    return [
        AcceptanceMonitor(
            cases,
            monitor,
            Path(config.output_dir),
            num_draft_tokens=config.draft.num_draft_tokens,
            dtype=DTYPES[targets[0].dtype],
        )
    ]


@contextmanager
def _accelerator_of_this_rank() -> Iterator[None]:
    """Work on the accelerator that this rank will train on, and leave its memory free."""
    is_there = torch.accelerator.is_available()
    if is_there and "LOCAL_RANK" in os.environ:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    yield
    if is_there:
        torch.accelerator.empty_cache()


@dataclass(frozen=True)
class Measurement:
    """Acceptance of the draft at one step.

    Attributes:
        step: optimizer steps done.
        rows: tau by "target/benchmark", in the order of the cases.
    """

    step: int
    rows: dict[str, float]

    @property
    def of_targets(self) -> dict[str, float]:
        """Mean over benchmarks of tau, by target."""
        taus: dict[str, list[float]] = {}
        for name, tau in self.rows.items():
            taus.setdefault(name.rsplit("/", 1)[0], []).append(tau)
        return {target: float(np.mean(values)) for target, values in taus.items()}

    @property
    def mean(self) -> float:
        """Mean over targets."""
        return float(np.mean(list(self.of_targets.values())))

    @property
    def worst(self) -> float:
        """Of the target that accepts least."""
        return min(self.of_targets.values())

    def value(self, criterion: str) -> float:
        """What decides which draft is best: `mean` or `worst`."""
        return self.worst if criterion == "worst" else self.mean


class AcceptanceMonitor(UsesTrainer):
    """Measures the model in training every so many steps, before the first and after the last; keeps the best draft.

    Args:
        cases: what each target answered to each benchmark.
        settings: how often, and what is best.
        output_dir: of the run.
        num_draft_tokens: K.
        dtype: of the draft while it is measured.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        settings: MonitorConfig,
        output_dir: Path,
        *,
        num_draft_tokens: int,
        dtype: torch.dtype,
    ):
        self.settings, self.num_draft_tokens, self.dtype = settings, num_draft_tokens, dtype
        self.names = [f"{case.target}/{case.benchmark.name}" for case in cases]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"targets and evaluate.benchmarks name something twice: {', '.join(self.names)}")
        self.turns = [(number, turn) for number, case in enumerate(cases) for turn in case.turns]
        measured_on = fingerprint([[case.identity for case in cases], str(dtype), num_draft_tokens])
        self.keeper = BestDraft(output_dir, settings.keep_best, self.names, measured_on)
        self.seconds = self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained draft, or take up the best one of the run that is continued."""
        self.started = time.perf_counter()
        self.keeper.open(is_first=state.is_world_process_zero)
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Once in a while: measure, and keep the draft if it is the best."""
        if state.global_step % self.settings.every_steps == 0 or state.global_step == state.max_steps:
            self._measure(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say what the measurements cost."""
        if state.is_world_process_zero:
            total = time.perf_counter() - self.started
            print(f"acceptance measured in {self.seconds:.0f} s of {total:.0f} s ({self.seconds / total:.1%})")

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        started = time.perf_counter()
        measurement = Measurement(state.global_step, self._replay())
        is_best = state.global_step > 0 and self.keeper.offer(measurement, self.trainer)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.trainer.window_start += seconds  # the logged speed is that of training
        # Trainer's trackers show the prefix `eval_` as `eval/`.
        logs = {f"eval_tau/{name}": tau for name, tau in measurement.rows.items()}
        logs |= {"eval_tau/mean": measurement.mean, "eval_tau/worst": measurement.worst, "eval_seconds": seconds}
        should_log = control.should_log
        self.trainer.log(logs)
        control.should_log = should_log  # logging takes a pending log of the loss for done
        if state.is_world_process_zero:
            note = "  best so far" if is_best else ""
            tqdm.write(
                f"step {state.global_step:>6}  tau {measurement.mean:.3f}  worst target {measurement.worst:.3f}  "
                f"({seconds:.1f} s){note}"
            )

    def _replay(self) -> dict[str, float]:
        """tau by case: every rank replays its share of the turns."""
        accelerator = self.trainer.accelerator
        share = np.array_split(np.arange(len(self.turns)), accelerator.num_processes)[accelerator.process_index]
        mine = [self.turns[number] for number in share]
        copy = copy_model(accelerator.unwrap_model(self.trainer.model), self.dtype, self.trainer.args.device)
        drafter = Drafter(copy, self.trainer.processing_class)
        pairs = [(turn.prompt_ids, turn.answer.ids) for _, turn in mine]
        counts = torch.zeros(len(self.names), 3, dtype=torch.int64, device=self.trainer.args.device)
        for (case, _), matches in zip(mine, replay_all(drafter, pairs, self.num_draft_tokens), strict=True):
            trace = walk(matches.tolist(), self.num_draft_tokens)
            counts[case] += torch.tensor([trace.num_tokens, len(trace.accepted), 1], device=counts.device)
        totals = accelerator.reduce(counts, reduction="sum").tolist()
        assert sum(num_turns for *_, num_turns in totals) == len(self.turns), "the ranks' shares are not the turns"
        return {name: tokens / steps for name, (tokens, steps, _) in zip(self.names, totals, strict=True)}


@torch.no_grad()
def copy_model(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A copy of a model in training in another dtype, whole on every rank. Called by all ranks.

    Built on the meta device, so that no random number is drawn.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    copy.to_empty(device=device)
    copy.tie_weights()
    for name, parameter in copy.named_parameters():
        theirs = model.get_parameter(name)
        with _whole(theirs):
            parameter.copy_(theirs)
    for name, buffer in copy.named_buffers():
        buffer.copy_(model.get_buffer(name))
    return copy.eval()


def _whole(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """All of a parameter that ZeRO-3 shards over the ranks, for as long as the context lasts."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


class BestDraft:
    """The best draft of a run in output_dir/best, with what made it the best beside it.

    Args:
        output_dir: of the run.
        criterion: mean | worst | none.
        names: of the rows that a measurement has.
        measured_on: short name of the texts, K and dtype of all measurements.
    """

    def __init__(self, output_dir: Path, criterion: str, names: Sequence[str], measured_on: str):
        self.folder, self.criterion, self.names = output_dir / BEST_FOLDER, criterion, list(names)
        self.measured_on = measured_on
        self.best: Measurement | None = None

    def open(self, *, is_first: bool) -> None:
        """Take up what an interrupted run had found; every rank gets what the first one reads.

        Raises:
            UserError: if that was measured on other texts, or chosen by another rule: its tau is no match then.
        """
        found: list[dict[str, Any] | None] = [None]
        if is_first and self.criterion != "none":
            previous = self._sibling("previous")
            if previous.exists() and not self.folder.exists():  # killed between the two renames of _replace
                previous.rename(self.folder)
            if self.folder.exists():
                found = [read_json(self.folder / BEST_FILE)]
        broadcast_object_list(found)
        if found[0] is None:
            return
        if (found[0]["chosen_by"], list(found[0]["rows"])) != (self.criterion, self.names):
            raise UserError(
                f"{self.folder} was chosen by the {found[0]['chosen_by']} of {', '.join(found[0]['rows'])}, now it is "
                f"the {self.criterion} of {', '.join(self.names)}: go on with the same targets, "
                "evaluate.benchmarks and monitor.keep_best, or move the folder away"
            )
        if found[0].get("measured_on", self.measured_on) != self.measured_on:
            raise UserError(
                f"{self.folder} was measured on other texts of the same targets and benchmarks (a target, a benchmark, "
                "monitor.max_prompts, monitor.max_new_tokens or inference.dtype has changed): go on with the same, or "
                "move the folder away"
            )
        self.best = Measurement(found[0]["step"], found[0]["rows"])

    def offer(self, measurement: Measurement, trainer: PardTrainer) -> bool:
        """Keep the draft in training if it is better than the best so far. Called by all ranks; whether it is."""
        if self.criterion == "none":
            return False
        tau = measurement.value(self.criterion)
        if self.best is not None and tau <= self.best.value(self.criterion):
            return False
        self.best = measurement
        new = self._sibling("new")
        if trainer.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
        trainer.write_draft(new)
        if trainer.args.should_save:
            record = {"chosen_by": self.criterion, "tau": tau, **asdict(measurement)}
            write_json(new / BEST_FILE, {**record, "measured_on": self.measured_on})
            self._replace(new)
        return True

    def _replace(self, new: Path) -> None:
        """Put a finished folder in the place of the old one; at every moment one of the two is whole."""
        previous = self._sibling("previous")
        shutil.rmtree(previous, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(previous)
        new.rename(self.folder)
        shutil.rmtree(previous, ignore_errors=True)

    def _sibling(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")
