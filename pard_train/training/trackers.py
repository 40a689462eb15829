"""Trackers: Weights & Biases, TensorBoard, MLflow and trackio. metrics.jsonl and report.html are written without them.

W&B takes its key from the environment or `wandb login`. WANDB_* variables that the user has set win.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from pard_train.commands import PROGRAMS
from pard_train.config import Config, DraftConfig, LoggerConfig, ObjectiveConfig
from pard_train.errors import Interrupted, UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.reports.records import distinct
from pard_train.reports.webpage import PAGE_FILE
from pard_train.runs import CONFIG_FILE, flatten, provenance, read_json, read_metrics, run_of
from pard_train.training.background import Background
from pard_train.training.page import RunPage

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

VARIABLES = {  # of W&B, by the argument of wandb.init
    **{"project": "WANDB_PROJECT", "name": "WANDB_NAME", "group": "WANDB_RUN_GROUP", "job_type": "WANDB_JOB_TYPE"},
    **{"tags": "WANDB_TAGS", "mode": "WANDB_MODE", "dir": "WANDB_DIR", "id": "WANDB_RUN_ID"},
}
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")  # values of WANDB_MODE
# Folders named after a step of a larger job, such as the quickstart.
STEP_FOLDERS = ("train", "evaluation", "comparison", "verification", "export", "stand_in")
INIT_SECONDS, FINISH_SECONDS = 30.0, 60.0  # to wait for W&B's server
STEP = "train/global_step"  # Trainer's name of the steps


def check_trackers(settings: LoggerConfig) -> None:
    """Check packages and the login of W&B before anything is loaded. Raises UserError if one is missing."""
    for name in settings.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"logger.trackers=[{name}]: {name} is not installed: pip install {name}")
    mode = os.environ.get("WANDB_MODE") or settings.wandb_mode
    if "wandb" not in settings.trackers or mode in WITHOUT_LOGIN or int(os.environ.get("RANK", 0)):
        return
    import wandb

    try:
        is_known = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # such as a key of a wrong form
        raise UserError(f"logger.trackers=[wandb]: {str(error).splitlines()[0]}") from None
    if not is_known:
        raise UserError(
            "logger.trackers=[wandb]: not logged in: run `wandb login`, set WANDB_API_KEY, or choose "
            "logger.wandb_mode=offline"
        )


def default_entity() -> str:
    """User or team that W&B logs to unless told otherwise; needs a login."""
    import wandb

    return os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity or ""


@contextmanager
def tracking(config: Config, drafts: Mapping[str, Path], *, is_first: bool) -> Iterator[list[Background]]:
    """Callbacks of the chosen trackers, each in its own thread, and on leaving the context the outcome of the run.

    Args:
        config: of the experiment.
        drafts: folders of the run's drafts by their kind (last, best), which exist at the end if they were made.
        is_first: whether this is the first rank; the others have no trackers.
    """
    made: dict[str, Callable[[Config], TrainerCallback]] = {
        **{"wandb": WandbRun, "tensorboard": TensorBoard, "mlflow": _mlflow, "trackio": lambda _: TrackioCallback()}
    }
    settings = config.logger
    names, stall_seconds = distinct(settings.trackers) if is_first else [], 60 * settings.stall_minutes
    trackers = [Background(name, made[name](config), stall_seconds) for name in names]
    if is_first and settings.page_minutes:  # first in the list: W&B takes the last page
        page = RunPage(Path(config.output_dir), settings.page_minutes)
        trackers.insert(0, Background(PAGE_FILE, page))
    error: BaseException | None = None
    try:
        yield trackers
    except BaseException as raised:
        error = raised
        raise
    finally:
        finished = {kind: folder for kind, folder in drafts.items() if folder.is_dir() and error is None}
        for tracker in trackers:
            tracker.end(error=error, drafts=finished)


class TensorBoard(TensorBoardCallback):
    """Trainer's TensorBoard callback with a layout: depths in one chart, and every tau with its interval."""

    def __init__(self, config: Config):
        super().__init__()
        own: str | None = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self.logging_dir = own or str(Path(config.output_dir) / "tensorboard")
        self.has_layout = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Trainer's; the first line, which is a measurement if there are any, decides the layout."""
        super().on_log(args, state, control, logs=logs, **kwargs)
        if self.tb_writer is not None and not self.has_layout:
            self.has_layout = True
            cases = [name.partition("/")[2] for name in logs if name.startswith("eval_tau_low/")]
            margins = {c: ["Margin", [f"eval/{name}/{c}" for name in ("tau", "tau_low", "tau_high")]] for c in cases}
            depths = {name: ["Multiline", [f"train/{name}/depth_.*"]] for name in ("accuracy", "loss")}
            layout = {"depth": depths, "tau": {"all": ["Multiline", ["eval/tau/.*"]]}, "tau with interval": margins}
            self.tb_writer.add_custom_scalars(layout)


