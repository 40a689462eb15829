"""Names of models on the hub, told from folders."""

from __future__ import annotations

import re
from pathlib import Path


def is_hub_name(name: str | None) -> bool:
    """Whether this may be NAMESPACE/NAME on the hub rather than a folder."""
    return bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists())


def public_name(name: str) -> str:
    """A hub or pypi: name as it is; the last part of a folder, whose path means nothing to a reader."""
    return name if is_hub_name(name) or ":" in name else Path(name).name
