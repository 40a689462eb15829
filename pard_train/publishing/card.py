"""The model card of an exported draft: what it is, what it was made from, what it accepts, and how to serve it.

Everything is read from files that are there anyway: the run's settings and log, the manifests of its data, and
acceptance.json of recipes/evaluate.py. What is not known is said to be unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from transformers import PretrainedConfig

from pard_train import __version__
from pard_train.commands import command
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.model import file_of
from pard_train.reports.records import read_document
from pard_train.runs import CONFIG_FILE, MANIFEST_FILE, RUN_FILE, read_json
from pard_train.training.checkpoints import Checkpoint, find_checkpoint

DEFAULT_K = 8  # shown beside the largest K measured; and K of the commands where that of training is unknown
MEASURED_MODES = ("replay", "live", "engine")  # of acceptance.json, the most exact first; an estimate is no measurement
UNKNOWN_LICENSE = "Unknown. The license of the base model applies to a draft made from it."
TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class Training:
    """What a run's own files say of it.

    Attributes:
        config: its settings.
        step: optimizer step of the weights, None if unknown.
        manifests: of its data, by the folder they stand in.
        versions: of the packages that trained it.
    """

    config: dict[str, Any]
    step: int | None
    manifests: dict[str, dict[str, Any]]
    versions: dict[str, Any]


@dataclass(frozen=True)
class Card:
    """Everything that a model card says.

    Attributes:
        name: folder as the user gave it, or repository on the hub: what the commands call the draft.
        config: of the exported model.
        dtype: of its weights.
        targets: that it was exported for.
        base: folder or hub name of the model it was made from, None if unknown.
        license: keys of the card's head: license, and license_name and license_link where there are any.
        training: None for a draft from elsewhere.
        records: of acceptance.json, those of this draft.
    """

    name: str
    config: PretrainedConfig
    dtype: str
    targets: Sequence[str] = ()
    base: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    training: Training | None = None
    records: Sequence[dict[str, Any]] = ()


def write_card(card: Card, folder: Path) -> None:
    """Write README.md."""
    k = getattr(card.config, "pard_num_draft_tokens", DEFAULT_K)
    settings = {"method": "draft_model", "model": card.name, "num_speculative_tokens": k, "parallel_drafting": True}
    text = Template(TEMPLATE.read_text()).substitute(
        title=public_name(card.name),
        name=card.name,
        version=__version__,
        num_rows=card.config.vocab_size,
        facts=_facts(card),
        training=_training(card.training) if card.training else "Unknown.",
        acceptance=_acceptance(card.records),
        target=next((target for target in card.targets if not target.startswith("pypi:")), "TARGET"),
        settings=settings,
        settings_json=json.dumps(settings),
        k=k,
        license=card.license.get("license_name") or card.license.get("license") or UNKNOWN_LICENSE,
    )
    ModelCard(f"---\n{_head(card).to_yaml()}\n---\n\n{text}").save(folder / "README.md")


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_training(run: Path, step: int | None) -> Training:
    """What a run says of itself.

    Args:
        run: its output folder.
        step: of the weights, None if unknown.
    """
    config = read_json(run / CONFIG_FILE)
    return Training(config, step, _manifests(config["data"]["source"]), read_json(run / RUN_FILE)["versions"])


def _manifests(source: str) -> dict[str, dict[str, Any]]:
    """Manifests beside the data of a run: of the tokens or answers themselves, and of the prompts they come from."""
    path = Path(source)
    own = path if path.is_dir() else path.parent
    folders = [own, own.parent / "prompts"] if path.exists() else []
    return {f.name: read_json(f / MANIFEST_FILE) for f in folders if (f / MANIFEST_FILE).is_file()}


def read_acceptance(path: str, draft: str | None) -> list[dict[str, Any]]:
    """Measured records of one draft from acceptance.json.

    Args:
        path: of the file.
        draft: its name there; None takes the only one.

    Raises:
        UserError: if it is no such file, or does not say which draft is meant.
    """
    content = read_document(Path(path))
    records = [r for r in content["records"] if r["mode"] in MEASURED_MODES and r.get("method", "pard") == "pard"]
    names = sorted({record["draft"] for record in records})
    if draft not in names and (draft is not None or len(names) != 1):
        raise UserError(f"export.acceptance_draft={draft}: {path} holds {', '.join(names) or 'no draft'}; name one")
    return [record for record in records if record["draft"] in (draft or names)]


def check_measured(path: str, records: Sequence[dict[str, Any]], checkpoint: Checkpoint) -> None:
    """Refuse figures of another draft than the one that is exported.

    The same draft has other files as a checkpoint or an export. So it takes the folder that was measured to tell: it is
    looked for in the run and where the evaluation found it. If it is not there, or is of an unknown step, nobody can.

    Args:
        path: of acceptance.json.
        records: of it, those that are to be shown.
        checkpoint: that is exported.

    Raises:
        UserError: naming the folder that was measured.
    """
    shown, fingerprints = records[0]["draft"], {record.get("draft_fingerprint") for record in records} - {None}
    own = _fingerprint_of(checkpoint.path)
    if not fingerprints or own in fingerprints:
        return
    for record in read_json(Path(path))["records"]:
        if own is not None and record.get("draft_fingerprint") == own:
            raise UserError(
                f"export.acceptance_draft={shown}: {path} holds the figures of {checkpoint.path} as {record['draft']}"
            )
    settings = Path(path).parent / CONFIG_FILE
    evaluated = read_json(settings) if settings.is_file() else {}
    named = [evaluated.get("draft"), *(evaluated.get("drafts") or {}).values()]
    siblings = sorted(checkpoint.run.iterdir()) if checkpoint.run else []
    for folder in [*map(str, siblings), *filter(None, named)]:
        if _fingerprint_of(folder) in fingerprints and _is_another(find_checkpoint(folder), checkpoint):
            raise UserError(
                f"export.acceptance={path}: the figures of {shown} belong to {folder}, not to {checkpoint.path}: "
                f"measure that with {command('evaluate')}"
            )


def _fingerprint_of(folder: str) -> str | None:
    return model_fingerprint(folder) if (Path(folder) / "config.json").is_file() else None


def _is_another(measured: Checkpoint, exported: Checkpoint) -> bool:
    """Whether two folders are known to hold different drafts."""
    if measured.run is None or exported.run is None:
        return False
    steps = {measured.step, exported.step}
    return measured.run.resolve() != exported.run.resolve() or (None not in steps and len(steps) == 2)


def find_base(name: str | None) -> str | None:
    """What the base model is called: of a name that the hub does not know, and so was a folder's path, the last part.

    Offline, where nobody can tell, it stays as it is.
    """
    if not is_hub_name(name):
        return name
    _, is_known = _card_of(str(name))
    return name if is_known else Path(str(name)).name


def _card_of(base: str) -> tuple[Path | None, bool]:
    """A model's card if it can be had; and whether there may be such a model."""
    try:
        return file_of(base, "README.md"), True
    except (OSError, HTTPError) as error:
        return None, not isinstance(error.__cause__, RepositoryNotFoundError | HFValidationError)


