"""Real launchers with two CPU processes give the losses of one process at equal global batch."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import experiment, free_port

from pard_train.overrides import check_overrides, unread
from pard_train.training.trainer import train

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "recipes/train.py"],
    "deepspeed": ["deepspeed", "--no_local_rank", "--num_gpus", "2", "--master_port", "PORT", "recipes/train.py"],
    "launch/torchrun.sh": ["launch/torchrun.sh"],
    "launch/deepspeed.sh": ["launch/deepspeed.sh"],
}
STEPS = 4


def settings_of(base: Path, chats: Path, output_dir: Path) -> list[str]:
    """Overrides of recipes/train.py for a short run."""
    return [
        f"model.path={base}",
        f"data.source={chats}",
        f"output_dir={output_dir}",
        "draft.num_draft_tokens=4",
        "data.max_length=256",
        "data.slot_budget=768",
        f"trainer.max_steps={STEPS}",
        "trainer.learning_rate=1e-3",
        "trainer.bf16=false",
        "trainer.logging_steps=1",
        "trainer.save_steps=2",
        "trainer.dataloader_num_workers=0",
    ]


def run_all(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """Run commands side by side, each in a process group of its own, and return what they print."""
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher's children too
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-5000:]
    return outputs


def launch(launcher: str, base: Path, chats: Path, output_dir: Path, *overrides: str) -> str:
    """Run recipes/train.py on two processes and return what it prints."""
    port = str(free_port())
    command = [port if part == "PORT" else part for part in LAUNCHERS[launcher]]
    command += [*settings_of(base, chats, output_dir), *overrides]
    return run_all([command], [{"NUM_PROCESSES": "2", "MASTER_PORT": port}])[0]


def log_of(output_dir: Path) -> list[dict[str, float]]:
    """What a run logged, step by step."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