def _mlflow(config: Config) -> TrainerCallback:
    os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{Path(config.output_dir).absolute() / 'mlflow.db'}")
    return MLflowCallback()


def group_of(folder: Path) -> str:
    """Name of the job that an output folder belongs to: outputs/mine and outputs/mine/evaluation are both `mine`."""
    folder = folder.absolute()
    return folder.parent.name if folder.name in STEP_FOLDERS else folder.name


def open_run(
    settings: LoggerConfig,
    folder: Path,
    job_type: str,
    *,
    run_id: str | None,
    group: str,
    label: str = "",
    **config: Any,
) -> wandb.Run:
    """Open a W&B run, or continue the one with this id. If the server is unreachable, the run is kept offline.

    Args:
        folder: output folder, which names the run and holds W&B's files.
        job_type: name of the program.
        run_id: of the run; None makes one.
        group: of the run, unless the settings name it.
        label: added to the name.
        config: of the run.
    """
    import wandb

    own, name = group_of(folder), folder.absolute().name
    wanted: dict[str, Any] = {
        "project": settings.wandb_project,
        "name": settings.run_name or "/".join(filter(None, (own, name if name != own else "", label))),
        "group": settings.group or group,
        "job_type": job_type,
        "tags": list(settings.tags) or None,
        "mode": settings.wandb_mode,
        "dir": str(folder.parent if job_type == "export" else folder),  # an export holds what engines load
        "id": run_id,
    }
    wanted = {name: value for name, value in wanted.items() if not os.environ.get(VARIABLES[name])}
    limits = wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
    try:
        return wandb.init(**wanted, config=config, resume="allow", settings=limits)
    except wandb.Error as error:
        wandb.teardown()  # it holds the id
        logger.warning("W&B: %s; the run is kept offline in %s: send it with `wandb sync`", error, folder / "wandb")
        return wandb.init(**{**wanted, "mode": "offline"}, config=config, resume="allow", settings=limits)


def run_config(config: Config, program: str, folder: Path) -> dict[str, Any]:
    """The settings that a program reads, as the user set them, and what else is needed to reproduce its result."""
    settings, run, own = asdict(config), run_of(folder), ("device", "world_size", "data_manifest")
    sections = {name: settings[name] for name in (*PROGRAMS[program].sections, "output_dir", "seed")}
    facts: dict[str, Any] = {name: run[name] for name in own if name in run}
    return {**sections, **facts, "provenance": provenance()}


def _grouping(draft: DraftConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """How a draft was trained, as names of the config by which a dashboard filters and groups runs."""
    return {"trained_with": draft.num_draft_tokens, "objective_name": objective.name}


def add_artifact(
    run: wandb.Run, name: str, kind: str, *, folder: Path, is_input: bool = False, upload: bool = False, **facts: Any
) -> None:
    """Record an input or output of a run as an artifact: its facts, and its folder as a reference or in full.

    W&B cannot record inputs while it is offline; the config of a run names them, too.
    """
    import wandb

    if is_input and run.offline:
        return
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=kind, metadata=flatten(facts))
    with artifact.new_file("facts.json") as file:  # new facts make a new version: a reference has no content
        file.write(json.dumps(facts, indent=2))
    if upload:
        artifact.add_dir(str(folder))
    elif folder.exists():
        artifact.add_reference(folder.absolute().as_uri(), checksum=False)
    (run.use_artifact if is_input else run.log_artifact)(artifact)