def read_license(license: str | None, base: str | None) -> dict[str, str]:
    """The license given, else that of the base model's card; empty if neither is known."""
    if license is not None:
        return {"license": license}
    if base is None or not (is_hub_name(base) or Path(base).is_dir()):
        return {}
    card, _ = _card_of(base)
    if card is None:
        return {}
    head = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: head[key] for key in ("license", "license_name", "license_link") if head.get(key)}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def _head(card: Card) -> ModelCardData:
    manifests = card.training.manifests if card.training else {}
    sources = manifests.get("prompts", {}).get("identity", {}).get("config", {}).get("sources", {})
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base if is_hub_name(card.base) else None,
        datasets=sorted({s["path"] for s in sources.values() if is_hub_name(s["path"])}) or None,
        tags=["speculative-decoding", "parallel-draft-model", "pard", "pard_train"],
        model_name=public_name(card.name),
        eval_results=[_eval_result(record) for record in _best(card.records).values()] or None,
        license=card.license.get("license"),
        license_name=card.license.get("license_name"),
        license_link=card.license.get("license_link"),
    )


def is_hub_name(name: str | None) -> bool:
    """Whether this may be NAMESPACE/NAME on the hub rather than a folder."""
    return bool(name and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists())


def public_name(name: str) -> str:
    """A hub name as it is; of a folder, which means nothing to a reader, the last part."""
    return name if is_hub_name(name) or ":" in name else Path(name).name


def _eval_result(record: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=record["benchmark"],
        dataset_name=record["benchmark"],
        metric_type="accepted_length",
        metric_name=f"tau at K = {record['num_draft_tokens']} for {record['target']}",
        metric_value=round(record["tau"], 3),
    )


