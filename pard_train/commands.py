"""The programs: where they are, which settings each reads, and how a user calls them."""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # a wheel keeps the programs inside of the package
CONFIG_DIR = HOME / "conf"


@dataclass(frozen=True)
class Program:
    """One program of recipes/ or data_scripts/.

    Attributes:
        folder: where its file is.
        sections: of `config.Config` that it reads, besides output_dir, seed and resume.
        shares_work: its processes share the work under a launcher; others are refused there.
    """

    folder: str
    sections: tuple[str, ...]
    shares_work: bool = False


_TRAINING = ("model", "draft", "targets", "objective", "data", "trainer", "deepspeed", "logger", "monitor", "plan")
_WRITING = ("model", "targets", "inference", "data")
_STEPS = ("inference", "prepare", "regenerate", "evaluate")

PROGRAMS = {
    "prepare": Program("data_scripts", ("prepare",)),
    "regenerate": Program("data_scripts", (*_WRITING, "regenerate"), shares_work=True),
    "encode": Program("data_scripts", ("model", "data")),
    "score": Program("data_scripts", (*_WRITING, "score"), shares_work=True),
    "show": Program("data_scripts", ("model", "draft", "objective", "data", "show")),
    "train": Program("recipes", (*_TRAINING, "plan_only", "inference", "evaluate"), shares_work=True),
    "export": Program("recipes", ("model", "draft", "targets", "logger", "export")),
    "evaluate": Program("recipes", (*_WRITING, "draft", "logger", "evaluate")),
    "compare": Program("recipes", ("logger", "compare")),
    "study": Program("recipes", (*_TRAINING, "plan_only", "inference", "evaluate", "study")),
    "dashboard": Program("recipes", ("logger", "dashboard")),
    "verify": Program("recipes", ("model", "draft", "targets", "data", "logger", "verify")),
    "load": Program("recipes", ("model", "draft", "targets", "data", "load")),
    "generate": Program("recipes", (*_WRITING, "draft", "generate")),
    "doctor": Program("recipes", (), shares_work=True),
    "quickstart": Program("recipes", (*_TRAINING, *_STEPS, "stand_in", "export")),
}


def command(name: str) -> str:
    """How a user calls a program: `python recipes/export.py` in a checkout, `pard-export` from a wheel."""
    return f"pard-{name}" if HOME == PACKAGE else f"python {PROGRAMS[name].folder}/{name}.py"


def main() -> None:
    """Run the program of the console command that called this, such as `pard-train`."""
    name = Path(sys.argv[0]).stem.removeprefix("pard-")
    runpy.run_path(str(HOME / PROGRAMS[name].folder / f"{name}.py"), run_name="__main__")
