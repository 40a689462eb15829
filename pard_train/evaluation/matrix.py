"""The matrix of one evaluation (drafts x targets x benchmarks): its settings, stored results and failures."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pard_train.config import Config
from pard_train.device import device_name, dtype_name
from pard_train.errors import UserError, first_line
from pard_train.generation.sampling import GREEDY, Sampling
from pard_train.runs import fingerprint, provenance, read_json, write_json

logger = logging.getLogger(__name__)

RESULTS_FOLDER = "cells"
FAILURES_LOG = "failures.log"  # whole tracebacks; acceptance.json has their last lines


class Matrix:
    """Settings and results of one output folder.

    Attributes:
        dtype: name of the dtype of drafts and targets.
        template_kwargs: arguments of the chat template.
        failures: what could not be measured, as in acceptance.json.
        provenance: command, versions and machine of this run.
    """

    def __init__(self, config: Config):
        self.folder, self.settings = Path(config.output_dir), config.evaluate
        self.dtype, self.seed = dtype_name(config.inference.dtype), config.seed
        self.template_kwargs = dict(config.data.template_kwargs)
        self.trust_remote_code = config.model.trust_remote_code
        self.failures: list[dict[str, Any]] = []
        self.provenance = {**provenance(), "device": device_name()}

    def sampling(self, temperature: float) -> Sampling:
        """How tokens are chosen at a temperature."""
        return Sampling(temperature, self.settings.top_p, self.seed) if temperature else GREEDY

    def result(self, kind: str, identity: dict[str, Any], compute: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """(result, provenance) of one measurement: from its file if it is finished, else computed and stored.

        Args:
            kind: first part of the file's name.
            identity: everything that decides the result.
            compute: gives it as JSON.
        """
        path = self._path(kind, identity)
        if path.exists():
            try:
                stored = read_json(path)
                return stored["result"], stored["made_by"]
            except (UserError, KeyError, TypeError):
                logger.warning("%s is damaged: measured again", path)
        write_json(path, {"identity": identity, "result": compute(), "made_by": self.provenance})
        stored = read_json(path)
        return stored["result"], stored["made_by"]

    def has_result(self, kind: str, identity: dict[str, Any]) -> bool:
        """Whether a measurement is finished."""
        return self._path(kind, identity).exists()

    def _path(self, kind: str, identity: dict[str, Any]) -> Path:
        return self.folder / RESULTS_FOLDER / f"{kind}-{fingerprint([kind, identity])}.json"

    @contextmanager
    def keep_going(self, *, target: str, draft: str | None = None, benchmark: str | None = None) -> Iterator[None]:
        """Record a failure inside, once per reason, and continue with the rest of the matrix."""
        try:
            yield
        except Exception as error:  # out of memory, a server that died, a missing kernel: everything but Ctrl-C
            where = {"draft": draft, "target": target, "benchmark": benchmark}
            failure = {**where, "reason": first_line(error)}
            if failure in self.failures:
                return
            self.failures.append(failure)
            with (self.folder / FAILURES_LOG).open("a") as log:
                log.write(f"{where}\n{traceback.format_exc()}\n")
            named = ", ".join(f"{kind} {name}" for kind, name in where.items() if name)
            print(f"FAILED: {named}: {failure['reason']} (see {FAILURES_LOG}); the rest continues", flush=True)
