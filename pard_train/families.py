"""Model families: the facts in conf/family/, which checks and docs share."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import yaml

from pard_train.commands import CONFIG_DIR
from pard_train.config import FamilyConfig


@cache
def read_families() -> dict[str, dict[str, Any]]:
    """Content of every family file by the name of its option."""
    paths = sorted((CONFIG_DIR / "family").glob("*.yaml"), key=lambda path: path.stem)
    return {path.stem: yaml.safe_load(path.read_text()) for path in paths}


def family_of(model: str) -> tuple[str, FamilyConfig, int] | None:
    """Option, facts and embedding rows of a model that a family file names; None for other models.

    The last part of the name decides, so that a folder counts as the model whose name it has.
    """
    short = re.split(r"[/:]", model.rstrip("/"))[-1].partition("*")[0]
    for option, content in read_families().items():
        family = FamilyConfig(**content["family"])
        for name, rows in family.rows.items():
            if name.rpartition("/")[2] == short:
                return option, family, rows
    return None
