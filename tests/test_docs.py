"""The docs name commands, settings, files, functions and links that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pard_train.overrides import check_overrides, unread, with_section

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
PROGRAM = r"(?:\b(?:recipes|data_scripts)/(\w+)\.py|\bpard-(\w+)|\bmake (quickstart)|\blaunch/\w+\.sh)([^`\n]*)"

MADE_BY_THE_READER = {  # of docs/extend
    *("objective=tv", "conf/objective/tv.yaml"),
    *("experiment=olmo2-1b", "conf/experiment/olmo2-1b.yaml"),
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """(program, arguments) of every call of one of our programs; launch/*.sh run train."""
    for script, console, made, rest in re.findall(PROGRAM, text.replace("\\\n", " ")):
        if "=" in rest:
            words = shlex.split(rest, comments=True)
            yield script or console or made or "train", [s for w in words for s in w.removeprefix("ARGS=").split()]


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every relative link and picture of a page."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        if "://" not in path:
            yield (page.parent / path).resolve() if path else page, anchor


def anchors_of(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_commands_and_files_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert name in targets, f"make {name}"
    folders = r"(?:recipes|data_scripts|launch|tests|benchmarks|pard_train|docs|conf)"
    for name in re.findall(rf"(?<![\w./]){folders}/[\w./-]+\.(?:py|sh|md|yaml)", text):
        assert (ROOT / name).is_file() or name in MADE_BY_THE_READER, name


@each_page
def test_every_setting_on_a_command_line_of_the_docs_exists_and_is_read_by_its_program(page: Path) -> None:
    for program, arguments in commands_of(page.read_text()):
        settings = [a for a in arguments if re.match(r"[\w.]+=", a) and a not in MADE_BY_THE_READER]
        overrides = check_overrides(with_section(settings, program), is_multirun="-m" in arguments)
        assert not unread(overrides, program), program


@each_page
def test_every_relative_link_of_the_docs_leads_somewhere(page: Path) -> None:
    for file, anchor in links_of(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors_of(file), f"{file.name}#{anchor}"


@each_page
def test_python_examples_import_what_exists(page: Path) -> None:
    for module, names in re.findall(r"^from (pard_train[\w.]*) import (.+)$", page.read_text(), flags=re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    assert {file for file, _ in links_of(index)} >= set(DOCS) - {index}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
