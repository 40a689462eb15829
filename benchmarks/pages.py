"""Result pages: tables that print as they come, the origin of every figure, and the figures as JSON on request."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pard_train.runs import provenance

RESULTS = Path(__file__).parent / "results"
RESULTS_VARIABLE = "BENCHMARK_RESULTS"  # names another folder, where figures are written beside the pages


def markdown(rows: Iterable[list[str]], *, is_shown: bool = True) -> str:
    """A table whose first row is its head. Prints every row as it comes, unless it is not shown."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        if is_shown:
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


def write_page(name: str, page: str, figures: dict[str, Any] | None = None) -> Path:
    """Write benchmarks/results/DATE-NAME.md, or the same and NAME.json into the folder of $BENCHMARK_RESULTS.

    Returns:
        The page.
    """
    folder = Path(os.environ.get(RESULTS_VARIABLE) or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-{name}.md"
    path.write_text(page)
    if figures is not None and folder != RESULTS:
        (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"written to {path}")
    return path
