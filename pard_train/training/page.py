"""The page of a training run, report.html, written again every few minutes and at the end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pard_train.reports.curves import write_run_page


class RunPage(TrainerCallback):
    """Writes the page; works as a tracker in `Background`.

    Args:
        folder: of the run.
        minutes: between two updates.
    """

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.minutes, self.written = folder, minutes, time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the page if it is old."""
        if time.monotonic() - self.written > 60 * self.minutes:
            write_run_page(self.folder, "running")
            self.written = time.monotonic()

    def end(self, error: BaseException | None, **kwargs: Any) -> None:
        """Write the last page, with the reason if the run has not finished."""
        write_run_page(self.folder, "finished" if error is None else str(error) or type(error).__name__)
