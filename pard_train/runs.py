"""Output folders: claims, settings, provenance, atomic writes, and sealed checkpoints."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pard_train.errors import UserError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"  # of a training run: every line of its log
PLAN_FILE = "plan.json"  # of a training run: what it was expected to take
MANIFEST_FILE = "manifest.json"  # of a data set: what it was made of, and how much of it is where
SEAL_FILE = "files.json"  # of checkpoints, tokens and scores: size in bytes and checksum of every file
RESUME_BEFORE = "delete {} to resume from the checkpoint before"
CHECKSUM_BLOCK = 2**24  # bytes
LOCK_FILE = ".lock"  # of an output folder, held while a program works in it
LOCK_SECONDS = 10.0  # to wait for it: data workers of a killed run hold it until they end, some seconds later
PACKAGES = ("pard_train", "torch", "transformers", "datasets", "accelerate", "deepspeed", "hydra-core", "numpy")

SETTINGS_VERSION = 2  # of config.json; grows when settings are renamed


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder. The operating system frees it when the process ends, even if killed.

    A process may lock again what it has locked. A folder that was made for the lock and stays empty is removed.

    Raises:
        UserError: if another program works in the folder.
    """
    if folder.is_file():  # `check_run` refuses it
        yield
        return
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.resolve() / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(
            f"output_dir={folder}: another program works in this folder: wait for its end, or choose another output_dir"
        ) from None
    try:
        yield
    finally:
        if is_new and not _has_content(folder):
            shutil.rmtree(folder)
        lock.release()


def _has_content(folder: Path) -> bool:
    """Whether a folder holds more than a run leaves that was killed before it wrote config.json."""
    return any(
        path.name != LOCK_FILE and not path.name.startswith(f"{CONFIG_FILE}.partial-") for path in folder.iterdir()
    )


def check_run(folder: Path, settings: dict[str, Any], *, resume: bool) -> None:
    """Check that a run may write to a folder. Writes nothing.

    Args:
        folder: output folder.
        settings: those that decide the result (`config.decisive`).
        resume: resume the run in the folder, if there is one.

    Raises:
        UserError: if the folder holds other files, another run, or a run with other settings.
    """
    config_path = folder / CONFIG_FILE
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir={folder} is a file: choose another output_dir")
    if not config_path.exists():
        if folder.exists() and _has_content(folder):
            raise UserError(f"output_dir={folder} is not empty and holds no run: choose another output_dir")
        return
    if not resume:
        raise UserError(
            f"output_dir={folder} already holds a run (see {config_path}): resume it with resume=true, or choose "
            "another output_dir"
        )
    old = read_json(config_path)
    if old.pop("settings_version", 1) != SETTINGS_VERSION:
        raise UserError(
            f"output_dir={folder} holds a run of another version of pard_train, whose settings have other names: "
            "choose another output_dir"
        )
    require_same(old, settings, what=f"output_dir={folder} holds a run with other settings")


def claim_run(folder: Path, settings: dict[str, Any], config: dict[str, Any] | None = None, **facts: Any) -> None:
    """Write the settings that decide the result to config.json, all of them to run.json. Called by one process.

    run.json also holds the run's id, which a resumed run and trackers keep, and `facts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, {"settings_version": SETTINGS_VERSION, **settings})
    run_id = os.environ.get("WANDB_RUN_ID") or run_of(folder).get("run_id") or uuid.uuid4().hex[:12]
    write_json(folder / RUN_FILE, {"run_id": run_id, **provenance(), **facts, "config": config})


def run_of(folder: Path) -> dict[str, Any]:
    """run.json of an output folder; empty if it has none."""
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a training run; none if it has no log. Skips a last line that is cut."""
    file = folder / METRICS_FILE
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def claim_product(product: Path, made_from: dict[str, Any]) -> None:
    """Write the inputs of a step into NAME.json beside its product, before the step runs.

    Raises:
        UserError: if the product exists and was made from other inputs.
    """
    record = product.with_name(f"{product.name}.json")
    if product.exists() and record.exists():
        require_same(read_json(record), made_from, what=f"{product} was made from other inputs")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_json(record, made_from)


