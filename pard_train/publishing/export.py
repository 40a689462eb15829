"""Export: plain Hugging Face folders that serving engines load with no hand-editing.

Engines want a draft and a target with equally many vocabulary rows, so there is one folder for each number of rows that
the targets have. Everything is checked before any weights are loaded, and the folders are written atomically.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
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
from pard_train.model import (
    DTYPES,
    Base,
    check_same_tokenizer,
    copy_tokenizer,
    file_of,
    load_causal_lm,
    load_config,
    load_tokenizer,
    mask_token_of,
    num_rows_of,
    produced_ids,
    required_mask_token_of,
    resize_vocabulary,
    set_draft_keys,
    vocabulary_tensors,
)
from pard_train.publishing.card import (
    Card,
    check_measured,
    find_base,
    public_name,
    read_acceptance,
    read_license,
    read_training,
    write_card,
)
from pard_train.runs import new_folder, read_json, write_json
from pard_train.training.checkpoints import Checkpoint, find_checkpoint

GENERATION_CONFIG_FILE = "generation_config.json"


@dataclass(frozen=True)
class Plan:
    """An export that has been found possible.

    Attributes:
        sizes: vocabulary rows -> the targets that have as many, in ascending order.
        card: what all folders' cards say.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    sizes: dict[int, list[str]]
    card: Card

    def folder(self, root: Path, num_rows: int) -> Path:
        """Where the folder of one size goes: the root itself if there is only one."""
        return root if len(self.sizes) == 1 else root / f"vocab-{num_rows}"


def export(config: Config) -> list[Path]:
    """Write the exported folders, load each again, and check that it says what the checkpoint says.

    Args:
        config: validated. `export.checkpoint`, or `draft.path`, names a run, a checkpoint or a draft.

    Returns:
        The folders, one for each vocabulary size: `output_dir`, or `output_dir/vocab-N` if there are several.

    Raises:
        UserError: if the checkpoint is no draft model or damaged, a target does not fit, the folder is taken, the disk
            is too full, or nobody is logged in to the hub that is to be pushed to.
    """
    root, settings = Path(config.output_dir), config.export
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
            name = public_address(settings.push_to_hub, plan.folder(root, num_rows), root)
            write_custom_generate(folder)
            write_card(replace(plan.card, name=name, config=model.config, targets=targets), folder)
    return [plan.folder(root, num_rows) for num_rows in plan.sizes]


# ---------------------------------------------------------------------------------------------------------------------
# Before any weights are loaded
# ---------------------------------------------------------------------------------------------------------------------


def plan_export(config: Config) -> Plan:
    """Check everything that can be checked without weights. Raises UserError."""
    root, settings = Path(config.output_dir), config.export
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"output_dir={root} already exists: choose another one")
    checkpoint = find_checkpoint(settings.checkpoint or config.draft.path or "")
    if checkpoint.choice:
        print(checkpoint.choice)
    model_config = load_config(checkpoint.home)
    mask_token_id = required_mask_token_of(model_config)
    tokenizer = load_tokenizer(checkpoint.home)
    sizes = find_sizes(config.targets, checkpoint.path, model_config.vocab_size, tokenizer)
    _check_disk(root, model_config, sizes, DTYPES[settings.dtype].itemsize)
    card = _card(settings, checkpoint, model_config)
    plan = Plan(checkpoint, model_config, tokenizer, mask_token_id, sizes, card)
    if settings.push_to_hub is not None:
        check_names(settings.push_to_hub, [plan.folder(root, num_rows) for num_rows in sizes], root)
        check_access(settings.push_to_hub)
    return plan


def _card(settings: ExportConfig, checkpoint: Checkpoint, model_config: PretrainedConfig) -> Card:
    """What the cards of all sizes have in common."""
    training = read_training(checkpoint.run, checkpoint.step) if checkpoint.run else None
    base = find_base(training.config["model"]["path"] if training else getattr(model_config, "pard_base", None))
    license = read_license(settings.license, base)
    if not license:
        print("license: unknown; set export.license to name it on the model card")
    records = []
    if settings.acceptance:
        records = read_acceptance(settings.acceptance, settings.acceptance_draft)
        check_measured(settings.acceptance, records, checkpoint)
    return Card("", model_config, settings.dtype, base=base, license=license, training=training, records=records)


def check_targets(base: Base, targets: Sequence[str]) -> None:
    """Check that a draft model that is yet to be trained can be exported for its targets.

    Raises:
        UserError: if a target has another tokenizer than the base, or fewer rows than the draft will have.
    """
    trust, revision = base.config.trust_remote_code, base.config.revision
    num_rows = load_config(base.path, trust_remote_code=trust, revision=revision).vocab_size
    find_sizes(targets, base.config.path, max(num_rows, base.mask_token_id + 1), base.tokenizer)


