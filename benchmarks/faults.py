"""Injects faults into programs with tiny models, runs them again, and counts how they end.

    python benchmarks/faults.py trials=4 page=docs/explanation/faults.md

Every trial is a fresh folder and a process that is forked from this one, where everything is imported already. Faults:

* kill: SIGKILL before the n-th file operation (open to write, rename, remove, mkdir, rmdir; Python's audit hooks)
* full disk: files cannot grow above a size (RLIMIT_FSIZE)
* handles: few open files (RLIMIT_NOFILE)
* damage: a file that the finished program wrote is emptied, cut in half, or has one byte flipped

Then the same command runs again. `equal`: it gives the result of an uninterrupted one. `one line`: it ends
with one line. `traceback`: either run prints one. `left behind`: unfinished files
stay. `wrong`: it ends well with another result.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")
SECONDS = 180.0  # after which a trial counts as hanging
Setup = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """A program that is interrupted.

    Attributes:
        product: files whose contents are the result, as a glob in the output folder.
        again: what the second command line adds.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    product: str
    again: tuple[str, ...] = ()
    ranks: int = 1


def jobs(base: Path, chats: Path) -> list[Job]:
    """The programs, each on what the one before made in `base.parent`."""
    made, model = base.parent, f"model.path={base}"
    training = (
        *(model, f"data.source={chats}", "draft.num_draft_tokens=4", "data.max_length=256", "data.slot_budget=768"),
        *("trainer.max_steps=4", "trainer.num_train_epochs=4", "trainer.bf16=false", "trainer.logging_steps=1"),
        *("trainer.save_steps=1", "trainer.dataloader_num_workers=0", "logger.page_minutes=0"),
    )
    target = (f"targets=[{base}]", "inference.dtype=float32")
    measured = ("evaluate.num_draft_tokens=[4]", "evaluate.max_new_tokens=12", "evaluate.max_prompts=2")
    prompts = (f"prepare.sources={{mine:{{path:{chats}}}}}", "prepare.decontaminate=[]", "prepare.num_workers=1")
    draft = f"draft.path={made / 'train' / 'out' / 'draft'}"
    return [
        Job("prepare", "data_scripts/prepare.py", prompts, "prompts/*.jsonl"),
        Job(
            "encode",
            "data_scripts/encode.py",
            (model, f"data.source={chats}", "data.num_workers=1"),
            "tokens/*/*.arrow",
        ),
        Job("train", "recipes/train.py", training, "draft/*.safetensors", ("resume=true",)),
        Job("train, DDP", "recipes/train.py", training, "draft/*.safetensors", ("resume=true",), 2),
        Job(
            "train, ZeRO-2",
            "recipes/train.py",
            (*training, "deepspeed=zero2"),
            "draft/*.safetensors",
            ("resume=true",),
            2,
        ),
        Job("export", "recipes/export.py", (model, draft), "**/*.safetensors"),
        Job(
            "evaluate",
            "recipes/evaluate.py",
            (model, draft, *target, f"evaluate.benchmarks=[{chats}]", *measured),
            "acceptance.json",
        ),
    ]


def child(job: Job, folder: Path, rank: int, port: int, arguments: tuple[str, ...], setup: Setup) -> None:
    """The program, in a forked process. Does not return."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    if job.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        sys.argv = [str(ROOT / job.program), f"output_dir={folder / 'out'}", *job.arguments, *arguments]
        sys.path.insert(0, str((ROOT / job.program).parent))
        setup()
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def run(
    job: Job, folder: Path, arguments: tuple[str, ...] = (), setups: dict[int, Setup] | None = None
) -> tuple[int, str]:
    """Run all ranks to their end. Returns the worst status (-9: hangs) and what they print."""
    from tiny import free_port

    (folder / "log").write_text("")
    pids, port, statuses = [], free_port(), []
    for rank in range(job.ranks):
        if not (pid := os.fork()):
            child(job, folder, rank, port, arguments, (setups or {}).get(rank, lambda: None))
        pids.append(pid)
    end, waiting = time.monotonic() + SECONDS, list(pids)
    while waiting:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
                if statuses[-1]:  # as launchers do
                    end = min(end, time.monotonic() + 20)
        if time.monotonic() > end:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return next((status for status in statuses if status), 0), (folder / "log").read_text(errors="replace")


def kill_at(folder: Path, number: int, count_file: Path | None = None) -> Setup:
    """Kill this process before its n-th file operation below a folder; with `count_file`, count them instead."""

    def setup() -> None:
        seen = [0]

        def hook(event: str, arguments: tuple) -> None:
            is_write = event in WRITES or (
                event == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wax"
            )
            if is_write and str(arguments[0]).startswith((f"{folder}/out", f"{folder}/cache")):
                seen[0] += 1
                if count_file is not None:
                    fd = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                    os.write(fd, str(seen[0]).encode())
                    os.close(fd)
                elif seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return setup


def limit(kind: int, most: int) -> Setup:
    """Set a limit of this process."""
    return lambda: resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def product(job: Job, folder: Path) -> dict[str, str]:
    """Names and hashes of the files that are the result."""
    files = sorted(path for path in (folder / "out").glob(job.product) if path.is_file())
    if job.name == "evaluate":  # the file has times, too
        records = json.loads(files[0].read_text())["records"]
        return {str(files[0].relative_to(folder)): str([(record["tau"], record["histogram"]) for record in records])}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def unfinished(folder: Path) -> list[str]:
    """Partial files that stay."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*.partial*")]


