"""Loading models, and turning an autoregressive model into an untrained draft model."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from pard_train.architectures import why_refused, windows_of
from pard_train.config import DraftConfig, ModelConfig
from pard_train.core.cpu.products import use_onednn
from pard_train.device import default_device
from pard_train.downloads import local_model
from pard_train.errors import UserError, first_line
from pard_train.kept_layers import keep_layers, resolve_keep_layers
from pard_train.mask_token import choose_mask_token, mask_token_of, set_draft_keys
from pard_train.runs import new_folder
from pard_train.transplant import Pieces, rows_to_average
from pard_train.vocabulary import add_mask_token, replace_vocabulary

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",  # which of its tokens end an answer
)


@contextmanager
def _explained(path: str, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        missing = "" if path.startswith("pypi:") or Path(path).exists() else "no such folder, and as a name of the hub "
        raise UserError(f"{path}: {missing}the {what} cannot be loaded: {first_line(cause)}") from error


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Tokenizer of a model. Raises UserError if it cannot be loaded."""
    with _explained(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(local_model(path), trust_remote_code=trust_remote_code, revision=revision)


def load_base_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Tokenizer of the draft to be made: that of `model.tokenizer`, else the base's. Raises UserError."""
    own, trust = config.tokenizer is None, config.trust_remote_code
    return load_tokenizer(
        config.tokenizer or config.path, trust_remote_code=trust, revision=config.revision if own else None
    )


def load_config(path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """Config of a model that can draft.

    Raises:
        UserError: if it cannot be read, or its architecture cannot draft.
    """
    with _explained(path, "config"):
        config = AutoConfig.from_pretrained(local_model(path), trust_remote_code=trust_remote_code, revision=revision)
    if reason := why_refused(config):
        raise UserError(
            f"{path}: a {config.model_type} model cannot be a parallel draft model or its target: {reason}; supported "
            "architectures are listed in docs/reference/architectures.md"
        )
    return config


def num_rows_of(path: str) -> int:
    """Vocabulary rows of any causal LM. Raises UserError if its config cannot be read."""
    with _explained(path, "config"):
        return AutoConfig.from_pretrained(local_model(path), trust_remote_code=False).get_text_config().vocab_size


def load_causal_lm(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
) -> PreTrainedModel:
    """A causal LM from safetensors.

    Args:
        dtype: "auto" keeps that of the checkpoint.
        attention: name of an attention function; None takes the fastest that the architecture has.

    Raises:
        UserError: if it cannot be loaded, or weights are missing (they would be random).
    """
    with _explained(path, "model"):
        model, found = AutoModelForCausalLM.from_pretrained(
            local_model(path),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            revision=revision,
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
        )
    if missing := found["missing_keys"]:
        raise UserError(f"{path}: {len(missing)} weights are missing, such as {min(missing)}: download the model again")
    if default_device().type == "cpu":
        use_onednn(model)
    return model


def load_target(path: str, *, dtype: str, trust_remote_code: bool, device_map: str | None) -> PreTrainedModel:
    """A target for inference, on one device unless a `device_map` spreads it."""
    model = load_causal_lm(path, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code, device_map=device_map)
    return (model if device_map else model.to(default_device())).eval()


@dataclass(frozen=True)
class Base:
    """A checked base model, before its weights are loaded.

    Attributes:
        config: path, revision and loading options.
        num_rows: of its vocabulary.
        tokenizer: its tokenizer.
        mask_token_id: of the draft to be made from it.
        is_draft: it already is a draft model, whose mask token and row are kept.
        keep: layers that the draft keeps, their number, or None for all.
        pieces: of its own tokenizer and of `model.tokenizer`, if that replaces it.
    """

    config: ModelConfig
    num_rows: int
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    is_draft: bool
    keep: int | list[int] | None = None
    pieces: tuple[Pieces, Pieces] | None = None


def inspect_base(config: ModelConfig, draft: DraftConfig) -> Base:
    """Check that a model can become a draft model, and choose its mask token.

    Raises:
        UserError: if it cannot draft, the mask token is refused, or a tokenizer cannot be transplanted.
    """
    path, trust, revision = config.path, config.trust_remote_code, config.revision
    model_config = load_config(path, trust_remote_code=trust, revision=revision)
    tokenizer, num_rows, pieces = load_base_tokenizer(config), model_config.vocab_size, None
    if config.tokenizer is not None:
        if mask_token_of(model_config) is not None:
            raise UserError(f"model.tokenizer={config.tokenizer}: {path} already is a draft model: give its base")
        own = load_tokenizer(path, trust_remote_code=trust, revision=revision)
        pieces, num_rows = (Pieces(own, path), Pieces(tokenizer, config.tokenizer)), num_rows_of(config.tokenizer)
        _check_loads_there(tokenizer, config.tokenizer, model_config)
    window = min((window for window in windows_of(model_config) if window is not None), default=None)
    if window is not None and window < draft.num_draft_tokens:
        raise UserError(
            f"draft.num_draft_tokens={draft.num_draft_tokens}: a chain must fit into the sliding window of {window} "
            f"tokens that {path} has; give draft.num_draft_tokens<={window}"
        )
    kept = getattr(model_config, "pard_kept_layers", [])  # of a draft that is trained further with the same setting
    is_kept = bool(kept) and config.keep_layers in ("auto", len(kept), kept)
    keep = None if is_kept else resolve_keep_layers(config.keep_layers, model_config.num_hidden_layers)
    existing = mask_token_of(model_config)
    if existing is None:
        mask_token_id = choose_mask_token(tokenizer, num_rows, draft)
        return Base(config, num_rows, tokenizer, mask_token_id, is_draft=False, keep=keep, pieces=pieces)
    wanted = tokenizer.get_vocab().get(draft.mask_token) if draft.mask_token else draft.mask_token_id
    if wanted not in (None, existing):
        raise UserError(
            f"draft.mask_token_id={wanted}, but {path} already is a draft model with mask token {existing}: leave "
            "draft.mask_token_id and draft.mask_token null"
        )
    return Base(config, num_rows, tokenizer, existing, is_draft=True, keep=keep)


def _check_loads_there(tokenizer: PreTrainedTokenizerBase, source: str, config: PretrainedConfig) -> None:
    """Check that a tokenizer is the same beside another model: some architectures load it with a class of their own."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        copy_tokenizer(source, Path(folder))
        again = load_tokenizer(folder)
    if again.backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str():
        raise UserError(
            f"model.tokenizer={source}: Transformers changes this tokenizer beside a {config.model_type} model, to a "
            f"{type(again).__name__}: give a base of another architecture, such as a Llama or SmolLM2"
        )


def write_initial_draft(base: Base, num_draft_tokens: int, folder: Path, texts: Iterable[np.ndarray] = ()) -> None:
    """Write the untrained draft model: the base model with a mask token and the keys that engines read.

    Args:
        base: from `inspect_base`.
        num_draft_tokens: K_train, recorded in config.json.
        folder: written atomically; left alone if it exists.
        texts: token ids of documents, to choose the layers that are kept.
    """
    if folder.exists():
        return
    path, trust, revision = base.config.path, base.config.trust_remote_code, base.config.revision
    model = load_causal_lm(path, trust_remote_code=trust, revision=revision)
    source = base.config.tokenizer or path
    if base.pieces is not None:
        rows, summary = rows_to_average(*base.pieces, base.num_rows)
        print(f"tokenizer of {source}: {summary}")
        replace_vocabulary(model, rows)
        _take_token_ids(model, source)
    if base.keep is not None:
        kept = keep_layers(model.to(default_device()), base.keep, base.config.keep_layers_by, texts)
        print(f"layers kept of {path}: {', '.join(map(str, kept))}")
        model.config.pard_kept_layers = kept
    if not base.is_draft:
        add_mask_token(model, base.mask_token_id)
        model.config.pard_base = path
    set_draft_keys(model.config, base.mask_token_id, num_draft_tokens)
    write_model_folder(model, source, folder, revision=revision if source == path else None)


def _take_token_ids(model: PreTrainedModel, path: str) -> None:
    """Take start, end and padding ids from another model's config."""
    config = AutoConfig.from_pretrained(local_model(path), trust_remote_code=False).get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(config, name, None))


def write_model_folder(
    model: PreTrainedModel,
    tokenizer_source: str,
    folder: Path,
    *,
    revision: str | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save a model as safetensors with a tokenizer, atomically.

    Args:
        model: gives config, generation config and, unless `state_dict` is given, the weights.
        tokenizer_source: model whose tokenizer files are copied byte for byte; loading and saving a tokenizer may
            change its class and rules.
        folder: must not exist.
        revision: of a hub name.
        state_dict: weights gathered from shards.
    """
    if state_dict is not None and model.config.tie_word_embeddings:  # gathered shards hold a tied tensor twice
        state_dict = {name: tensor for name, tensor in state_dict.items() if name not in model._tied_weights_keys}
    # Some cannot be saved; the file of the source replaces this one.
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id)
    with new_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=state_dict)
        copy_tokenizer(tokenizer_source, partial, revision=revision)


def copy_tokenizer(source: str, folder: Path, *, revision: str | None = None) -> None:
    """Copy the tokenizer files, chat template and generation config of a model byte for byte."""
    for name in TOKENIZER_FILES:
        file = file_of(source, name, revision=revision)
        if file is not None:
            shutil.copyfile(file, folder / name)


def file_of(path: str, name: str, *, revision: str | None = None) -> Path | None:
    """A file of a model, None if it has no such file."""
    found = cached_file(
        local_model(path),
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def check_same_tokenizer(
    draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, draft_name: str, target_name: str
) -> None:
    """Check that two models use the same token ids. Raises UserError naming the first entry that differs."""
    ours, theirs = draft.get_vocab(), target.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = differing[0]
    raise UserError(
        f"draft {draft_name} and target {target_name} have different tokenizers: {len(differing)} entries differ, the "
        f"first is {token!r} (id {ours.get(token)} and {theirs.get(token)}); use a target of the draft's family"
    )
