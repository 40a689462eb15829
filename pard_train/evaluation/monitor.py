"""Acceptance during training: replay of the targets' cached answers every N steps, and the best draft kept.

The targets write their greedy answers before training starts, once for all runs with these settings. Each measurement
replays them on a copy of the model in the dtype of recipes/evaluate.py, so its figures equal an evaluation of that
draft, and training (weights, random numbers, attention) is not affected.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState

from pard_train.acceptance.counting import pool, walk
from pard_train.acceptance.replay import replay_all
from pard_train.config import Config, MonitorConfig
from pard_train.data.benchmarks import load_benchmarks
from pard_train.downloads import cache_folder
from pard_train.errors import UserError
from pard_train.generation.proposers import Drafter
from pard_train.model import DTYPES, check_same_tokenizer, load_base_tokenizer
from pard_train.runs import fingerprint, read_json, require_same, write_json
from pard_train.targets.cases import Case, longest_text, write_case
from pard_train.targets.compatibility import Model, check_context, require
from pard_train.targets.target import load_targets
from pard_train.training.callbacks import UsesTrainer
from pard_train.training.inputs import check_output
from pard_train.training.trainer import BEST_FILE, BEST_FOLDER, PardTrainer


def build_monitor(config: Config) -> list[TrainerCallback]:
    """The callback that measures acceptance; none if monitor.every_steps is 0.

    Generates the missing answers of the targets; of several processes the first does, and the others wait.

    Raises:
        UserError: if the output folder is taken, or a target does not fit the model, before any target is loaded.
    """
    if not config.monitor.every_steps:
        return []
    check_output(config)
    monitor, model = config.monitor, config.model
    benchmarks = load_benchmarks(config.evaluate.benchmarks, monitor.max_prompts)
    targets = load_targets(config)
    tokenizer, k = load_base_tokenizer(model), config.draft.num_draft_tokens
    limits: dict[str, Any] = {"max_new_tokens": monitor.max_new_tokens, "system_prompt": config.evaluate.system_prompt}
    for target in targets:
        check_same_tokenizer(tokenizer, target.tokenizer, model.path, target.name)
        longest = max(longest_text(benchmark.prompts, target.encoder, **limits) for benchmark in benchmarks)
        both = [Model.load(n, trust_remote_code=model.trust_remote_code) for n in (model.path, target.name)]
        require([check_context(each, longest + k) for each in both])
    cases, folder = [], cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "target_text.lock"):
        for target in targets:
            cases += [write_case(target, benchmark, folder, **limits) for benchmark in benchmarks]
            target.unload()
    dtype = DTYPES[targets[0].dtype]
    return [AcceptanceMonitor(cases, monitor, Path(config.output_dir), num_draft_tokens=k, dtype=dtype)]


@dataclass(frozen=True)
class Measurement:
    """Acceptance of the draft at one step.

    Attributes:
        step: optimizer steps done.
        rows: tau by "target/benchmark", in the order of the cases.
        details: intervals of tau, tau by K and survival by position, under their names in the log.
    """

    step: int
    rows: dict[str, float]
    details: dict[str, float] = field(default_factory=dict)

    def tau(self, criterion: str) -> float:
        """`mean` over the targets or of the `worst` target; a target counts with its mean over benchmarks."""
        by_target: dict[str, list[float]] = {}
        for name, tau in self.rows.items():
            by_target.setdefault(name.rsplit("/", 1)[0], []).append(tau)
        means = [float(np.mean(taus)) for taus in by_target.values()]
        return min(means) if criterion == "worst" else float(np.mean(means))


class AcceptanceMonitor(UsesTrainer):
    """Measures a copy of the model in `dtype` every N steps, before the first and after the last; keeps the best."""

    def __init__(
        self, cases: Sequence[Case], settings: MonitorConfig, folder: Path, *, num_draft_tokens: int, dtype: torch.dtype
    ):
        self.settings, self.num_draft_tokens, self.dtype = settings, num_draft_tokens, dtype
        self.names = [f"{case.target}/{case.benchmark.name}" for case in cases]
        if len(set(self.names)) < len(self.names):
            raise UserError(f"targets and evaluate.benchmarks name something twice: {', '.join(self.names)}")
        self.turns = [(number, turn) for number, case in enumerate(cases) for turn in case.turns]
        measured_on = fingerprint([[case.identity for case in cases], str(dtype), num_draft_tokens])
        self.keeper = BestDraft(folder, settings.keep_best, self.names, measured_on)
        self.seconds = self.started = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the untrained draft, or load the record of the best one of the resumed run."""
        self.started = time.perf_counter()
        self.keeper.open(is_first=state.is_world_process_zero)
        if state.global_step == 0:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every N steps and after the last: measure, and keep the draft if it is the best."""
        if state.global_step % self.settings.every_steps == 0 or state.global_step == state.max_steps:
            self._measure(state, control)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print the share of time that the measurements took."""
        if state.is_world_process_zero:
            total = time.perf_counter() - self.started
            print(f"acceptance measured in {self.seconds:.0f} s of {total:.0f} s ({self.seconds / total:.1%})")

    def _measure(self, state: TrainerState, control: TrainerControl) -> None:
        started = time.perf_counter()
        measurement = Measurement(state.global_step, *self._replay())
        is_good = state.global_step > 0 and not self.trainer.num_bad_steps  # bad weights make every step bad
        is_best = is_good and self.keeper.offer(measurement, self.trainer)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        self.trainer.window_start += seconds  # the logged speed is that of training
        mean, worst = measurement.tau("mean"), measurement.tau("worst")
        taus = {**measurement.rows, "mean": mean, "worst": worst}
        should_log = control.should_log
        logs = {f"eval_tau/{name}": tau for name, tau in taus.items()} | measurement.details
        self.trainer.log(logs | {"eval_seconds": seconds})
        control.should_log = should_log  # Trainer takes a pending log of the loss as done
        if state.is_world_process_zero:
            note = "  best so far" if is_best else ""
            line = f"step {state.global_step:>6}  tau {mean:.3f}  worst target {worst:.3f}  ({seconds:.1f} s){note}"
            tqdm.write(line)

    def _replay(self) -> tuple[dict[str, float], dict[str, float]]:
        """tau by case, and its details; every rank replays its share of the turns."""
        accelerator, most = self.trainer.accelerator, self.num_draft_tokens
        mine = np.array_split(np.arange(len(self.turns)), accelerator.num_processes)[accelerator.process_index]
        copy = copy_model(
            accelerator.unwrap_model(self.trainer.model, keep_torch_compile=False), self.dtype, self.trainer.args.device
        )
        pairs = [(self.turns[i][1].prompt_ids, self.turns[i][1].answer.ids) for i in mine]
        found = replay_all(Drafter(copy, self.trainer.processing_class), pairs, most)
        matches = gather_object([own.tolist() for own in found])  # of all turns, in their order
        rows, details = dict[str, float](), dict[str, float]()
        for case, name in enumerate(self.names):
            own = [(turn.prompt_id, m) for (number, turn), m in zip(self.turns, matches, strict=True) if number == case]
            prompts = [prompt for prompt, _ in own]
            by_k = [pool([walk(m, k) for _, m in own], k, prompts=prompts) for k in range(1, most + 1)]
            rows[name] = by_k[-1].tau
            details |= {f"eval_tau_low/{name}": by_k[-1].tau_low, f"eval_tau_high/{name}": by_k[-1].tau_high}
            details |= {f"eval_tau_by_k/{name}/k_{a.num_draft_tokens}": a.tau for a in by_k}
            details |= {f"eval_survival/{name}/position_{i}": s for i, s in enumerate(by_k[-1].survival, start=1)}
        return rows, details


