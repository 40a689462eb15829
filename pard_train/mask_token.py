"""The shared mask token: which id it has, and the keys of config.json by which engines find it."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pard_train.config import DraftConfig
from pard_train.errors import UserError


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, num_rows: int, draft: DraftConfig) -> int:
    """Id of the shared mask token.

    Args:
        tokenizer: of the base model.
        num_rows: rows of its embedding.
        draft: an explicit choice (`mask_token_id` or `mask_token`), or neither.

    Returns:
        The choice, else the first row that no tokenizer entry uses, else `num_rows`: a row to be appended.

    Raises:
        UserError: if the choice is outside the vocabulary, is an ordinary token, or does not exist.
    """
    used = produced_ids(tokenizer)
    spare = [i for i in range(num_rows) if i not in used]
    allowed = f"{spare[0]}..{spare[-1]}" if spare else f"{num_rows} (a row to be appended)"
    if draft.mask_token is not None:
        token_id = tokenizer.get_vocab().get(draft.mask_token, -1)
        special = tokenizer.added_tokens_decoder.get(token_id)
        roles = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
        if special is None or not special.special or token_id in roles or token_id >= num_rows:
            raise UserError(
                f"draft.mask_token={draft.mask_token!r} must be a special token with a row and no role (end, start, "
                f"padding) in the tokenizer of {tokenizer.name_or_path}; or leave it null for id {allowed}"
            )
        return token_id
    if draft.mask_token_id is None:
        if not spare and num_rows in used:
            token = tokenizer.convert_ids_to_tokens(num_rows)
            raise UserError(f"the row to append, {num_rows}, is the tokenizer's {token!r}: give draft.mask_token=TOKEN")
        return spare[0] if spare else num_rows
    if draft.mask_token_id in used:
        token = tokenizer.convert_ids_to_tokens(draft.mask_token_id)
        raise UserError(
            f"draft.mask_token_id={draft.mask_token_id} is the token {token!r}, which the tokenizer can produce; "
            f"allowed are {allowed}, or a reserved special token by name in draft.mask_token"
        )
    if draft.mask_token_id > num_rows or (spare and draft.mask_token_id == num_rows):
        raise UserError(
            f"draft.mask_token_id={draft.mask_token_id} is outside the vocabulary of {num_rows} rows; "
            f"allowed are {allowed}"
        )
    return draft.mask_token_id


def produced_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every id that the tokenizer has an entry for."""
    return set(tokenizer.get_vocab().values()) | set(tokenizer.added_tokens_decoder)


def set_draft_keys(config: PretrainedConfig, mask_token_id: int, num_draft_tokens: int | None) -> None:
    """Set what engines read in config.json.

    Args:
        config: of the draft model.
        mask_token_id: vLLM and TensorRT-LLM read it as `pard_token` or `mask_token_id`.
        num_draft_tokens: K_train, None if unknown. K may be larger when serving.
    """
    config.pard_token = config.mask_token_id = mask_token_id
    config.spd_type = "pard"
    if num_draft_tokens is not None:
        config.pard_num_draft_tokens = num_draft_tokens


def mask_token_of(config: PretrainedConfig) -> int | None:
    """Mask token id of a draft model's config, None if it is no draft model.

    Raises:
        UserError: if the two keys that engines read disagree or lie outside the vocabulary.
    """
    ids = {value for key in ("pard_token", "mask_token_id") if (value := getattr(config, key, None)) is not None}
    if not ids:
        return None
    if len(ids) > 1 or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise UserError(
            f"config.json of {config.name_or_path}: pard_token={getattr(config, 'pard_token', None)} and mask_token_id="
            f"{getattr(config, 'mask_token_id', None)} must be one id in [0, {config.vocab_size})"
        )
    return ids.pop()


def required_mask_token_of(config: PretrainedConfig) -> int:
    """Mask token id of a draft model's config. Raises UserError if the model is no draft model."""
    mask_token_id = mask_token_of(config)
    if mask_token_id is None:
        raise UserError(
            f"{config.name_or_path} is not a parallel draft model (its config.json has no pard_token): "
            "make one with recipes/train.py"
        )
    return mask_token_id
