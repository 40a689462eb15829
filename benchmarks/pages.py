"""Pages of what was measured: tables that print as they come, and where every figure is from."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from pard_train.runs import provenance

RESULTS = Path(__file__).parent / "results"


def markdown(rows: Iterable[list[str]]) -> str:
    """A table whose first row is its head; prints every row as it comes."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], flush=True)
        if len(lines) == 1:
            lines.append(f"| {' | '.join(['---'] * len(row))} |")
    return "\n".join(lines)


def origin() -> str:
    """Versions and commit, in one sentence without its full stop."""
    made_by = provenance()
    git = made_by["git"] or {"commit": "unknown", "is_dirty": False}
    versions = ", ".join(f"{name} {made_by['versions'][name]}" for name in ("torch", "transformers"))
    return f"{versions}; commit {git['commit'][:12]}{' with changes' if git['is_dirty'] else ''}"


def command() -> str:
    """The command line of this program."""
    return f"python {' '.join(provenance()['command'])}"


def write_page(name: str, page: str) -> None:
    """Write benchmarks/results/DATE-NAME.md and say so."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}.md"
    path.write_text(page)
    print(f"written to {path}")
