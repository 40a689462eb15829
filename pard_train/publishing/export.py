"""Export: plain Hugging Face folders that serving engines load without hand-editing.

Engines require equal vocabulary sizes of draft and target, so there is one folder per vocabulary size of the targets.
Everything is checked before any weights are loaded, and the folders are written atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pard_train.config import Config, ExportConfig
from pard_train.data.chat import ChatEncoder
from pard_train.engines.candidates import write_custom_generate
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.mask_token import mask_token_of, produced_ids, required_mask_token_of, set_draft_keys
from pard_train.model import (
    DTYPES,
    Base,
    check_same_tokenizer,
    copy_tokenizer,
    file_of,
    load_causal_lm,
    load_config,
    load_tokenizer,
    num_rows_of,
)
from pard_train.publishing.card import Card, write_card
from pard_train.publishing.origin import find_base, public_name, read_acceptance, read_license, read_training
from pard_train.runs import new_folder, read_json, require_space, run_of, write_json
from pard_train.training.checkpoints import Checkpoint, find_checkpoint
from pard_train.training.trackers import Outcome, check_trackers, log_outcome
from pard_train.training.trainer import BEST_FOLDER
from pard_train.vocabulary import resize_vocabulary, vocabulary_tensors

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class Plan:
    """A checked export.

    Attributes:
        sizes: vocabulary rows -> the targets of this size, in ascending order.
        card: common to the folders of all sizes.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    sizes: dict[int, list[str]]
    card: Card

    def folder(self, root: Path, num_rows: int) -> Path:
        """Folder of one size: the root itself if there is only one."""
        return root if len(self.sizes) == 1 else root / f"vocab-{num_rows}"

    def address(self, root: Path, num_rows: int, repository: str | None) -> str:
        """What the commands on the card of one size load: its folder, or its repository on the hub."""
        folder = self.folder(root, num_rows)
        if repository is None:
            return str(folder)
        return repository if folder == root else f"{repository}-{folder.name}"


def export(config: Config) -> list[Path]:
    """Write the exported folders, reload each, and compare its logits with those of the checkpoint.

    Args:
        config: validated. `export.checkpoint`, or `draft.path`, names a run, a checkpoint or a draft.

    Returns:
        The folders, one per vocabulary size: `output_dir`, or `output_dir/vocab-N` if there are several.

    Raises:
        UserError: if the checkpoint is damaged or no draft model, a target does not fit, the folder is taken, or the
            disk is too full.
    """
    root, settings = Path(config.output_dir), config.export
    check_trackers(config.logger)
    plan = plan_export(config)
    model = load_causal_lm(plan.checkpoint.path, dtype=DTYPES[settings.dtype])
    model.config.use_cache = True  # Trainer turns it off
    training = plan.card.training
    k_train = training.config["draft"]["num_draft_tokens"] if training else None
    set_draft_keys(model.config, plan.mask_token_id, k_train)
    if plan.card.base is not None:
        model.config.pard_base = public_name(plan.card.base)
    if root.exists():
        root.rmdir()  # empty
    with new_folder(root) as partial:
        for num_rows, targets in plan.sizes.items():
            pad_vocabulary(model, num_rows, plan.mask_token_id)
            folder = plan.folder(partial, num_rows)
            write_folder(model, plan, folder, max_shard_size=settings.max_shard_size)
            check_reload(folder, model, plan)
            write_custom_generate(folder)
            name = plan.address(root, num_rows, settings.repository)
            write_card(replace(plan.card, name=name, config=model.config, targets=targets), folder)
    folders = [plan.folder(root, num_rows) for num_rows in plan.sizes]
    _log_export(config, plan, folders)
    return folders


def _log_export(config: Config, plan: Plan, folders: Sequence[Path]) -> None:
    run, chosen = plan.checkpoint.run, Path(plan.checkpoint.path).name
    own = (run_of(run).get("run_id") if run else None) or model_fingerprint(plan.checkpoint.path)
    outcome = Outcome(
        program="export",
        folder=Path(config.output_dir),
        products={f"export-{own}-{num_rows}": folder for num_rows, folder in zip(plan.sizes, folders, strict=True)},
        training=run,
        kind="best" if chosen == BEST_FOLDER else "last",
        facts={"draft_path": plan.checkpoint.path, "choice": plan.checkpoint.choice},
    )
    log_outcome(config, outcome)


# ---- Before any weights are loaded ----------------------------------------------------------------------------------


def plan_export(config: Config) -> Plan:
    """Check everything that can be checked without weights. Raises UserError."""
    root, settings = Path(config.output_dir), config.export
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"output_dir={root} already exists: choose another one")
    checkpoint = find_checkpoint(settings.checkpoint or config.draft.path or "")
    if checkpoint.choice:
        print(f"weights: {checkpoint.choice}")
    model_config = load_config(checkpoint.home)
    mask_token_id = required_mask_token_of(model_config)
    tokenizer = load_tokenizer(checkpoint.home)
    sizes = find_sizes(config.targets, checkpoint.path, model_config.vocab_size, tokenizer)
    _check_disk(root, model_config, sizes, DTYPES[settings.dtype].itemsize)
    card = _card(settings, checkpoint, model_config)
    return Plan(checkpoint, model_config, tokenizer, mask_token_id, sizes, card)


