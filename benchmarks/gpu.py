"""Measure everything on one GPU, part by part, in calls of a fixed length.

    python benchmarks/gpu.py --minutes 9 --output outputs/gpu             # then, until nothing is left:
    python benchmarks/gpu.py --minutes 9 --output outputs/gpu --resume
    python benchmarks/gpu.py --rehearse --output outputs/rehearsal        # all of it, tiny, on the CPU
    python benchmarks/gpu.py --list-needs                                 # for a machine without a network
    python benchmarks/gpu.py --minutes 9 --output outputs/gpu --needs FOLDER

Every part runs in its own process with a time limit. It leaves PART.json, PART.md and PART.log in the output folder,
and summary.md compares the figures so far with their goals. A part that no longer fits into the call is left for the
next one. --resume runs what is not done: parts never tried first, then those that failed, timed out or were skipped.
Exit status 1: a part failed or timed out. docs/guides/gpu.md has the details.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a bare machine has no installed pard_train

from gpu_needs import missing_files, print_needs, read_names, read_needs
from gpu_parts import GOALS, ROOT, Part, Plan, shown
from pages import RESULTS_VARIABLE, markdown

from pard_train.errors import UserError
from pard_train.runs import provenance, read_json, write_json

DONE, FAILED, TIMED_OUT, SKIPPED = "done", "failed", "timed out", "skipped"  # states of a part
RESERVE = 5.0  # seconds of a call kept for its last pages
LOG_LINES = 15  # of a failed part, on its page
DEVICE = """
import json, torch
from pard_train.device import default_device, device_name
device = default_device()
about = {"card": device_name(), "torch": torch.__version__}
if device.type != "cpu":
    properties = torch.get_device_module(device).get_device_properties(device)
    about |= {"memory": f"{properties.total_memory / 2**30:.1f} GiB", "processors": properties.multi_processor_count}
print(json.dumps(about))
"""

Record = dict[str, Any]  # of a part: its state, seconds, command, figures, and what the call is about


def main() -> None:
    """Read the command line, then print what is needed, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of records, pages and summary.md")
    parser.add_argument("--minutes", type=float, default=9.0, help="of the whole call")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--resume", action="store_true", help="run what is not done in the output folder")
    parser.add_argument("--rehearse", action="store_true", help="every part at tiny size on the CPU")
    parser.add_argument("--commit", help="for the pages, if the checkout has no git")
    parser.add_argument("--needs", type=Path, help="folder of wheels and files; nothing is downloaded then")
    parser.add_argument("--list-needs", action="store_true", help="print the commands that fill such a folder")
    parser.add_argument("--have", type=Path, help="with --list-needs: `pip list` of that machine")
    parser.add_argument("--json", action="store_true", help="with --list-needs: what it holds, as JSON")
    arguments = parser.parse_args()
    if arguments.list_needs:
        return print_needs(read_names(arguments.have) if arguments.have else (), as_json=arguments.json)
    if arguments.output is None:
        parser.error("--output DIR is required")
    try:
        sys.exit(measure(arguments))
    except UserError as error:
        sys.exit(f"gpu.py: {error}")


