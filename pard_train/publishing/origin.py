"""Where an exported draft comes from: its run and data, its base model and license, its measured acceptance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.model import file_of
from pard_train.reports.records import read_result
from pard_train.runs import CONFIG_FILE, MANIFEST_FILE, RUN_FILE, read_json
from pard_train.training.checkpoints import Checkpoint

MEASURED_MODES = ("replay", "live", "engine")  # of acceptance.json, the most exact first; an estimate is no measurement


def is_hub_name(name: str | None) -> bool:
    """Whether this may be NAMESPACE/NAME on the hub rather than a folder."""
    return bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists())


def public_name(name: str) -> str:
    """A hub or pypi: name as it is; the last part of a folder, whose path means nothing to a reader."""
    return name if is_hub_name(name) or ":" in name else Path(name).name


@dataclass(frozen=True)
class Training:
    """A training run, as far as its model card tells.

    Attributes:
        config: its settings.
        step: optimizer step of the weights, None if unknown.
        choice: why these weights of the run were taken; empty if the user named them.
        manifests: of its data, by the name of their folder.
        versions: of the packages that trained it.
    """

    config: dict[str, Any]
    step: int | None
    choice: str
    manifests: dict[str, dict[str, Any]]
    versions: dict[str, Any]


def read_training(checkpoint: Checkpoint) -> Training | None:
    """The run that a checkpoint is of; None for a draft from elsewhere."""
    run = checkpoint.run
    if run is None:
        return None
    config, versions = read_json(run / CONFIG_FILE), read_json(run / RUN_FILE)["versions"]
    choice = checkpoint.choice.replace(f"{run}/", "")
    return Training(config, checkpoint.step, choice, _manifests(config["data"]["source"]), versions)


def _manifests(source: str) -> dict[str, dict[str, Any]]:
    """Manifests beside the data of a run: of the tokens or answers, and of the prompts they were made from."""
    path = Path(source)
    own = path if path.is_dir() else path.parent
    folders = [own, own.parent / "prompts"] if path.exists() else []
    return {f.name: read_json(f / MANIFEST_FILE) for f in folders if (f / MANIFEST_FILE).is_file()}


def find_base(name: str | None) -> str | None:
    """Public name of the base model. A name that the hub does not know was a path, of which the last part remains.

    Offline a hub name stays as it is.
    """
    if not is_hub_name(name):
        return name
    _, is_known = _card_of(str(name))
    return name if is_known else Path(str(name)).name


def _card_of(base: str) -> tuple[Path | None, bool]:
    """Model card of a base model if it can be read, and whether such a model may exist."""
    try:
        return file_of(base, "README.md"), True
    except (OSError, HTTPError) as error:
        return None, not isinstance(error.__cause__, RepositoryNotFoundError | HFValidationError)


def read_license(given: str | None, base: str | None) -> dict[str, str]:
    """Keys of a model card: the license given, else that of the base model's card; empty if neither is known."""
    if given is not None:
        return {"license": given}
    if base is None or not (is_hub_name(base) or Path(base).is_dir()):
        return {}
    card, _ = _card_of(base)
    if card is None:
        return {}
    head = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: head[key] for key in ("license", "license_name", "license_link") if head.get(key)}


def read_acceptance(path: str, draft: str | None, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Measured records of the exported draft from acceptance.json.

    Args:
        path: of the file.
        draft: its name there; None takes the only one.
        checkpoint: that is exported.

    Raises:
        UserError: if this is no acceptance.json, the name is missing, or the figures belong to another draft.
    """
    records = read_result(Path(path))["records"]
    measured = [r for r in records if r["mode"] in MEASURED_MODES and r.get("method", "pard") == "pard"]
    names = sorted({record["draft"] for record in measured})
    if draft not in names and (draft is not None or len(names) != 1):
        raise UserError(f"export.acceptance_draft={draft}: {path} holds {', '.join(names) or 'no draft'}; name one")
    name = draft or names[0]
    _check_measured(path, name, records, checkpoint)
    return [record for record in measured if record["draft"] == name]


def _check_measured(path: str, name: str, records: Sequence[dict[str, Any]], checkpoint: Checkpoint) -> None:
    """Refuse the figures of another draft of the same file; note that a draft was measured in other files.

    The same draft has different files as a checkpoint and as an export.
    """
    own = model_fingerprint(checkpoint.path)
    measured = {record.get("draft_fingerprint") for record in records if record["draft"] == name} - {None}
    if not measured or own in measured:
        return
    if other := next((record["draft"] for record in records if record.get("draft_fingerprint") == own), None):
        raise UserError(f"export.acceptance_draft={name}: {path} holds the figures of {checkpoint.path} as {other}")
    print(f"note: {name} in {path} has other files than {checkpoint.path}: make sure that it is the same draft")