class WandbRun(WandbCallback):
    """Trainer's W&B callback with our config, metric definitions, artifacts and alerts. The folder's run.json is there.

    Args:
        config: of the experiment.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.folder = config, Path(config.output_dir)
        self.best: dict[str, float] = {}  # of every tau

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Open the run of this folder, or continue it."""
        self._initialized = True
        config = run_config(self.config, "train", self.folder) | {"model_config": model.config.to_dict()}
        config |= _grouping(self.config.draft, self.config.objective)
        run_id, group = run_of(self.folder)["run_id"], group_of(self.folder)
        run = open_run(self.config.logger, self.folder, "train", run_id=run_id, group=group, **config)
        run.config.update({"model/num_parameters": model.num_parameters()}, allow_val_change=True)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        for line in read_metrics(self.folder):  # of before a resume, which W&B forgets (wandb/wandb#9684)
            self._keep_best(line)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, model: Any = None, logs: Any = None, **kw: Any
    ) -> None:
        """Trainer's, with an alert for bad steps. The summary of a tau is its best value."""
        if not self._initialized:
            self.setup(args, state, model)
        self._keep_best({name.replace("_", "/", 1): value for name, value in (logs or {}).items()})
        super().on_log(args, state, control, model=model, logs=logs, **kw)
        self._wandb.run.summary.update({name: {"max": value} for name, value in self.best.items()})
        if number := (logs or {}).get("skipped_steps"):
            text = f"{number:.0f} steps before step {state.global_step} had a NaN or infinite loss or gradient"
            self._wandb.run.alert("Bad steps", text, level="WARN", wait_duration=600)

    def _keep_best(self, line: Mapping[str, float]) -> None:
        for name in (name for name in line if name.startswith("eval/tau/")):
            if name not in self.best:  # a pattern would compete with "*"
                self._wandb.run.define_metric(name, step_metric=STEP, step_sync=True, summary="max")
            self.best[name] = max(line[name], self.best.get(name, line[name]))

    def stalled(self, seconds: float) -> None:
        """Send an alert."""
        self._wandb.run.alert("Stalled", f"no optimizer step for {seconds / 60:.1f} minutes", level="WARN")

    def end(self, error: BaseException | None, drafts: Mapping[str, Path]) -> None:
        """Record data and drafts as artifacts, or an alert for an error; then finish the run.

        Args:
            error: that ended the run early.
            drafts: folders of drafts by their kind (last, best).
        """
        run = self._wandb.run
        if run is None:
            return
        if error is not None and not isinstance(error, Interrupted):
            run.alert("Run failed", str(error)[:1000], level="ERROR")
        data, run_id = run_of(self.folder)["data_manifest"], run.id
        if (page := self.folder / PAGE_FILE).exists():
            run.log({"report": _media(page)})
        store = Path(data["folder"])
        add_artifact(run, f"data-{data['fingerprint']}", "data", folder=store, is_input=True, manifest=data)
        for kind, folder in drafts.items():
            facts = {"training_run": run_id, "fingerprint": model_fingerprint(str(folder))}
            upload = self.config.logger.upload
            add_artifact(run, f"draft-{run_id}-{kind}", "model", folder=folder, upload=upload, **facts)
        run.finish(exit_code=int(error is not None))


# ---- Programs other than training -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a program hands to W&B at its end.

    Attributes:
        program: evaluate | compare | verify | export.
        folder: its output folder.
        values: numbers by name.
        files: pages (.html) and pictures (.png).
        rows: of a table of records.
        products: folders that it wrote, by the name of the artifact.
        training: folder of the training run that it belongs to, if known.
        kind: of the draft of that run: last | best | init.
        facts: of the config, besides the settings.
        label: distinguishes several outcomes of one folder.
    """

    program: str
    folder: Path
    values: Mapping[str, float | str] = field(default_factory=dict)
    files: Sequence[Path] = ()
    rows: Sequence[dict[str, Any]] = ()
    products: Mapping[str, Path] = field(default_factory=dict)
    training: Path | None = None
    kind: str = "last"
    facts: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""


def log_outcome(config: Config, outcome: Outcome) -> None:
    """Log an outcome as a W&B run, if W&B is a chosen tracker. What goes wrong there is a warning."""
    if "wandb" not in config.logger.trackers:
        return
    try:
        _log_outcome(config, outcome)
    except Exception as error:  # the results are on disk, whatever W&B raises
        logger.warning("W&B failed: %s: %s; the results are in %s", type(error).__name__, error, outcome.folder)


def _log_outcome(config: Config, outcome: Outcome) -> None:
    import wandb

    training = run_of(outcome.training).get("run_id") if outcome.training else None
    facts = {"training_run": training, **outcome.facts, **run_config(config, outcome.program, outcome.folder)}
    if outcome.training and training:
        trained = read_json(outcome.training / CONFIG_FILE)
        facts |= _grouping(DraftConfig(**trained["draft"]), ObjectiveConfig(**trained["objective"]))
    own = run_of(outcome.folder).get("run_id")
    run_id = re.sub(r"[/\\#?%:]", "-", f"{own}-{outcome.label}") if own and outcome.label else own
    group, prefix = group_of(outcome.training or outcome.folder), outcome.program.replace("evaluate", "eval")
    with open_run(
        config.logger, outcome.folder, outcome.program, run_id=run_id, group=group, label=outcome.label, **facts
    ) as run:
        media: dict[str, Any] = {f"{prefix}/{path.stem}": _media(path) for path in outcome.files}
        if outcome.rows:
            rows = [flatten(row) for row in outcome.rows]
            columns: list[Any] = distinct(column for row in rows for column in row)
            media[f"{prefix}/records"] = wandb.Table(columns, [[row.get(column) for column in columns] for row in rows])
        run.log({**outcome.values, **media})
        for name, folder in outcome.products.items():
            facts, upload = {"training_run": training, "path": str(folder)}, config.logger.upload
            add_artifact(run, name, "model", folder=folder, upload=upload, **facts)
        if training is not None and outcome.kind != "init" and not run.offline:
            run.use_artifact(f"draft-{training}-{outcome.kind}:latest")


def _media(path: Path) -> Any:
    import wandb

    return wandb.Html(path.read_text(), inject=False) if path.suffix == ".html" else wandb.Image(str(path))
