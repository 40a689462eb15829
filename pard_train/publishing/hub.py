"""The model hub: names of repositories, permission to write, and the upload of exported folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from pard_train.config import ExportConfig
from pard_train.errors import UserError, first_line


def is_hub_name(name: str | None) -> bool:
    """Whether this may be NAMESPACE/NAME on the hub rather than a folder."""
    return bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists())


def public_name(name: str) -> str:
    """A hub or pypi: name as it is; the last part of a folder, whose path means nothing to a reader."""
    return name if is_hub_name(name) or ":" in name else Path(name).name


def public_address(repository: str | None, folder: Path, root: Path) -> str:
    """Repository of an exported folder, with its vocabulary size if there are several; its path without repository."""
    if repository is None:
        return str(folder)
    return repository if folder == root else f"{repository}-{folder.name}"


def check_upload(repository: str, folders: Sequence[Path], root: Path) -> None:
    """Check names and permission before anything is exported.

    Raises:
        UserError: if the hub forbids a name, is out of reach, has no login, or the namespace is not writable.
    """
    for name in (public_address(repository, folder, root) for folder in folders):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"export.push_to_hub={name}: {first_line(error)}") from error
    try:
        me = HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise UserError(
            f"export.push_to_hub={repository}: not logged in to the hub ({first_line(error)}): run `hf auth login` or "
            "set HF_TOKEN"
        ) from error
    allowed = [me["name"], *(organization["name"] for organization in me.get("orgs", []))]
    if repository.split("/")[0] not in allowed:
        raise UserError(f"export.push_to_hub={repository}: the namespaces you may write to are {', '.join(allowed)}")


def push_to_hub(folders: Sequence[Path], root: Path, settings: ExportConfig) -> list[str]:
    """Upload exported folders, each to its own repository: the addresses of these.

    Raises:
        UserError: if the hub refuses.
    """
    api, addresses = HfApi(), []
    for folder in folders:
        name = public_address(settings.push_to_hub, folder, root)
        try:
            addresses.append(str(api.create_repo(name, private=settings.private, exist_ok=True)))
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export by pard_train")
        except (OSError, HTTPError) as error:
            raise UserError(
                f"{name}: {first_line(error)}; the export is complete: upload it with `hf upload {name} {folder}`"
            ) from error
    return addresses
