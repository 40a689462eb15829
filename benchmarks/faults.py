"""Injects faults into programs with tiny models, runs them again, and counts how they end.

    python benchmarks/faults.py trials=4 page=docs/explanation/faults.md
    python benchmarks/faults.py only="train DDP,train ZeRO-1" trials=3 seed=1 fault=kill

Every trial is a fresh folder and processes that are forked from this one, where everything is imported already. Faults:

* kill: SIGKILL before the n-th file operation (open to write, rename, remove, mkdir, rmdir; Python's audit hooks) of
  process 0. With two, both die (a node) or process 0 alone, or process 1 at a random time
* full disk: a file that the program writes lacks its last byte (RLIMIT_FSIZE, which also cuts larger ones)
* handles: few open files (RLIMIT_NOFILE)
* damage: a file that the finished program wrote is emptied, cut in half, or has one bit flipped

Then the same command runs again. `equal`: it gives the result of an uninterrupted one. `one line`: it ends
with one line. `traceback`: either run prints one. `left behind`: unfinished files or folders that an uninterrupted run
does not have stay. `wrong`: it ends well with another result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
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
BUILD_SECONDS = 900.0  # the same for the uninterrupted run, in which DeepSpeed may compile
KEPT = ("out", "cache")  # folders of a trial that programs write
Setup = Callable[[], None]


@dataclass(frozen=True)
class Job:
    """A program that is interrupted.

    Attributes:
        product: files whose contents are the result, as a glob in the output folder.
        needs: the job whose output it reads.
        given: folder of that output which the output folder has at the start.
        again: what the second command line adds.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    product: str
    needs: str = ""
    given: str = ""
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
    written = (f"regenerate.prompts={chats}", "regenerate.max_new_tokens=8", "inference.batch_size=8")
    draft = f"draft.path={made / 'train' / 'out' / 'draft'}"

    def train(name: str, *settings: str, ranks: int = 1) -> Job:
        arguments = (*training, *settings)
        return Job(name, "recipes/train.py", arguments, "draft/*.safetensors", again=("resume=true",), ranks=ranks)

    return [
        Job("prepare", "data_scripts/prepare.py", prompts, "prompts/*.jsonl"),
        Job("regenerate", "data_scripts/regenerate.py", (model, *target, *written), "answers/answers.jsonl"),
        Job(
            "encode",
            "data_scripts/encode.py",
            (model, f"data.source={chats}", "data.num_workers=1"),
            "tokens/*/*.arrow",
        ),
        Job(
            "score",
            "data_scripts/score.py",
            (model, *target, "score.top_k=4", "score.batch_tokens=400"),
            "tokens/scores/*/*.npy",
            needs="encode",
            given="tokens",
        ),
        train("train"),
        train("train DDP", ranks=2),
        *(train(f"train ZeRO-{stage}", f"deepspeed=zero{stage}", ranks=2) for stage in range(4)),
        Job("export", "recipes/export.py", (model, draft), "**/*.safetensors", needs="train"),
        Job(
            "evaluate",
            "recipes/evaluate.py",
            (model, draft, *target, f"evaluate.benchmarks=[{chats}]", *measured),
            "acceptance.json",
            needs="train",
        ),
    ]


