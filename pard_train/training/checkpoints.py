"""Checkpoints: where the weights of a draft model are, and which draft of a run to use.

A draft is given as a run folder, a draft folder, a checkpoint-N folder of Trainer, or a hub name. Every run gathers its
weights into safetensors, also under DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pard_train.errors import UserError
from pard_train.runs import CONFIG_FILE, RUN_FILE, SEAL_FILE, check_sealed, read_json, read_metrics
from pard_train.training.trainer import BEST_FILE, BEST_FOLDER, DRAFT_FOLDER, INITIAL_FOLDER


@dataclass(frozen=True)
class Checkpoint:
    """Location of a draft model.

    Attributes:
        path: folder or hub name of the weights.
        home: folder or hub name of their config, generation config and tokenizer. Trainer changes all three in its
            checkpoints, so those of a run come from its untrained draft model.
        run: output folder of the training run; None for other models.
        choice: why this draft of the run was chosen; empty if the user named it.
    """

    path: str
    home: str
    run: Path | None = None
    choice: str = ""

    @property
    def step(self) -> int | None:
        """Optimizer step of the weights; None if unknown."""
        folder = Path(self.path)
        if self.run is None:
            return None
        if (folder / BEST_FILE).is_file():
            return read_json(folder / BEST_FILE)["step"]
        if folder.name == DRAFT_FOLDER:
            return max((row["step"] for row in read_metrics(self.run) if "step" in row), default=None)
        number = folder.name.removeprefix("checkpoint-")
        return 0 if folder.name == INITIAL_FOLDER else int(number) if number.isdecimal() else None


def find_checkpoint(path: str) -> Checkpoint:
    """Locate the weights of a draft without loading them.

    Raises:
        UserError: if the folder is a run without a draft, is incomplete or truncated, or holds no safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        return Checkpoint(path, path)  # a hub name
    if _is_run(folder):
        return choose_draft(folder)
    run = folder.parent if _is_run(folder.parent) else None
    _check_weights(folder)
    is_numbered = folder.name.removeprefix("checkpoint-").isdecimal()
    if run is not None and is_numbered and not (folder / SEAL_FILE).exists():
        raise UserError(f"{path} is incomplete: use an earlier checkpoint")
    check_sealed(folder, "use another checkpoint")
    home = run / INITIAL_FOLDER if run is not None and is_numbered else folder
    return Checkpoint(path, str(home if home.is_dir() else folder), run)


def choose_draft(run: Path) -> Checkpoint:
    """The better of a run's draft/ (last step) and best/ (kept by the monitor).

    best/ is chosen if its tau is above that of the last measured step, by monitor.keep_best (mean or worst target).

    Raises:
        UserError: if the run has not finished.
    """
    draft, best = run / DRAFT_FOLDER, run / BEST_FOLDER
    if not draft.is_dir():
        raise UserError(f"{run} has no {DRAFT_FOLDER}/: finish the run, or name a checkpoint or {BEST_FOLDER}/ in it")
    if not (best / BEST_FILE).is_file():
        return Checkpoint(str(draft), str(draft), run, f"{draft}: the last step; the run kept no {BEST_FOLDER}/")
    record = read_json(best / BEST_FILE)
    key = f"eval/tau/{record['chosen_by']}"
    measured = [row for row in read_metrics(run) if key in row]
    last = measured[-1] if measured else {"step": None, key: float("-inf")}
    rule = f"{record['chosen_by']} tau {record['tau']:.3f} at step {record['step']}"
    if record["tau"] > last[key]:
        reason = f"{best}: {rule} is above {last[key]:.3f} at the last measured step ({last['step']})"
        return Checkpoint(str(best), str(best), run, reason)
    return Checkpoint(str(draft), str(draft), run, f"{draft}: no step of the run has a higher {rule}")


def resolve_draft(path: str) -> str:
    """Folder or hub name of a draft; for a run folder, the choice of `choose_draft`, which is printed.

    Raises:
        UserError: as for `choose_draft`.
    """
    if not _is_run(Path(path)):
        return path
    checkpoint = choose_draft(Path(path))
    print(checkpoint.choice)
    return checkpoint.path


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if (folder / "latest").is_file():
        raise UserError(
            f"{folder} holds DeepSpeed shards only: merge them with DeepSpeed's own tool, "
            f"python zero_to_fp32.py {folder} OUTPUT --safe_serialization, and give OUTPUT"
        )
    if others := [path.name for path in sorted(folder.glob("pytorch_model*.bin"))]:
        raise UserError(f"{folder}: {', '.join(others)} can contain code and is not loaded: convert it to safetensors")
    raise UserError(f"{folder} holds no weights: give a run, a draft folder or a checkpoint")


def _is_run(folder: Path) -> bool:
    """Whether this is the output folder of a training run."""
    has_files = (folder / RUN_FILE).is_file() and (folder / CONFIG_FILE).is_file()
    return has_files and "trainer" in read_json(folder / CONFIG_FILE)
