"""Wheels and files that a machine without a network needs for benchmarks/gpu.py, and the folder that holds them.

FOLDER/wheels/*.whl                               packages, installed once into FOLDER/site
FOLDER/pard_train/wheels/NAME-VERSION/*.whl       files that packages ship, as `pard_train.downloads` caches them
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pard_train.data.sources import CODEIO, GSM8K_SAMPLE, HUMAN_EVAL, MT_BENCH
from pard_train.downloads import SMOLLM2, cache_folder, read_packaged
from pard_train.errors import UserError

BASE = ("torch", "transformers", "accelerate", "pyarrow", "matplotlib", "tensorboard", "hypothesis", "pytest")
UNUSED = {"deepspeed": "for deepspeed=zero0 to zero3 only", "wandb": "for logger=wandb only"}
FILES = {source[0]: source for source in (SMOLLM2, HUMAN_EVAL, GSM8K_SAMPLE, MT_BENCH, CODEIO)}  # by requirement
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

Wanted = tuple[str, str]  # canonical name, and the extra whose requirements are meant; "" for none


def _wanted(texts: Iterable[str], extra: str = "") -> Iterator[Wanted]:
    """What requirements ask for on this machine, as the requirements of a package with this extra."""
    for requirement in map(Requirement, texts):
        if requirement.marker.evaluate({"extra": extra}) if requirement.marker else not extra:
            yield from ((canonicalize_name(requirement.name), name) for name in ("", *requirement.extras))


def with_requirements(texts: Iterable[str], stop: Iterable[str] = ()) -> list[str]:
    """Names of packages and of all that they require, without those in `stop` and what only these require."""
    found: set[Wanted] = set()
    todo, stop = list(_wanted(texts)), set(stop)
    while todo:
        name, extra = wanted = todo.pop()
        if wanted in found or (name in stop and not extra):  # a package may be there without its extra's packages
            continue
        try:
            todo += _wanted(distribution(name).requires or [], extra)
        except PackageNotFoundError:  # not for this Python or platform
            continue
        found.add(wanted)
    return sorted({name for name, _ in found} - stop)


def needed_wheels(have: Iterable[str] = ()) -> dict[str, bool]:
    """Packages of the project that a machine lacks, as NAME==VERSION, and whether one wheel serves every Python 3.

    Args:
        have: names of the packages on the machine; without any, BASE and what that requires here.
    """
    there: set[str] = {canonicalize_name(name) for name in have} or {*with_requirements(BASE)}
    names = with_requirements(requires("pard_train") or [], stop={*there, *BASE, *UNUSED})
    packages = [distribution(name) for name in names]
    return {
        f"{name}=={package.version}": "Tag: py3-none-any" in (package.read_text("WHEEL") or "")
        for name, package in zip(names, packages, strict=True)
    }


def read_names(path: Path) -> list[str]:
    """Names of packages, the first word of every line: the output of `pip list`, `pip freeze` or a plain list."""
    return [match.group() for line in path.read_text().splitlines() if (match := re.match(r"[A-Za-z0-9._-]+", line))]


def print_needs(have: Iterable[str] = (), *, as_json: bool = False) -> None:
    """Print the wheels and files, or the commands that fetch them."""
    wheels = needed_wheels(have)
    if as_json:
        print(json.dumps({"base": BASE, "wheels": wheels, "files": dict(FILES.values()), "unused": UNUSED}, indent=1))
        return
    pure, compiled = (" ".join(name for name, kind in wheels.items() if kind == is_pure) for is_pure in (True, False))
    pip, platforms = "python -m pip", " ".join(f"--platform {name}" for name in PLATFORMS)
    print(f"# expected there: {', '.join(BASE)} and what these require; --have FILE names the packages exactly")
    print("\n".join(f"# not needed: {name}, {reason}" for name, reason in UNUSED.items()))
    if pure:
        print(f"{pip} wheel --no-deps --wheel-dir FOLDER/wheels {pure}")
    if compiled:
        print(
            f"{pip} download --no-deps --only-binary=:all: --python-version 3.12 {platforms} "
            f"--dest FOLDER/wheels {compiled}"
        )
    for requirement in FILES:
        folder = f"FOLDER/pard_train/wheels/{requirement.replace('==', '-')}"
        print(f"{pip} download --no-deps --dest {folder} {requirement}")


def read_needs(folder: Path) -> dict[str, str]:
    """Install the wheels of a folder into its `site`, and return the environment that reads it without a network.

    Raises:
        UserError: if the folder does not exist, or a wheel does not fit this Python.
    """
    if not folder.is_dir():
        raise UserError(f"--needs {folder}: no such folder; --list-needs prints what belongs into it")
    folder = folder.resolve()
    wheels, site = sorted(folder.glob("wheels/*.whl")), folder / "site"
    if wheels and not site.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
        result = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True)
        if result.returncode:
            raise UserError(f"--needs {folder}: {(result.stderr.strip().splitlines() or ['pip failed'])[-1]}")
    return {"XDG_CACHE_HOME": str(folder), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site)}


def missing_files(requirements: Iterable[str]) -> list[str]:
    """Packages among FILES that are neither in the cache nor can be downloaded."""
    missing = []
    for requirement in requirements:
        is_unpacked = requirement == SMOLLM2[0] and (cache_folder() / "SmolLM2-135M-Instruct").is_dir()
        try:
            if not is_unpacked:
                read_packaged(FILES[requirement])
        except UserError:
            missing.append(requirement)
    return missing