def _table(rows: Sequence[tuple[str, Any]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _facts(card: Card) -> str:
    config = card.config
    return _table(
        [
            ("base model", public_name(card.base) if card.base else "unknown"),
            ("architecture", f"{config.architectures[0]}, {card.dtype}"),
            ("targets", ", ".join(map(public_name, card.targets)) or "those of its own vocabulary size"),
            ("vocabulary rows", config.vocab_size),
            ("mask token id", config.pard_token),
            ("K in training", f"{getattr(config, 'pard_num_draft_tokens', 'unknown')} (may be larger when serving)"),
        ]
    )


def _training(training: Training) -> str:
    config = training.config
    draft, settings = config["draft"], config["trainer"]
    ranks = config.get("world_size", 1)
    slots = config["data"]["slot_budget"] * ranks * settings["gradient_accumulation_steps"]
    rows = [
        ("steps", "unknown" if training.step is None else training.step),
        ("slots per step", f"{slots:,} ({ranks} processes)"),
        ("objective", _objective(config["objective"])),
        ("COD", f"retention ratio {draft['retention_ratio']}, at least {draft['min_retention']}"),
        ("learning rate", f"{settings['learning_rate']}, {settings['lr_scheduler_type']}"),
        ("precision", "bf16" if settings["bf16"] else "fp32"),
        ("longest document", f"{config['data']['max_length']} tokens"),
        ("data", public_name(config["data"]["source"])),
        *((f"data: {name}", _manifest(manifest)) for name, manifest in training.manifests.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in training.versions.items() if version)),
    ]
    return _table(rows)


def _objective(settings: dict[str, float]) -> str:
    """What of an objective's settings is in use; runs from before there were others have cross entropy alone."""
    unused = [] if settings.get("dpace") else ["dpace_alpha"]
    used = {"ce": 1.0, **settings}
    return ", ".join(f"{name} {value:g}" for name, value in used.items() if value and name not in unused)


def _manifest(manifest: dict[str, Any]) -> str:
    """One line of a manifest: who wrote it and the counts of each source."""
    parts = []
    if "targets" in manifest:
        parts.append(f"written by {', '.join(map(public_name, manifest['targets']))} at {manifest['temperature']:g}")
    sources = manifest.get("identity", {}).get("config", {}).get("sources", {})
    for name, count in manifest.get("counts", {}).items():
        if isinstance(count, dict):
            license = sources.get(name, {}).get("license")
            parts.append(f"{name}{f' ({license})' if license else ''}: {_counts(count)}")
    flat = {name: count for name, count in manifest.get("counts", {}).items() if not isinstance(count, dict)}
    return "; ".join([*parts, *([_counts(flat)] if flat else [])])


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in counts.items() if isinstance(value, int))


def _best(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Greedy records by (target, benchmark, K), each in the most exact mode, at K = 8 and at the largest K."""
    greedy = sorted(
        (record for record in records if record.get("temperature", 0.0) == 0.0),
        key=lambda record: MEASURED_MODES.index(record["mode"]),
    )
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for record in greedy:
        best.setdefault((record["target"], record["benchmark"], record["num_draft_tokens"]), record)
    shown = {DEFAULT_K, max((k for _, _, k in best), default=DEFAULT_K)}
    return {key: record for key, record in sorted(best.items()) if key[2] in shown}


def _acceptance(records: Sequence[dict[str, Any]]) -> str:
    best = _best(records)
    if not best:
        return "Not measured."
    shown = sorted({k for _, _, k in best})
    lines = [
        "| target | benchmark | prompts | " + " | ".join(f"tau, K = {k}" for k in shown) + " |",
        "| --- | --- | --- |" + " --- |" * len(shown),
    ]
    for target, benchmark in dict.fromkeys(key[:2] for key in best):
        row = [best.get((target, benchmark, k)) for k in shown]
        prompts = next(record["num_prompts"] for record in row if record)
        cells = [f"{r['tau']:.2f} [{r['tau_low']:.2f}, {r['tau_high']:.2f}]" if r else "" for r in row]
        lines.append(f"| {target} | {benchmark} | {prompts} | " + " | ".join(cells) + " |")
    one = next(iter(best.values()))
    return (
        "tau is the mean number of tokens per target forward pass, the target's own token included, "
        "with a bootstrap 95% interval over prompts; greedy decoding, "
        f"{one['max_new_tokens']} new tokens at most, {one['dtype']}.\n\n" + "\n".join(lines)
    )
