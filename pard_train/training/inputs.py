"""What a run starts from: its output folder, the target's scores of its tokens, and the packs of all epochs."""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.core.attention import resolve_attention
from pard_train.data.packing import PackedDataset
from pard_train.data.scores import Scores, open_teacher
from pard_train.data.store import TokenStore
from pard_train.device import default_device
from pard_train.runs import check_run, locked, require_recorded
from pard_train.training.arguments import training_settings
from pard_train.training.processes import for_processes, is_first_process, run_identity
from pard_train.training.trackers import check_trackers

TEACHER_FILE = "teacher.json"  # of a run: manifest of the target's scores that the objective used
TOKENS_FILE = "tokens.json"  # manifest of the tokens


def check_output(config: Config) -> None:
    """Check the output folder and the trackers of a run, and the settings that libraries check.

    Raises:
        UserError: if the folder holds something else, a tracker has no login, or a library refuses a setting.
    """
    training_settings(config)
    resolve_attention(config.model.attention, default_device().type)
    if is_first_process():
        check_trackers(config.logger)
        with locked(Path(config.output_dir)):
            config = for_processes(config)
            check_run(Path(config.output_dir), run_identity(config), resume=config.resume)


def teacher_of(config: Config, store: TokenStore) -> Scores | None:
    """The target's scores that the objective needs; None if it needs none.

    Raises:
        UserError: if they are missing, unfinished or those of other tokens, or if the run was started with others.
    """
    folder = config.data.scores
    if not config.objective.needs_scores or folder is None:
        if folder is not None and is_first_process():
            print(f"data.scores={folder} is not used: objective.kd, objective.lk and objective.cat are off")
        return None
    scores = open_teacher(Path(folder), store)
    require_recorded(Path(config.output_dir) / TEACHER_FILE, scores.manifest, "data.scores")
    return scores


def build_dataset(config: Config, store: TokenStore, scores: Scores | None, *, num_devices: int) -> PackedDataset:
    """The packs of all epochs, in whole optimizer steps."""
    return PackedDataset(
        store,
        store.slot_bounds(config.draft),
        slot_budget=config.data.slot_budget,
        num_epochs=config.trainer.num_train_epochs,
        seed=config.seed,
        packs_per_step=num_devices * config.trainer.gradient_accumulation_steps,
        scores=scores,
    )