def _card(settings: ExportConfig, checkpoint: Checkpoint, model_config: PretrainedConfig) -> Card:
    training = read_training(checkpoint)
    base = find_base(training.config["model"]["path"] if training else getattr(model_config, "pard_base", None))
    license = read_license(settings.license, base)
    if not license:
        print("license: unknown; set export.license to name it on the model card")
    file, name = settings.acceptance, settings.acceptance_draft
    records = read_acceptance(file, name, checkpoint) if file else []
    return Card("", model_config, settings.dtype, base=base, license=license, training=training, records=records)


def check_targets(base: Base, targets: Sequence[str]) -> None:
    """Check before training that the draft model can be exported for its targets.

    Raises:
        UserError: if a target has another tokenizer than the base, or fewer rows than the draft will have.
    """
    find_sizes(targets, base.config.path, max(base.num_rows, base.mask_token_id + 1), base.tokenizer)


def find_sizes(
    targets: Sequence[str], draft: str, num_rows: int, tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[str]]:
    """Targets by their vocabulary rows; the other arguments are those of the draft.

    Raises:
        UserError: if a target has another tokenizer, or fewer rows.
    """
    sizes: dict[int, list[str]] = {} if targets else {num_rows: []}
    for name in targets:
        check_same_tokenizer(tokenizer, load_tokenizer(name), draft, name)
        wanted = num_rows_of(name)
        if wanted < num_rows:
            raise UserError(
                f"targets: {name} has {wanted} vocabulary rows, the draft {num_rows}: engines require equal sizes; "
                "train with a mask token inside the vocabulary (draft.mask_token), export the run instead of a padded "
                "export, or pad the target"
            )
        sizes.setdefault(wanted, []).append(name)
    return dict(sorted(sizes.items()))


def _check_disk(root: Path, config: PretrainedConfig, sizes: dict[int, list[str]], bytes_per_weight: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    per_row = sum(tensor[0].numel() for tensor in vocabulary_tensors(model))
    weights = sum(model.num_parameters() + (rows - config.vocab_size) * per_row for rows in sizes)
    require_space(root, weights * bytes_per_weight, "make room, or choose another disk")


# ---- Writing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pad_vocabulary(model: PreTrainedModel, num_rows: int, mask_token_id: int) -> None:
    """Append copies of the mask token's row (and bias), so that padding changes no draft in any dtype.

    A copy has the logit of the mask token, which is no label in training and no text of a target, and loses ties to it
    by its higher id. (A mean row can win after rounding; a zero row wins if all logits are negative.)
    """
    old = model.config.vocab_size
    resize_vocabulary(model, num_rows)
    for tensor in vocabulary_tensors(model):
        tensor[old:] = tensor[mask_token_id]


def write_folder(model: PreTrainedModel, plan: Plan, folder: Path, *, max_shard_size: str) -> None:
    """Write weights, config, generation config and tokenizer into a folder, which may exist."""
    home = plan.checkpoint.home
    model.generation_config = GenerationConfig()  # the original with all end-of-turn ids is written below
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for weights in folder.glob("*.safetensors"):  # safetensors writes files that only their owner can read
        weights.chmod((folder / "config.json").stat().st_mode)
    copy_tokenizer(home, folder)
    source = file_of(home, GENERATION_CONFIG_FILE)
    generation = read_json(source) if source is not None else {}
    end_ids = family_end_ids(generation, plan.config, plan.tokenizer)
    generation.pop("_from_model_config", None)
    write_json(folder / GENERATION_CONFIG_FILE, generation | {"eos_token_id": end_ids})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", dict(sorted((config | older_keys(config)).items())))


def family_end_ids(generation: dict, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a turn in this family, those of the generation config first."""
    ids: list[int | None] = []
    for found in (generation.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        ids += found if isinstance(found, list) else [found]
    if tokenizer.chat_template:
        last = ChatEncoder(tokenizer).end_ids
        ids += last if len(last) == 1 else []  # an end of several tokens has no id of its own
    return list(dict.fromkeys(i for i in ids if i is not None))


def older_keys(config: dict) -> dict:
    """The keys of config.json that transformers 4 reads: without them it silently takes a rotary base of 10000.

    transformers 5 writes `rope_parameters` and `dtype` instead; engines with either version serve the folder.
    """
    found = config.get("rope_parameters") or {}
    by_layer = found if all(isinstance(value, dict) for value in found.values()) else {"full_attention": found}
    rotary, local = (by_layer.get(f"{kind}_attention", {}) for kind in ("full", "sliding"))
    keys = {"rope_theta": rotary.get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
    if (share := rotary.get("partial_rotary_factor")) is not None:
        keys["rotary_pct" if config["model_type"] == "gpt_neox" else "partial_rotary_factor"] = share
    if rotary.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rotary.items() if key != "rope_theta"}
    return {"torch_dtype": config["dtype"]} | {key: value for key, value in keys.items() if value is not None}


@torch.inference_mode()
def check_reload(folder: Path, model: PreTrainedModel, plan: Plan) -> None:
    """Reload an exported folder and compare its logits with the model it was written from, bit for bit.

    Raises:
        RuntimeError: if they differ.
    """
    again, mask = load_causal_lm(str(folder), dtype=model.dtype), plan.mask_token_id
    last = max(i for i in produced_ids(plan.tokenizer) if i < again.config.vocab_size)
    ids = torch.tensor([[0, last // 2, last, mask, mask]])
    if mask_token_of(again.config) != mask or not torch.equal(again(ids).logits, model(ids).logits):
        raise RuntimeError(f"{folder} does not reload to the model it was written from")