def require_same(
    old: dict[str, Any], new: dict[str, Any], *, what: str, fix: str = "use the same ones, or choose another output_dir"
) -> None:
    """The one rule for reusing what exists: it must have been made from the same things.

    Args:
        old: JSON-like description of what exists.
        new: the same of what is wanted.
        what: what is wrong if they differ, for the error.
        fix: what to do then.

    Raises:
        UserError: naming every entry that differs, with both values.
    """
    before, after = flatten(_as_json(old)), flatten(_as_json(new))
    changed = [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise UserError(f"{what} ({'; '.join(changed)}): {fix}")


def require_recorded(record: Path, manifest: dict[str, Any], what: str) -> None:
    """Check that a resumed run has the same inputs: other inputs give other packs, some of which it would skip."""
    if record.exists():
        old, run = read_json(record)["identity"], record.parent
        require_same(old, manifest["identity"], what=f"the run in {run} was started with other {what} (see {record})")


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As JSON stores it: tuples become lists, keys become strings."""
    return json.loads(json.dumps(value))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """One row of a table: dotted names, lists as JSON, the command as a shell line.

    >>> flatten({"speed": {"speedup": 2.0}, "histogram": [3, 1]})
    {'speed.speedup': 2.0, 'histogram': '[3, 1]'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "command" and isinstance(value, list):
            flat[prefix + key] = shlex.join(value)
        elif key == "template_kwargs" or isinstance(value, list):
            flat[prefix + key] = json.dumps(value, ensure_ascii=False)
        elif isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def unfinished(path: Path) -> Path:
    """A unique name beside `path` to write to before the result is renamed to `path`. Deletes what killed ones left."""
    mark = f"{path.name}.partial-{platform.node()}-"
    for other in path.parent.glob(f"{glob.escape(mark)}*"):
        if not Path("/proc", other.name.removeprefix(mark).partition("-")[0]).exists():
            shutil.rmtree(other, ignore_errors=True) if other.is_dir() else other.unlink(missing_ok=True)
    return path.with_name(f"{mark}{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file atomically: write to the path yielded, which replaces `path` at the end."""
    partial = unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with new_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # of JSON and of UTF-8
        raise UserError(
            f"{path} is damaged ({error}): restore it, or delete what it describes and run the same command again"
        ) from error


@contextmanager
def new_folder(folder: Path, *, is_shared: bool = False) -> Iterator[Path]:
    """Write a folder atomically: work in the one yielded, which is renamed to `folder` at the end.

    Args:
        folder: must not exist.
        is_shared: several processes may make the same folder; the first one's counts.

    Raises:
        UserError: if the folder exists.
    """
    if folder.exists() and not is_shared:
        raise UserError(f"{folder} already exists: delete it, or choose another folder")
    partial = unfinished(folder)
    partial.mkdir(parents=True)
    try:
        yield partial
        try:
            partial.rename(folder)
        except OSError:
            if not (is_shared and folder.exists()):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_space(folder: Path, needed: float, fix: str) -> None:
    """Raise UserError if the disk of a folder, which need not exist yet, has fewer than `needed` bytes free."""
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(f"output_dir={folder}: {free / 1e9:.1f} GB are free and {needed / 1e9:.1f} GB needed: {fix}")


def fingerprint(value: Any) -> str:
    """Short name of a JSON-like value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance() -> dict[str, Any]:
    """Command, versions, git state, machine and time: what is needed to reproduce a result."""
    return {
        "command": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "versions": package_versions(),
        "git": _git_state(),
    }


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that decide a result; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package is in, and whether it has uncommitted changes; None outside of git."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", ".."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "is_dirty": bool(status.strip())}


def seal_folder(folder: Path) -> None:
    """Record size and checksum of every file of a folder. Written last: a checkpoint without it is incomplete."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL_FILE]
    write_json(folder / SEAL_FILE, {str(p.relative_to(folder)): [p.stat().st_size, _checksum(p)] for p in paths})


def check_sealed(folder: Path, fix: str = "delete {} and run the command that wrote it") -> None:
    """Check size and checksum of every sealed file of a folder; one without a seal passes.

    Raises:
        UserError: naming a missing or damaged file, and what to do, `fix`, about the folder.
    """
    sealed = read_json(folder / SEAL_FILE) if (folder / SEAL_FILE).exists() else {}
    for name, (size, checksum) in sealed.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else 0
        if found != size:
            raise UserError(f"{path} is truncated: {found} bytes of {size}; {fix.format(folder)}")
        if _checksum(path) != checksum:
            raise UserError(f"{path} has changed since it was written: {fix.format(folder)}")


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it finds damage, and reads as fast as a disk."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(CHECKSUM_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, None if it has none. Raises UserError if it is damaged."""
    for checkpoint in _checkpoints(folder):
        if (checkpoint / SEAL_FILE).exists():
            check_sealed(checkpoint, RESUME_BEFORE)
            return checkpoint
        logger.warning("%s is incomplete: skipped", checkpoint)
    return None


def prune_checkpoints(folder: Path, limit: int) -> None:
    """Keep so many of a run's newest complete checkpoints. Delete the others, and what a killed save or delete left."""
    checkpoints = _checkpoints(folder)
    kept = [checkpoint for checkpoint in checkpoints if (checkpoint / SEAL_FILE).exists()][:limit]
    for checkpoint in set(checkpoints) - set(kept):
        (checkpoint / SEAL_FILE).unlink(missing_ok=True)  # first: what a kill leaves is incomplete
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    numbered = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(numbered, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)