@torch.no_grad()
def copy_model(model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A complete copy of a model in another dtype on every rank. All ranks call it.

    It is built on the meta device, which draws no random numbers.
    """
    with torch.device("meta"):
        copy = type(model)(deepcopy(model.config))
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    copy.to_empty(device=device)
    copy.tie_weights()
    for name, parameter in copy.named_parameters():
        theirs = model.get_parameter(name)
        with _gathered(theirs):
            parameter.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)  # FSDP2 shards it
    for name, buffer in copy.named_buffers():
        buffer.copy_(model.get_buffer(name))
    return copy.eval()


def _gathered(parameter: torch.nn.Parameter) -> AbstractContextManager:
    """Gather a parameter that ZeRO-3 shards over the ranks within the context."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


class BestDraft:
    """The best draft of a run in output_dir/best, with its measurement in best.json.

    Args:
        output_dir: of the run.
        criterion: mean | worst | none.
        names: of the rows of a measurement.
        measured_on: hash of the answers, K and dtype of all measurements.
    """

    def __init__(self, output_dir: Path, criterion: str, names: Sequence[str], measured_on: str):
        self.folder, self.criterion, self.names = output_dir / BEST_FOLDER, criterion, list(names)
        self.measured_on = measured_on
        self.best: Measurement | None = None

    def open(self, *, is_first: bool) -> None:
        """Load the record of an interrupted run; every rank gets what the first one reads.

        Raises:
            UserError: if it was measured on other answers or chosen by another rule, so that its tau is not comparable.
        """
        found: list[dict[str, Any] | None] = [None]
        if is_first and self.criterion != "none":
            previous = self._sibling("previous")
            if previous.exists() and not self.folder.exists():  # killed between the two renames of _replace
                previous.rename(self.folder)
            if self.folder.exists():
                found = [read_json(self.folder / BEST_FILE)]
        broadcast_object_list(found)
        record = found[0]
        if record is None:
            return
        old = {"keep_best": record["chosen_by"], "measured": list(record["rows"]), "answers": record["measured_on"]}
        new = {"keep_best": self.criterion, "measured": self.names, "answers": self.measured_on}
        fix = "use the same targets, evaluate.benchmarks, monitor settings and inference.dtype, or move the folder away"
        require_same(old, new, what=f"{self.folder} was chosen by other measurements", fix=fix)
        self.best = Measurement(record["step"], record["rows"])

    def offer(self, measurement: Measurement, trainer: PardTrainer) -> bool:
        """Keep the present draft if it is better than the best so far. All ranks call it. Returns whether it is."""
        if self.criterion == "none":
            return False
        tau = measurement.tau(self.criterion)
        if self.best is not None and tau <= self.best.tau(self.criterion):
            return False
        self.best = measurement
        new = self._sibling("new")
        trainer.write_draft(new)
        if trainer.args.should_save:
            record = {"chosen_by": self.criterion, "tau": tau, "step": measurement.step, "rows": measurement.rows}
            write_json(new / BEST_FILE, record | {"measured_on": self.measured_on})
            self._replace(new)
        return True

    def _replace(self, new: Path) -> None:
        """Replace the old folder by a finished one; at every moment one of the two is complete."""
        previous = self._sibling("previous")
        shutil.rmtree(previous, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(previous)
        new.rename(self.folder)
        shutil.rmtree(previous, ignore_errors=True)

    def _sibling(self, suffix: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{suffix}")
