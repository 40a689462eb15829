"""Check an environment before a run: one line a check, and what to do.

    python recipes/doctor.py output_dir=outputs/my-draft
    PROGRAM=recipes/doctor.py launch/torchrun.sh output_dir=outputs/my-draft     # every process of a node or job

Checks packages, devices, messages between processes, disks, clocks and limits. Exit status 1: a check failed.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pard_train.config import Config, check_ranges
from pard_train.program import hydra_program
from pard_train.runs import num_cores

LOCK_SECONDS = 900  # longer than DeepSpeed compiles an extension
DISKS = {
    "free space": (None, 10, "free some"),
    "shared memory": ("/dev/shm", 1, "docker run --ipc=host, or delete deepspeed_* of killed runs"),
}  # GB


def run(config: Config) -> None:
    """Check every process; the first one prints."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from pard_train.device import default_device

    process = PartialState(cpu=default_device().type == "cpu", timeout=timedelta(minutes=2))
    everyone = gather_object([list(checks(Path(config.output_dir), process))])
    for ranks in zip(*everyone, strict=True) if process.is_main_process else ():
        for number, (name, is_fine, found, fix) in enumerate(ranks):
            if number == 0 or not is_fine or found != ranks[0][2]:
                rank = f"process {number}: " if number or not is_fine else ""
                print(f"{'ok  ' if is_fine else 'FAIL'}  {name}: {rank}{found}{'' if is_fine else f': {fix}'}")
    sys.exit(int(not all(check[1] for one in everyone for check in one)))


def checks(folder: Path, process: Any) -> Iterator[tuple[str, bool, str, str]]:
    """Of one process: name, whether it passed, what was found, what to do. All processes take part."""
    import torch
    from accelerate.utils import gather_object, reduce

    from pard_train.device import default_device, device_name, who_sees

    pip = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    wrong = [line for line in (pip.stdout or pip.stderr).splitlines() if line.startswith("pard") or not pip.stdout]
    yield "packages", not wrong, "; ".join(wrong) or f"PyTorch {torch.__version__}", "pip install what is named"
    count, local = torch.accelerator.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = f"{count} x {device_name()}" if count else f"no GPU; {device_name()}"
    has_driver = any(map(os.path.exists, ("/dev/kfd", "/dev/nvidiactl")))  # of AMD, of NVIDIA
    fix = f"{local} processes on this node: start {count}" if count else "install the PyTorch build of your driver"
    yield "devices", count >= local if count else not has_driver, found, fix
    library = f"{'RCCL' if torch.version.hip else 'NCCL'} {torch.cuda.nccl.version()}" if count else "Gloo"
    ones = torch.ones(4, 4, device=default_device())
    is_right = float(reduce(ones @ ones, "sum")[0, 0]) == 4 * process.num_processes
    yield "messages", is_right, f"{library}, {process.num_processes} processes", "see what NCCL_DEBUG=INFO prints"
    folder.mkdir(parents=True, exist_ok=True)
    is_shared = who_sees(folder, process)[process.process_index]
    yield "shared disk", is_shared, f"{folder}", "choose an output_dir on a disk that all nodes share"
    now = gather_object([time.time()])
    yield "clock", max(now) - min(now) < 2, f"{max(now) - min(now):.1f} s apart", "run chrony or ntpd on all nodes"
    for name, (path, least, fix) in DISKS.items():
        is_fine = shutil.disk_usage(path or folder).free > least * 1e9
        yield name, is_fine, f"{path or folder} has {'' if is_fine else 'less than '}{least} GB", fix
    yield "cores", num_cores() >= local, f"{num_cores()} for {local} processes", "sbatch --cpus-per-task N"
    built = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    old = [str(lock) for lock in built.rglob("lock") if time.time() - lock.stat().st_mtime > LOCK_SECONDS]
    fix = "delete it: a killed process left it, and DeepSpeed waits for it without a word"
    yield "extension locks", not old, ", ".join(old) or "none left", fix
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield "open files", files >= 1024, f"{files} allowed", "ulimit -n 4096"


if __name__ == "__main__":
    hydra_program("doctor", check_ranges, run)