def judge(job: Job, folder: Path, expected: dict[str, str], first: tuple[int, str], again: tuple[int, str]) -> set[str]:
    """How a trial ended, in words of the table."""
    status, text = again
    words = set()
    if any("Traceback (most recent call last)" in output for code, output in (first, again) if code >= 0):
        words.add("traceback")
    if status == 0:
        words.add("equal" if product(job, folder) == expected else "wrong")
    else:
        is_line = re.search(r"^\S+: error: ", text, flags=re.MULTILINE) and "traceback" not in words
        words.add("one line" if is_line else "failed")
    if unfinished(folder):
        words.add("left behind")
    return words


def damages(job: Job, whole: Path, draw: random.Random, number: int) -> list[tuple[str, Callable[[Path], None]]]:
    """Some damages of files that the program would read again."""
    results = {whole / name for name in product(job, whole)}  # what nobody reads again
    files = [p for p in (whole / "out").rglob("*") if p.is_file() and p.stat().st_size and p not in results]
    chosen = []
    for path in draw.sample(files, min(number, len(files))):
        kind = draw.choice(["empty", "half", "flip"])

        def damage(folder: Path, path: Path = path, kind: str = kind) -> None:
            mine = folder / path.relative_to(whole)
            data = bytearray(mine.read_bytes())
            if kind == "flip":
                data[len(data) // 2] ^= 0x10
            mine.write_bytes(data if kind == "flip" else data[: len(data) // 2] if kind == "half" else b"")

        chosen.append((f"{kind} {path.relative_to(whole / 'out')}", damage))
    return chosen


def try_job(job: Job, made: Path, trials: int, draw: random.Random) -> dict[str, Counter[str]]:
    """All faults of one program, by kind."""
    whole = made / job.name.replace(", ", "-")
    whole.mkdir()
    counted = whole / "count"
    status, text = run(job, whole, (), {0: kill_at(whole, 0, counted)})
    assert status == 0, text[-3000:]
    expected, number = product(job, whole), int(counted.read_text())
    assert expected, f"{job.name} made nothing"
    table: dict[str, Counter[str]] = {}
    if not trials:
        return table

    def trial(kind: str, what: str, setups: dict[int, Setup], prepare: Callable[[Path], None] | None = None) -> None:
        folder = Path(tempfile.mkdtemp(dir=made))
        if prepare:
            shutil.copytree(whole / "out", folder / "out")
            prepare(folder)
            first = (0, "")
        else:
            first = run(job, folder, (), {rank: moved(folder) for rank, moved in setups.items()})
        again = run(job, folder, job.again)
        words = judge(job, folder, expected, first, again)
        table.setdefault(kind, Counter()).update(words | {"trials"})
        print(f"{job.name}: {kind} {what}: {', '.join(sorted(words))} ({first[0]}, {again[0]})", flush=True)
        if words & {"traceback", "wrong", "failed", "left behind"}:
            lines = [line for line in (first[1] + again[1]).splitlines() if line.strip()][-4:]
            print("    " + "\n    ".join([*unfinished(folder), *lines]), flush=True)
        shutil.rmtree(folder, ignore_errors=True)

    for n in sorted(draw.sample(range(1, number + 1), min(trials, number))):
        victims = [0] if job.ranks == 1 else draw.choice([[0], list(range(job.ranks))])
        trial(f"kill ({number} operations)", f"at {n}", {v: lambda f, n=n: kill_at(f, n) for v in victims})
    if job.ranks == 1:
        for size in draw.sample([100, 1_000, 10_000, 50_000, 100_000, 200_000], max(1, trials // 2)):
            trial("full disk", f"above {size}", {0: lambda f, size=size: limit(resource.RLIMIT_FSIZE, size)})
        for files in draw.sample([12, 20, 30, 40], max(1, trials // 4)):
            trial("handles", f"{files}", {0: lambda f, files=files: limit(resource.RLIMIT_NOFILE, files)})
        for what, damage in damages(job, whole, draw, trials):
            trial("damage", what, {}, damage)
    return table


COLUMNS = ("trials", "equal", "one line", "traceback", "left behind", "failed", "wrong")


def main() -> None:
    """Run all jobs, and write the table."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    import tiny
    import torch
    import transformers  # noqa: F401

    import pard_train.evaluation.evaluate
    import pard_train.publishing.export
    import pard_train.targets.regeneration
    import pard_train.training.checkpoints  # noqa: F401

    torch.set_num_threads(1)
    made = Path(tempfile.mkdtemp(prefix="faults-"))
    base, chats = made / "base", made / "chats.jsonl"
    tiny.build_model("qwen2", seed=0).save_pretrained(base)
    tiny.build_tokenizer().save_pretrained(base)
    rows = [{"messages": messages} for messages in tiny.conversations(40, seed=0)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = ["| program | fault | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for job in jobs(base, chats):
        trials = int(given.get("trials", 4))
        if given.get("only", job.name) != job.name:
            if job.name != "train":  # whose draft others read
                continue
            trials = 0
        for kind, counts in try_job(job, made, trials, random.Random(int(given.get("seed", 0)))).items():
            rows.append(f"| {job.name} | {kind} | " + " | ".join(str(counts[name]) for name in COLUMNS) + " |")
    print("\n".join(rows))
    if page := given.get("page"):
        text = Path(page).read_text()
        Path(page).write_text(re.sub(r"\| program \| fault .*?\n\n", "\n".join(rows) + "\n\n", text, flags=re.DOTALL))
    shutil.rmtree(made)


if __name__ == "__main__":
    main()