@pytest.fixture(scope="module")
def alone(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process that accumulates two packs per step."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    settings = {"num_train_epochs": 4, "max_steps": STEPS, "gradient_accumulation_steps": 2}
    train(experiment(base_folder, chats_file, folder, **settings))
    return folder


def check_as_alone(run: Path, alone: Path) -> None:
    """A run has the losses and, but for rounding, the weights of the one in one process."""
    expected = log_of(alone)[:STEPS]
    for mine, theirs in zip(log_of(run), expected, strict=True):
        for name in ("loss", "accepted_length", "supervised_slots", "accuracy/depth_1"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), (name, mine["step"])
    ours, reference = (load_file(folder / "draft" / "model.safetensors") for folder in (run, alone))
    assert ours.keys() == reference.keys()
    worst = max(float((ours[name].float() - reference[name]).abs().max()) for name in ours)
    assert worst < STEPS * 1e-3  # Adam moves a weight by at most the learning rate a step
    assert len(list(run.glob("checkpoint-*/files.json"))) == 2
    checkpoint = load_file(run / f"checkpoint-{STEPS}" / "model.safetensors")  # gathered from all shards
    assert checkpoint.keys() == ours.keys()
    assert all(torch.equal(checkpoint[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("launcher", "deepspeed"),
    [
        ("launch/torchrun.sh", "none"),
        ("deepspeed", "zero3"),
        pytest.param("torchrun", "zero2", marks=pytest.mark.slow),
        pytest.param("deepspeed", "zero0", marks=pytest.mark.slow),
        pytest.param("launch/deepspeed.sh", "zero1", marks=pytest.mark.slow),
        pytest.param("deepspeed", "zero2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_as_one(
    launcher: str, deepspeed: str, alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    output = launch(launcher, base_folder, chats_file, run, f"deepspeed={deepspeed}")
    check_as_alone(run, alone)
    assert output.count("draft model: ") == 1  # one process says what comes next
    assert all(0 < row["throughput/data_wait_share"] < 1 for row in log_of(run))


def test_a_run_and_its_resumption_print_no_noise_of_libraries(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "recipes/train.py", *settings_of(base_folder, chats_file, tmp_path / "run")]
    output = run_all([command], [{}])[0]
    for name in ("draft", f"checkpoint-{STEPS}"):
        shutil.rmtree(tmp_path / "run" / name)
    output += run_all([[*command, "resume=true"]], [{}])[0]
    assert output.count("draft model: ") == 2
    for noise in ("Loading weights", "Writing model shards", "real_accelerator", "missing keys", "Warning"):
        assert noise not in output


@pytest.mark.slow  # the SLURM job below has two nodes, too
def test_two_nodes_train_as_one(alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    nodes = {"NUM_NODES": "2", "NUM_PROCESSES": "1", "MASTER": f"127.0.0.1:{free_port()}"}
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, tmp_path / "run")]
    run_all([command] * 2, [{**nodes, "NODE_RANK": str(rank)} for rank in range(2)])
    check_as_alone(tmp_path / "run", alone)


def test_processes_with_other_settings_are_named_before_the_first_step(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    nodes = {"NUM_NODES": "2", "NUM_PROCESSES": "1", "MASTER": f"127.0.0.1:{free_port()}", "OMP_NUM_THREADS": "1"}
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, tmp_path / "run")]
    environment = {**os.environ, **nodes, "PATH": f"{BIN}:{os.environ['PATH']}"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    tasks = [
        subprocess.Popen([*command, *more], cwd=ROOT, env={**environment, "NODE_RANK": str(rank)}, **pipes)
        for rank, more in enumerate(([], ["trainer.learning_rate=0.5"]))
    ]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert all(task.returncode for task in tasks)
    for output in outputs:
        assert "process 1 differs from process 0 (trainer.learning_rate: 0.001 -> 0.5)" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


KILL = """
import os, signal, sys
from transformers import Trainer
import train
from pard_train.program import hydra_program
from pard_train.validation import validate_train

step = Trainer.training_step

def dying(self, *args, **kwargs):
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], self.state.global_step) == ("0", "1", 3):
        print("killed in step 4", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

Trainer.training_step = dying
sys.argv[0] = train.__file__
hydra_program("train", validate_train, train.run)
"""
DYING = """
import os, signal, torch
from pard_train.device import renew_rendezvous, this_process
renew_rendezvous()
process = this_process()
ones = torch.ones(1)
torch.distributed.all_reduce(ones)
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
print(f"attempt {attempt} at port {os.environ['MASTER_PORT']}", flush=True)
if (attempt, process.process_index) in (("0", 1), ("1", 0)):
    os.kill(os.getpid(), signal.SIGKILL)
process.wait_for_everyone()
print(f"process {process.process_index} met {ones.item():.0f} in attempt {attempt}", flush=True)
process.destroy_process_group()
"""
SRUN = """#!/usr/bin/env bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 9
for node in 0 1; do SLURM_NODEID=$node "${@:2}" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
for task in "${tasks[@]}"; do while kill -0 "$task" 2> /dev/null; do wait "$task" && bad=0 || bad=1; done; done
exit "$bad"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames some-nodes" ] && printf '127.0.0.1\\nanother-node\\n'
[ "$1" = requeue ] && echo "$2" > "$(dirname "$0")/requeued"
exit 0
"""


def slurm_job(folder: Path) -> dict[str, str]:
    """The environment of a job; SLURM is stood in for by two scripts: one task on each of two nodes."""
    for name, script in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    port = free_port(range(20000, 40000))
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "some-nodes", "SLURM_JOB_ID": str(port - 20000)}
    return job | {"SLURM_SUBMIT_DIR": str(ROOT), "NUM_PROCESSES": "1", "PATH": f"{folder}:{BIN}:{os.environ['PATH']}"}


def test_the_nodes_of_a_slurm_job_train_as_one_and_go_on_when_slurm_starts_it_again(
    alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    job = slurm_job(tmp_path)
    command = ["bash", "launch/slurm.sh", *settings_of(base_folder, chats_file, tmp_path / "run")]
    (tmp_path / "container").write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/contained\nshift\nexec "$@"\n')
    (tmp_path / "container").chmod(0o755)
    run_all([command], [{**job, "CONTAINER": "container exec"}])
    assert (tmp_path / "contained").read_text() == "exec\n" * 2
    check_as_alone(tmp_path / "run", alone)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")  # as if it had been stopped before
    shutil.rmtree(tmp_path / "run" / "draft")
    run_all([command], [{**job, "SLURM_RESTART_COUNT": "1"}])
    check_as_alone(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    whole, run, settings = tmp_path / "whole", tmp_path / "run", {"num_train_epochs": 4, "max_steps": STEPS}
    train(experiment(base_folder, chats_file, whole, **settings, gradient_accumulation_steps=4))
    more = ["trainer.num_train_epochs=4", "trainer.save_steps=1", "trainer.save_total_limit=9"]
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, run), *more]
    for number, first, override in (
        (2, 0, "trainer.gradient_accumulation_steps=2"),
        (1, 1, "resume=true"),
        (4, 2, "resume=true"),
    ):
        for step in range(first + 1, STEPS + 1):
            shutil.rmtree(run / f"checkpoint-{step}", ignore_errors=True)  # as if it had been stopped before
        shutil.rmtree(run / "draft", ignore_errors=True)
        run_all([[*command, override]], [{"NUM_PROCESSES": str(number)}])
    for step in (1, 2):
        shutil.rmtree(run / f"checkpoint-{step}")
    check_as_alone(run, whole)


def test_processes_that_torchrun_restarts_meet_whichever_of_them_died(tmp_path: Path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    variables = {"NUM_PROCESSES": "2", "MAX_RESTARTS": "2", "PROGRAM": str(tmp_path / "dying.py")}
    output = run_all([["launch/torchrun.sh"]], [{**variables, "PYTHONPATH": str(ROOT)}])[0]
    assert all(f"process {rank} met 2 in attempt 2" in output for rank in range(2))
    assert len(set(re.findall(r"attempt \d at port (\d+)", output))) == 3, "a store with dead addresses is used again"


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_resumes(
    alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "kill.py").write_text(KILL)
    command = ["launch/torchrun.sh", *settings_of(base_folder, chats_file, tmp_path / "run")]
    variables = {
        "NUM_PROCESSES": "2",
        "MAX_RESTARTS": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20",
        "PROGRAM": str(tmp_path / "kill.py"),
    }
    output = run_all([command], [{**variables, "PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}"}])[0]
    assert "killed in step 4" in output and "process 0 waited for a process that has ended" in output
    check_as_alone(tmp_path / "run", alone)


def test_the_kubernetes_job_and_the_container_agree_with_the_programs() -> None:
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == int(variables["NUM_NODES"])
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert (
        variables["MASTER"] == f"{job['metadata']['name']}-0.{spec['subdomain']}:{service['spec']['ports'][0]['port']}"
    )
    assert spec["subdomain"] == service["metadata"]["name"] and "NODE_RANK" in variables
    assert not unread(check_overrides(container["args"]), "train")
    lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied) and {"pard_train", "recipes", "conf"} <= set(copied)
    assert lines[-1] == 'ENTRYPOINT ["launch/torchrun.sh"]'


def test_the_job_script_of_slurm_is_valid_bash_and_says_when_to_signal() -> None:
    script = ROOT / "launch" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --signal=B:USR1@600" in script.read_text()


@pytest.mark.parametrize("age", [0, 600], ids=lambda age: f"after {age} seconds")
def test_a_job_whose_time_limit_is_as_short_as_its_warning_does_not_start_again_for_ever(
    age: int, tmp_path: Path
) -> None:
    job = slurm_job(tmp_path) | {"SLURM_JOB_START_TIME": str(int(time.time()) - age)}
    (tmp_path / "srun").write_text('#!/bin/sh\ntouch "$(dirname "$0")/started"\nsleep 2\nexit 1\n')
    process = subprocess.Popen(["bash", ROOT / "launch" / "slurm.sh"], env=os.environ | job)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) != 0
    assert (tmp_path / "requeued").exists() == (age > 0)


def test_weights_that_do_not_fit_on_the_disk_cost_one_line(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    command = [sys.executable, "recipes/train.py", *settings_of(base_folder, chats_file, tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=limit_file_size)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: ") and "cannot be written (file too large): free some space" in last
    assert not list((tmp_path / "run").glob("*.partial-*"))


def test_a_folder_that_may_not_be_written_costs_one_line(base_folder: Path, chats_file: Path) -> None:
    command = [sys.executable, "recipes/train.py", *settings_of(base_folder, chats_file, Path("/sys/run"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(
        r"train\.py: error: /sys/run: .+: choose another folder, or change that", result.stderr.splitlines()[-1]
    )


SEALING = """
import sys, time, torch
from pathlib import Path
from types import SimpleNamespace
from transformers import TrainerControl, TrainerState
from pard_train.training.callbacks import SealCheckpoint
run, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{run}.store", rank=rank, world_size=2)
if rank == 1:
    time.sleep(1)  # a slow disk
    (run / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"of rank 1")
state = TrainerState(global_step=2, is_world_process_zero=rank == 0)
SealCheckpoint(1).on_save(SimpleNamespace(output_dir=str(run)), state, TrainerControl())
assert (run / "checkpoint-2" / "files.json").exists()  # no rank goes on before
"""


def test_a_checkpoint_is_sealed_when_the_slowest_rank_has_written_its_part(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    command = [sys.executable, "-c", SEALING, str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert json.loads((checkpoint / "files.json").read_text()).keys() == {"rng_state_1.pth"}


def test_two_processes_under_fsdp2_train_as_one(
    alone: Path, base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    launch("launch/torchrun.sh", base_folder, chats_file, tmp_path / "run", "trainer=fsdp2")
    check_as_alone(tmp_path / "run", alone)
    assert (tmp_path / "run" / f"checkpoint-{STEPS}" / "optimizer.bin").is_file()  # the name that FSDP gives it
