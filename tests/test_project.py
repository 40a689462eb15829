"""The project keeps its promises about itself: imports, README, console commands."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pard_train.commands import PROGRAMS

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "pard_train").rglob("*.py"))
PACKAGES = sorted(path.parent for path in LIBRARY if path.stem == "__init__")


def imported_modules(path: Path) -> set[str]:
    """Dotted names of every import in a file, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def import_order(package: Path) -> list[str]:
    """Modules and packages inside of a package, as its docstring names them."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or ""
    return re.findall(r"[a-z_]+", re.split(r"one way:|order of imports:", text)[1])


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_imports_run_one_way_in_the_order_that_the_package_names(package: Path) -> None:
    order, prefix = import_order(package), ".".join(package.relative_to(ROOT).parts) + "."
    parts = [path for path in package.iterdir() if path.suffix == ".py" or path in PACKAGES]
    assert sorted(order) == sorted(path.stem for path in parts if path.stem != "__init__")
    for part in parts:
        for path in [part] if part.is_file() else part.rglob("*.py"):
            for name in imported_modules(path):
                other = name.removeprefix(prefix).split(".")[0]
                if name.startswith(prefix) and other != part.stem and part.stem != "__init__":
                    assert order.index(other) < order.index(part.stem), f"{path} imports {name}"


def test_hydra_stays_at_the_edge() -> None:
    for path in LIBRARY:
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"recipes", "data_scripts"}, path.name
        assert not roots & {"hydra", "omegaconf"} or path.stem in ("program", "overrides"), path.name
        assert "wandb" not in roots or path.stem == "trackers"


def test_nothing_unpickles_or_builds_shell_strings() -> None:
    for path in [*LIBRARY, *(ROOT / "recipes").glob("*.py"), *(ROOT / "data_scripts").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"torch\.load\((?!.*weights_only=True)|(?<!allow_)pickle|shell=True|os\.system", text), (
            path.name
        )


@pytest.mark.parametrize("folder, most", [("recipes", 80), ("data_scripts", 60)])
def test_programs_are_tables_of_contents(folder: str, most: int) -> None:
    for path in (ROOT / folder).glob("*.py"):
        assert sum(1 for line in path.read_text().splitlines() if line.strip()) <= most, path.name
        assert not {name for name in imported_modules(path) if name.split(".")[0] in ("recipes", "data_scripts")}


def test_every_program_is_a_console_command() -> None:
    commands = {e.name for e in entry_points(group="console_scripts") if e.value == "pard_train.commands:main"}
    files = {path.stem for folder in ("recipes", "data_scripts") for path in (ROOT / folder).glob("*.py")}
    assert commands == {f"pard-{name}" for name in PROGRAMS}
    assert files == set(PROGRAMS)


def test_the_generated_reference_pages_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "reference" / "generate.py"))["PAGES"]
    for page, render in pages.items():
        assert (ROOT / "docs" / "reference" / page).read_text() == render(), "python docs/reference/generate.py"


def test_cleaning_up_leaves_what_was_trained() -> None:
    commands = subprocess.run(["make", "-n", "clean"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv" in commands
    assert "outputs" not in commands


def test_vllm_for_cpus_says_which_index_it_wants_where_torch_is_missing(tmp_path: Path) -> None:
    python, venv = tmp_path / "python", tmp_path / "venv"
    python.write_text(
        '#!/bin/sh\n[ "$2" = venv ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"\n'
        'case "$*" in *torch==*) exit 1;; esac\n'
    )
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("VLLM", "TORCH")}
    environment |= {"PYTHON": str(python), "VENV": str(venv)}
    result = subprocess.run(["bash", "launch/vllm_cpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "is not at the package index: set PIP_EXTRA_INDEX_URL to PyTorch's own index" in result.stderr
    assert not (venv / ".installed").exists()


def test_the_deepspeed_launcher_reads_a_hostfile_from_where_it_was_called_and_keeps_the_number_of_processes(
    tmp_path: Path,
) -> None:
    (tmp_path / "hosts").write_text("node0 slots=4\n")
    (tmp_path / "deepspeed").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTFILE": "hosts"}
    environment.pop("NUM_PROCESSES", None)

    def topology(**more: str) -> str:
        command = [str(ROOT / "launch" / "deepspeed.sh"), "seed=1"]
        done = subprocess.run(command, cwd=tmp_path, env={**environment, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"--hostfile {tmp_path / 'hosts'} --master_port" in topology()
    assert f"--hostfile {tmp_path / 'hosts'} --num_gpus 2 --master_port" in topology(NUM_PROCESSES="2")


def test_a_wheel_holds_one_package_and_runs_every_program_without_a_checkout(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")} == {"pard_train"}
    for program in PROGRAMS:
        arguments = [f"pard-{program}", "experiment=quickstart", "draft.path=d", "seed=-3"]
        result = run_installed(site, arguments)
        assert result.stderr.splitlines()[-1].startswith(f"pard-{program}: error: "), result.stderr
        assert program == "compare" or "seed=-3" in result.stderr
    missing = run_installed(site, ["pard-train", "experiment=quickstart", "objective=kd"])
    assert "pard-score" in missing.stderr  # the command that exists where the wheel is installed


def run_installed(site: Path, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a console command of an unpacked wheel."""
    program = f"import sys; from pard_train.commands import main; sys.argv = {arguments}; main()"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=60,
    )
