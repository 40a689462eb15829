"""The model card of an exported draft: what it is, how it was trained, its acceptance, and how to serve it.

Everything comes from files that exist already: settings and log of the run, manifests of its data, acceptance.json.
Unknown facts are named as unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PretrainedConfig

from pard_train import __version__
from pard_train.architectures import windows_of
from pard_train.config import ObjectiveConfig
from pard_train.publishing.origin import MEASURED_MODES, Training, is_hub_name, public_name
from pard_train.reports.records import acceptance_records, grouped, with_interval

DEFAULT_K = 8  # of the tables, beside the largest K measured, and of the commands if K of training is unknown
UNKNOWN_LICENSE = "Unknown. The license of the base model applies to a draft made from it."
TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class Card:
    """Content of a model card.

    Attributes:
        name: the draft in the commands: the folder as the user gave it, or its hub repository.
        config: of the exported model.
        base: folder or hub name of the model it was made from, None if unknown.
        license: keys of the card's head: license, and license_name and license_link if known.
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
    k, training = getattr(card.config, "pard_num_draft_tokens", DEFAULT_K), card.training
    best = _best_records(card.records)
    measured: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for (target, benchmark, num_draft_tokens), record in best.items():
        measured.setdefault((target, benchmark), {})[num_draft_tokens] = record
    ModelCard.from_template(
        _head(card),
        template_path=str(TEMPLATE),
        card=card,
        title=Path(card.name).name,
        version=__version__,
        config=card.config,
        training=training,
        **({name: training.config[name] for name in ("draft", "data", "trainer")} if training else {}),
        ranks=training.config.get("world_size", 1) if training else None,
        measured=measured,
        shown=sorted({num_draft_tokens for _, _, num_draft_tokens in best}),
        target=next((target for target in card.targets if not target.startswith("pypi:")), "TARGET"),
        settings={"method": "draft_model", "model": card.name, "num_speculative_tokens": k, "parallel_drafting": True},
        k=k,
        has_windows=windows_of(card.config) != (None,),
        license=card.license.get("license_name") or card.license.get("license") or UNKNOWN_LICENSE,
        names=_names,
        public_name=public_name,
        with_interval=with_interval,
        objective=ObjectiveConfig(**training.config["objective"]).name if training else "",
        counts_of=_manifest,
    ).save(folder / "README.md")


def _head(card: Card) -> ModelCardData:
    sources = _sources(card.training.manifests.get("prompts", {})) if card.training else {}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=card.base if is_hub_name(card.base) else None,
        datasets=sorted({s["path"] for s in sources.values() if is_hub_name(s["path"])}) or None,
        tags=["speculative-decoding", "parallel-draft-model", "pard", "pard_train"],
        model_name=Path(card.name).name,
        eval_results=[_eval_result(record) for record in _best_records(card.records).values()] or None,
        license=card.license.get("license"),
        license_name=card.license.get("license_name"),
        license_link=card.license.get("license_link"),
    )


def _eval_result(record: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=record["benchmark"],
        dataset_name=record["benchmark"],
        metric_type="accepted_length",
        metric_name=f"tau at K = {record['num_draft_tokens']} for {record['target']}",
        metric_value=round(record["tau"], 3),
    )


def _names(models: Sequence[str]) -> str:
    return ", ".join(map(public_name, models))


def _sources(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of the sources that a manifest names."""
    return manifest.get("identity", {}).get("config", {}).get("sources", {})


def _manifest(manifest: dict[str, Any]) -> str:
    """A manifest in one line: the targets that wrote the data, and the counts of each source."""
    parts, counts, sources = [], manifest.get("counts", {}), _sources(manifest)
    if "targets" in manifest:
        parts.append(f"written by {_names(manifest['targets'])} at {manifest['temperature']:g}")
    for name, count in counts.items():
        if isinstance(count, dict):
            license = f" ({source})" if (source := sources.get(name, {}).get("license")) else ""
            parts.append(f"{name}{license}: {_counts(count)}")
    return "; ".join(filter(None, [*parts, _counts(counts)]))


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{value:,} {name}" for name, value in counts.items() if isinstance(value, int))


def _best_records(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Greedy records by (target, benchmark, K), each in the most exact mode, at K = 8 and at the largest K."""
    cells = grouped([r for r in records if r.get("temperature", 0.0) == 0.0], itemgetter("target", "benchmark"))
    greedy = [record for cell in cells.values() for record in acceptance_records({"records": cell})]
    best: dict[tuple[str, str, int], dict[str, Any]] = {}
    for record in sorted(greedy, key=lambda record: MEASURED_MODES.index(record["mode"])):
        best.setdefault((record["target"], record["benchmark"], record["num_draft_tokens"]), record)
    shown = {DEFAULT_K, max((k for _, _, k in best), default=DEFAULT_K)}
    return {key: record for key, record in sorted(best.items()) if key[2] in shown}