def find_sizes(
    targets: Sequence[str], draft: str, num_rows: int, tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[str]]:
    """Targets by their vocabulary rows.

    Args:
        targets: folders or hub names.
        draft: what the draft model is called in messages.
        num_rows: of the draft model.
        tokenizer: of the draft model.

    Raises:
        UserError: if a target has another tokenizer, or fewer rows.
    """
    sizes: dict[int, list[str]] = {} if targets else {num_rows: []}
    for name in targets:
        check_same_tokenizer(tokenizer, load_tokenizer(name), draft, name)
        wanted = num_rows_of(name)
        if wanted < num_rows:
            raise UserError(
                f"targets: {name} has {wanted} vocabulary rows, the draft {num_rows}: engines want equal sizes; train "
                "with a mask token inside the vocabulary (draft.mask_token), export the run rather than a padded "
                "export, or pad the target"
            )
        sizes.setdefault(wanted, []).append(name)
    return dict(sorted(sizes.items()))


def _check_disk(root: Path, config: PretrainedConfig, sizes: dict[int, list[str]], bytes_per_weight: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    per_row = sum(tensor[0].numel() for tensor in vocabulary_tensors(model))
    weights = sum(model.num_parameters() + (rows - config.vocab_size) * per_row for rows in sizes)
    place = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < weights * bytes_per_weight:
        raise UserError(
            f"output_dir={root}: {free / 1e9:.1f} GB are free and {weights * bytes_per_weight / 1e9:.1f} GB needed: "
            "make room, or choose another disk"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pad_vocabulary(model: PreTrainedModel, num_rows: int, mask_token_id: int) -> None:
    """Append copies of the mask token's row, bias and all, so that padding changes no draft, whatever the precision.

    A copy's logit is the mask token's own, in every dtype, so it is above all others only where the mask token is; and
    that is no label in training and never the text of a target. (A mean row is below the largest logit too, but only
    until it is rounded; a zero row beats any vocabulary whose logits are all negative.)
    """
    old = model.config.vocab_size
    resize_vocabulary(model, num_rows)
    for tensor in vocabulary_tensors(model):
        tensor[old:] = tensor[mask_token_id]


def write_folder(model: PreTrainedModel, plan: Plan, folder: Path, *, max_shard_size: str) -> None:
    """Weights, config, generation config and tokenizer into a folder, which may exist."""
    home = plan.checkpoint.home
    model.generation_config = GenerationConfig()  # the real one is written below, as it was but for its ends
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for weights in folder.glob("*.safetensors"):  # which its library lets nobody but us read
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
        last = tokenizer(ChatEncoder(tokenizer).end_of_turn, add_special_tokens=False)["input_ids"]
        ids += last if len(last) == 1 else []  # an end of several tokens has no id of its own
    return list(dict.fromkeys(i for i in ids if i is not None))


def older_keys(config: dict) -> dict:
    """The keys of config.json that transformers 4 reads: without them it would take a rotary base of 10000, silently.

    transformers 5 writes `rope_parameters` and `dtype` instead; engines with either version serve the folder.
    """
    rotary = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    keys = {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    return keys | ({"rope_scaling": rotary} if rotary.get("rope_type", "default") != "default" else {})


@torch.inference_mode()
def check_reload(folder: Path, model: PreTrainedModel, plan: Plan) -> None:
    """Load an exported folder and compare its logits with the model it was written from, bit for bit.

    Raises:
        RuntimeError: if the folder says anything else than the model.
    """
    again, mask = load_causal_lm(str(folder), dtype=model.dtype), plan.mask_token_id
    last = max(produced_ids(plan.tokenizer))
    ids = torch.tensor([[0, last // 2, last, mask, mask]])
    if mask_token_of(again.config) != mask or not torch.equal(again(ids).logits, model(ids).logits):
        raise RuntimeError(f"{folder} does not reload to the model it was written from")


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------


def check_names(repository: str, folders: Sequence[Path], root: Path) -> None:
    """Check that the hub allows the names of all repositories. Raises UserError."""
    for folder in folders:
        name = public_address(repository, folder, root)
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"export.push_to_hub={name}: {str(error).splitlines()[0]}") from error


def check_access(repository: str) -> None:
    """Ask the hub who we are, and whether the repository may be ours. The token is the library's own affair.

    Raises:
        UserError: if the hub is out of reach, does not know us, or the namespace is somebody else's.
    """
    try:
        me = HfApi().whoami()
    except (OSError, HTTPError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"export.push_to_hub={repository}: not logged in to the hub ({reason}): run `hf auth login` or set HF_TOKEN"
        ) from error
    allowed = [me["name"], *(organization["name"] for organization in me.get("orgs", []))]
    if repository.split("/")[0] not in allowed:
        raise UserError(f"export.push_to_hub={repository}: the namespaces you may write to are {', '.join(allowed)}")


def public_address(repository: str | None, folder: Path, root: Path) -> str:
    """Repository of an exported folder, which bears its vocabulary size if there are several; its path without one."""
    if repository is None:
        return str(folder)
    return repository if folder == root else f"{repository}-{folder.name}"


def push_to_hub(folders: Sequence[Path], root: Path, settings: ExportConfig) -> list[str]:
    """Upload exported folders, each to its own repository.

    Args:
        folders: from `export`.
        root: the output folder.
        settings: name and visibility of the repositories.

    Returns:
        Addresses of the repositories.

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
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{name}: {reason}; {folder} is whole: upload it with `hf upload {name} {folder}`"
            ) from error
    return addresses