def child(job: Job, folder: Path, rank: int, port: int, arguments: tuple[str, ...], setup: Setup, log: int) -> None:
    """The program, in a forked process. Does not return."""
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
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def run(
    job: Job,
    folder: Path,
    arguments: tuple[str, ...] = (),
    setups: dict[int, Setup] | None = None,
    grace: float = 20,
    seconds: float = SECONDS,
) -> tuple[int, str]:
    """Run all ranks to their end, at most `grace` seconds after the first failure, as launchers do.

    Returns the first status that is not 0 (-9: hangs) and what they print, through a pipe: a log is no file of theirs.
    """
    from tiny import free_port

    pids, port, statuses = [], free_port(), []
    with (folder / "log").open("w") as log:
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    assert pipe.stdin is not None
    for rank in range(job.ranks):
        if not (pid := os.fork()):
            child(job, folder, rank, port, arguments, (setups or {}).get(rank, lambda: None), pipe.stdin.fileno())
        pids.append(pid)
    end, waiting = time.monotonic() + seconds, list(pids)
    while waiting:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.remove(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
                if statuses[-1]:
                    end = min(end, time.monotonic() + grace)
        if time.monotonic() > end:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    pipe.stdin.close()
    pipe.wait(SECONDS)
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


def kill_after(seconds: float) -> Setup:
    """Kill this process after a time: nothing handles SIGALRM."""
    return lambda: signal.setitimer(signal.ITIMER_REAL, seconds) and None


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


def left_behind(folder: Path, whole: Path) -> list[str]:
    """Partial files that stay, and folders that an uninterrupted run does not have."""
    folders = [path.relative_to(folder) for path in (folder / "out").rglob("*") if path.is_dir()]
    partial = [path.relative_to(folder) for path in folder.rglob("*.partial*")]
    return sorted({str(path) for path in partial + [path for path in folders if not (whole / path).is_dir()]})


def judge(job: Job, folder: Path, whole: Path, first: tuple[int, str], again: tuple[int, str]) -> set[str]:
    """How a trial ended, in words of the table."""
    status, text = again
    words = set()
    if any("Traceback (most recent call last)" in output for code, output in (first, again) if code >= 0):
        words.add("traceback")
    if status == 0:
        words.add("equal" if product(job, folder) == product(job, whole) else "wrong")
    else:
        is_line = re.search(r"^\S+: error: ", text, flags=re.MULTILINE) and "traceback" not in words
        words.add("one line" if is_line else "failed")
    if left_behind(folder, whole):
        words.add("left behind")
    return words


def damages(job: Job, whole: Path, draw: random.Random, number: int) -> list[tuple[str, Callable[[Path], None]]]:
    """Some damages of files that the program would read again."""
    results = {whole / name for name in product(job, whole)}  # what nobody reads again
    files = [p for top in KEPT for p in sorted((whole / top).rglob("*"))]
    files = [p for p in files if p.is_file() and p.stat().st_size and p not in results]
    chosen = []
    for path in draw.sample(files, min(number, len(files))):
        kind = draw.choice(["empty", "half", "flip"])

        def damage(folder: Path, path: Path = path, kind: str = kind) -> None:
            mine = folder / path.relative_to(whole)
            data = bytearray(mine.read_bytes())
            if kind == "flip":
                data[len(data) // 2] ^= 0x10
            mine.write_bytes(data if kind == "flip" else data[: len(data) // 2] if kind == "half" else b"")

        chosen.append((f"{kind} {path.relative_to(whole)}", damage))
    return chosen


def try_job(job: Job, made: Path, trials: int, draw: random.Random, only: str = "") -> dict[str, Counter[str]]:
    """All faults of one program, or those whose kind begins with `only`, by kind."""
    whole, needed = made / job.name.replace(" ", "-"), made / job.needs.replace(" ", "-") / "out"

    def start(folder: Path) -> Path:
        if job.given:
            shutil.copytree(needed / job.given, folder / "out" / job.given)
        return folder

    whole.mkdir()
    began = time.monotonic()
    status, text = run(job, start(whole), (), {0: kill_at(whole, 0, whole / "count")}, seconds=BUILD_SECONDS)
    seconds = time.monotonic() - began
    assert status == 0, text[-3000:]
    number = int((whole / "count").read_text())
    assert product(job, whole), f"{job.name} made nothing"
    table: dict[str, Counter[str]] = {}

    def trial(kind: str, what: str, setups: dict[int, Setup], damage: Setup | None = None, grace: float = 20) -> None:
        if not kind.startswith(only):
            return
        folder = Path(tempfile.mkdtemp(dir=made))
        if damage:
            for top in KEPT:
                if (whole / top).exists():
                    shutil.copytree(whole / top, folder / top)
            damage(folder)
            first = (0, "")
        else:
            first = run(job, start(folder), (), {rank: setup(folder) for rank, setup in setups.items()}, grace)
        again = run(job, folder, job.again)
        words = judge(job, folder, whole, first, again)
        table.setdefault(kind, Counter()).update(words | {"trials"})
        print(f"{job.name}: {kind} {what}: {', '.join(sorted(words))} ({first[0]}, {again[0]})", flush=True)
        if words & {*BAD, "one line"}:
            for _, text in (first, again):
                print("    " + "\n    ".join([line for line in text.splitlines() if line.strip()][-6:]), flush=True)
            print("    left: ", *left_behind(folder, whole), flush=True)
        shutil.rmtree(folder, ignore_errors=True)

    kill, everyone = f"kill ({number} operations)", range(job.ranks)
    for n in sorted(draw.sample(range(1, number + 1), min(trials, number))):
        grace = draw.choice([0, 20]) if job.ranks > 1 else 20  # the whole node, or the first process
        trial(kill, f"at {n}", {0: lambda folder, n=n: kill_at(folder, n)}, grace=grace)
    for _ in range(trials if job.ranks > 1 else 0):
        moment = draw.uniform(0.2, 1.0) * seconds
        trial("kill of process 1", f"at {moment:.1f} s", {1: lambda _, moment=moment: kill_after(moment)})
    sizes = sorted({path.stat().st_size for top in KEPT for path in (whole / top).rglob("*") if path.is_file()} - {0})
    for size in draw.sample(sizes, min(len(sizes), (trials + 1) // 2)):
        limits = {r: lambda _, size=size: limit(resource.RLIMIT_FSIZE, size - 1) for r in everyone}
        trial("full disk", f"below {size:,} bytes", limits)
    for files in draw.sample(range(5, 25), min((trials + 3) // 4, 20)):
        limits = {r: lambda _, files=files: limit(resource.RLIMIT_NOFILE, files) for r in everyone}
        trial("handles", f"{files}", limits)
    for what, damage in damages(job, whole, draw, trials):
        trial("damage", what, {}, damage)
    return table


BAD = ("traceback", "left behind", "failed", "wrong")
COLUMNS = ("trials", "equal", "one line", *BAD)


def main() -> None:
    """Run all jobs, and write the table."""
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    import tiny
    import torch
    import transformers  # noqa: F401
    from torch.utils.cpp_extension import get_default_build_root

    import pard_train.evaluation.evaluate
    import pard_train.publishing.export
    import pard_train.targets.regeneration
    import pard_train.targets.scoring
    import pard_train.training.checkpoints  # noqa: F401

    torch.set_num_threads(1)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", get_default_build_root())  # else DeepSpeed compiles in every trial
    made = Path(tempfile.mkdtemp(prefix="faults-"))
    base, chats = made / "base", made / "chats.jsonl"
    tiny.build_model("qwen2", seed=0).save_pretrained(base)
    tiny.build_tokenizer().save_pretrained(base)
    rows = [{"messages": messages} for messages in tiny.conversations(40, seed=0)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = ["| program | fault | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 2) + "|"]
    every = jobs(base, chats)
    chosen = given["only"].split(",") if "only" in given else [job.name for job in every]
    needed = {job.needs for job in every if job.name in chosen}
    for job in every:
        if job.name not in {*chosen, *needed}:
            continue
        trials = int(given.get("trials", 4)) if job.name in chosen else 0
        draw = random.Random(int(given.get("seed", 0)))
        for kind, counts in try_job(job, made, trials, draw, given.get("fault", "")).items():
            rows.append(f"| {job.name} | {kind} | " + " | ".join(str(counts[name]) for name in COLUMNS) + " |")
    print("\n".join(rows))
    if page := given.get("page"):
        text = Path(page).read_text()
        Path(page).write_text(re.sub(r"\| program \| fault .*?\n\n", "\n".join(rows) + "\n\n", text, flags=re.DOTALL))
    shutil.rmtree(made)


if __name__ == "__main__":
    main()