def measure(arguments: argparse.Namespace) -> int:
    """Run the parts within the time. Returns the exit status.

    Raises:
        UserError: for an unknown part, an output folder with results but without --resume, or unusable needs.
    """
    started, folder = time.monotonic(), arguments.output.resolve()
    parts = Plan(folder, arguments.rehearse).parts()
    names = [part.name for part in parts]
    if unknown := set(arguments.parts or ()) - set(names):
        raise UserError(f"--parts {' '.join(sorted(unknown))}: allowed are {', '.join(names)}")
    if not arguments.resume and read_records(names, folder):
        raise UserError(f"--output {arguments.output} holds results: add --resume, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    set_environment(arguments)
    about = describe(arguments.commit)
    chosen = [part for part in parts if part.name in (arguments.parts or names)]
    left = run_parts(chosen, folder, 60 * arguments.minutes - (time.monotonic() - started), about)
    records = read_records(names, folder)
    summary = render_summary(names, records, about)
    (folder / "summary.md").write_text(summary)
    print(f"\n{summary}\nwritten to {folder / 'summary.md'}")
    if left:
        print(f"left for the next call, with --resume: {', '.join(left)}")
    return int(any(record["state"] in (FAILED, TIMED_OUT) for record in records.values()))


def set_environment(arguments: argparse.Namespace) -> None:
    """Set what every part inherits: where packages and files are, output without delay, the CPU for a rehearsal."""
    needs = read_needs(arguments.needs) if arguments.needs else {}
    paths = [str(ROOT), needs.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    os.environ |= {
        **needs,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_MININTERVAL": "10",  # every refresh is a line of the log
    }
    if arguments.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}


def describe(commit: str | None) -> dict[str, Any]:
    """Device, commit and command of this call. A process of its own asks for the device: it takes memory on it.

    Raises:
        UserError: if PyTorch cannot use the device.
    """
    result = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"no device: {(result.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    git = provenance()["git"] or {"commit": "unknown", "is_dirty": False}
    dirty = " with changes" if git["is_dirty"] else ""
    return {
        "device": json.loads(result.stdout.splitlines()[-1]),
        "commit": commit or git["commit"][:12] + dirty,
        "call": f"python {shlex.join(sys.argv)}",
    }


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def run_parts(parts: Sequence[Part], folder: Path, seconds: float, about: Mapping[str, Any]) -> list[str]:
    """Run the parts that are not done, within the seconds. Returns the names of those left for the next call.

    Args:
        parts: in order.
        folder: of records and pages.
        seconds: for all of them.
        about: device, commit and command of the call, for the pages.
    """
    deadline = time.monotonic() + seconds - RESERVE
    names = [part.name for part in parts]
    records = read_records(names, folder)
    todo = [part for part in parts if records.get(part.name, {}).get("state") != DONE]
    todo.sort(key=lambda part: part.name in records)  # parts never tried first
    left: list[str] = []
    for part in todo:
        remaining = deadline - time.monotonic()
        if remaining < part.least or part.after in left:
            left.append(part.name)
            print(f"{part.name}: left for the next call, {remaining:.0f} s remain", flush=True)
            continue
        record = records[part.name] = {**run_part(part, folder, min(part.limit, remaining)), **about}
        write_json(folder / f"{part.name}.json", record)
        (folder / f"{part.name}.md").write_text(render_part(part, record, folder))
        (folder / "summary.md").write_text(render_summary(names, records, about))
        print(f"{part.name}: {record['state']} after {record['seconds']} s. {record['reason']}", flush=True)
    return left


def read_records(names: Iterable[str], folder: Path) -> dict[str, Record]:
    """Records of earlier calls, by part."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: read_json(path) for name, path in paths.items() if path.exists()}


def run_part(part: Part, folder: Path, limit: float) -> Record:
    """Run one part in a process group of its own, of which nothing is left afterwards, and return its record."""
    started, date = time.monotonic(), time.strftime("%Y-%m-%d %H:%M")

    def _record(state: str, reason: str = "", command: Sequence[str] = ()) -> Record:
        return {
            "state": state,
            "reason": reason,
            "seconds": round(time.monotonic() - started, 1),
            "date": date,
            "command": shlex.join(command),
            "figures": read_figures(folder / part.name),
        }

    if missing := missing_files(part.files):
        return _record(SKIPPED, f"not there: {', '.join(missing)} (see --list-needs)")
    command, results, log = list(part.command(limit)), folder / part.name, folder / f"{part.name}.log"
    results.mkdir(exist_ok=True)
    print(f"\n{part.name}: {part.title}, at most {limit:.0f} s\n$ {shlex.join(command)}", flush=True)
    try:
        status = run_command(command, log, limit, {RESULTS_VARIABLE: str(results)})
    except subprocess.TimeoutExpired:
        return _record(TIMED_OUT, f"ended at its limit of {limit:.0f} s", command)
    if status:
        return _record(FAILED, f"exit status {status}: {(tail(log) or ['no output'])[-1]}", command)
    return _record(DONE, "", command)


def run_command(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> int:
    """Run a command with its output in a file and on the terminal. Returns its exit status.

    Raises:
        subprocess.TimeoutExpired: at the limit, after its process group was killed.
    """
    with log.open("w") as file, subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:  # fmt: skip
        echo = Thread(target=_echo, args=(process.stdout, file))
        echo.start()
        try:
            return process.wait(timeout=limit)
        finally:
            with suppress(ProcessLookupError):  # none is left
                os.killpg(process.pid, signal.SIGKILL)
            echo.join()


def _echo(output: IO[str], log: IO[str]) -> None:
    for line in output:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()


def tail(log: Path) -> list[str]:
    """The last lines of a log that are not empty."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LOG_LINES:]


def read_figures(results: Path) -> dict[str, Any]:
    """All figures that a part has written, also one that was ended at its limit."""
    figures: dict[str, Any] = {}
    for path in sorted(results.glob("*.json")):
        with suppress(ValueError):  # half a file
            figures |= json.loads(path.read_text())
    for path in results.glob("junit.xml"):
        suite = next(ElementTree.parse(path).iter("testsuite"))
        total, skipped, *failed = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors"))
        if skipped < total:  # without a GPU all of them skip themselves
            figures |= {"passed": total - skipped - sum(failed), "skipped": skipped, "failed": sum(failed)}
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


def render_about(about: Mapping[str, Any]) -> list[str]:
    """Device, commit and command of a call."""
    device = ", ".join(f"{name} {value}" for name, value in about["device"].items())
    return [f"{device}; commit {about['commit']}.", "", f"    {about['call']}", ""]


def render_part(part: Part, record: Record, folder: Path) -> str:
    """The page of a part: what ran and how it ended, then the pages that it wrote."""
    lines = [f"# {part.title}", "", f"{record['date']}: {record['state']} after {record['seconds']} s.", ""]
    lines += [*render_about(record), f"    {record['command']}", ""]
    if record["reason"]:
        lines += [record["reason"], ""]
    if record["state"] in (FAILED, TIMED_OUT):
        lines += [*(f"    {line}" for line in tail(folder / f"{part.name}.log")), ""]
    pages = [path.read_text() for path in sorted((folder / part.name).glob("*.md"))]
    return "\n".join([*lines, *(re.sub("^#", "##", page, flags=re.MULTILINE) for page in pages)])


def render_summary(names: Iterable[str], records: Mapping[str, Record], about: Mapping[str, Any]) -> str:
    """Every goal with its figure and verdict, and the state of every part."""
    goals = [["figure", "goal", "measured", "verdict", "part"]]
    for goal in GOALS:
        value = records.get(goal.part, {}).get("figures", {}).get(goal.figure)
        measured = "" if value is None else shown(value)
        goals.append([goal.title, goal.wanted, measured, goal.verdict(value), goal.part])
    states = [["part", "state", "seconds", "date", "reason"]]
    left = {"state": "left for the next call"}
    for name in names:
        record = records.get(name, left)
        states.append([name, *(str(record.get(field, "")).replace("|", "/") for field in states[0][1:])])
    tables = [markdown(rows, is_shown=False) for rows in (goals, states)]
    title = f"# Figures on a GPU, {time.strftime('%Y-%m-%d')}"
    return "\n".join([title, "", *render_about(about), tables[0], "", tables[1], ""])


if __name__ == "__main__":
    main()
