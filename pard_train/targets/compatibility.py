"""Compatibility of a draft with a target, checked on configs and tokenizers before weights are loaded.

An ERROR cannot work. A WARNING works here, but a serving engine refuses it or accepts fewer tokens: most drafts that
train well and serve badly fail one of these checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pard_train.errors import UserError
from pard_train.families import family_of
from pard_train.generation.decoding import end_ids_of
from pard_train.mask_token import required_mask_token_of
from pard_train.model import check_same_tokenizer, load_config, load_tokenizer

OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        level: OK, WARNING or ERROR.
        subject: such as `vocabulary rows`.
        text: what was found and, for a warning or error, what to do.
    """

    level: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject}: {self.text}"


@dataclass(frozen=True)
class Model:
    """Config and tokenizer of a draft or target."""

    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, name: str, *, trust_remote_code: bool = False) -> Model:
        """Read config and tokenizer. Raises UserError if they cannot be read or the architecture is not supported."""
        config = load_config(name, trust_remote_code=trust_remote_code)
        return cls(name, config, load_tokenizer(name, trust_remote_code=trust_remote_code))


def check_pair(draft: Model, target: Model, *, num_tokens: int, dtype: str) -> list[Finding]:
    """Check everything that a draft and a target should agree in.

    Args:
        draft: draft model.
        target: target model.
        num_tokens: of the longest text to be decoded: prompt, answer and draft tokens past its end.
        dtype: of the weights of both once loaded.

    Returns:
        One finding per check, in the order of the functions below.
    """
    return [
        _mask_token(draft),
        _tokenizer(draft, target),
        _vocabulary(draft, target),
        _end_ids(draft, target),
        _template(draft, target),
        _family(target),
        check_context(draft, num_tokens),
        check_context(target, num_tokens),
        _trained_length(draft, num_tokens),
        _dtype(draft, target, dtype),
        _tensor_parallel(draft, target),
    ]


def require(findings: Sequence[Finding]) -> None:
    """Raise UserError with every finding of level ERROR, if there are any."""
    errors = [finding for finding in findings if finding.level == ERROR]
    if errors:
        raise UserError("; ".join(f"{finding.subject}: {finding.text}" for finding in errors))


def _warn_unless(is_fine: bool, subject: str, fine: str, problem: str) -> Finding:
    return Finding(OK, subject, fine) if is_fine else Finding(WARNING, subject, problem)


def _mask_token(draft: Model) -> Finding:
    try:
        mask_token_id = required_mask_token_of(draft.config)
    except UserError as error:
        return Finding(ERROR, "mask token", str(error))
    # As PARDForCausalLM of TensorRT-LLM 1.3 and 1.4 looks it up: a key that is null counts as present.
    theirs = getattr(draft.config, "pard_token", getattr(draft.config, "mask_token_id", draft.config.vocab_size))
    return _warn_unless(
        theirs == mask_token_id,
        "mask token",
        f"{mask_token_id}, within {draft.config.vocab_size} rows",
        f"{mask_token_id}, but TensorRT-LLM would use pard_token={theirs}: export the draft with recipes/export.py",
    )


def _tokenizer(draft: Model, target: Model) -> Finding:
    try:
        check_same_tokenizer(draft.tokenizer, target.tokenizer, draft.name, target.name)
    except UserError as error:
        return Finding(ERROR, "tokenizer", str(error))
    return Finding(OK, "tokenizer", f"{len(target.tokenizer)} entries, all equal")


def _vocabulary(draft: Model, target: Model) -> Finding:
    ours, theirs = draft.config.vocab_size, target.config.vocab_size
    return _warn_unless(
        ours == theirs,
        "vocabulary rows",
        f"{ours} in both",
        f"draft {ours}, target {theirs}: vLLM and SGLang refuse unequal sizes; serve the folder that recipes/export.py "
        f"writes with targets=[{target.name}]",
    )


def _end_ids(draft: Model, target: Model) -> Finding:
    ours, theirs = (sorted(end_ids_of(model.name, model.tokenizer)) for model in (draft, target))
    return _warn_unless(
        set(theirs) <= set(ours),
        "end of turn",
        f"ids {theirs}",
        f"the target ends a turn at {theirs}, the draft's generation_config.json has {ours}: add the missing ids there "
        "(evaluation uses the target's)",
    )


def _template(draft: Model, target: Model) -> Finding:
    return _warn_unless(
        draft.tokenizer.chat_template == target.tokenizer.chat_template,
        "chat template",
        "the same in both",
        "draft and target have different ones; engines and evaluation use the target's: render the training data with "
        "it for the best acceptance",
    )


def _family(target: Model) -> Finding:
    """Check that a target of a known name has the rows and end-of-turn ids that its family file states."""
    found = family_of(target.name)
    if found is None:
        return Finding(OK, "family", f"{target.name} is in no file of conf/family")
    option, family, rows = found
    ends = sorted(end_ids_of(target.name, target.tokenizer))
    return _warn_unless(
        target.config.vocab_size == rows and set(family.end_ids) <= set(ends),
        "family",
        f"rows and end-of-turn ids as in conf/family/{option}.yaml",
        f"{target.name} has {target.config.vocab_size} rows and ends turns at {ends}, conf/family/{option}.yaml says "
        f"{rows} and {sorted(family.end_ids)}: check that it is the model of that name",
    )


def check_context(model: Model, num_tokens: int) -> Finding:
    """Check that a model has positions for so many tokens."""
    limit = getattr(model.config, "max_position_embeddings", None)
    subject = f"context of {model.name}"
    if limit is None or num_tokens <= limit:
        return Finding(OK, subject, f"{limit or 'no limit'}, needed {num_tokens}")
    text = f"{limit} positions, but prompt, answer and draft tokens need up to {num_tokens}"
    return Finding(ERROR, subject, f"{text}: use shorter prompts, or a smaller max_new_tokens or num_draft_tokens")


def _trained_length(draft: Model, num_tokens: int) -> Finding:
    limit = getattr(draft.config, "pard_trained_length", None)
    return _warn_unless(
        limit is None or num_tokens <= limit,
        "trained length",
        f"{limit or 'unknown'}, needed {num_tokens}",
        f"the draft was trained on documents of up to {limit} tokens, and texts here have up to {num_tokens}: expect "
        "fewer accepted tokens beyond, or train on longer documents (docs/guides/long-context.md)",
    )


def _dtype(draft: Model, target: Model, dtype: str) -> Finding:
    stored = {str(model.config.dtype or "unknown").removeprefix("torch.") for model in (draft, target)}
    text = f"loaded as {dtype}, stored as {' and '.join(sorted(stored))}"
    problem = f"{text}: near ties may resolve otherwise than in an engine"
    return _warn_unless(stored == {dtype} or dtype == "float32", "dtype", text, problem)


def _tensor_parallel(draft: Model, target: Model) -> Finding:
    """Check tensor parallelism: vLLM splits a draft as many ways as its target, so both must have the heads for it."""
    ours, theirs = (
        {ways for ways in (1, 2, 4, 8) if model.config.num_attention_heads % ways == 0} for model in (draft, target)
    )
    common = sorted(ours & theirs)
    text = f"{', '.join(map(str, common))} ways divide the heads of both"
    return _warn_unless(
        max(common) == max(theirs),
        "tensor parallelism",
        text,
        f"{text}, {max(theirs)} ways the target's only; vLLM splits both alike: serve with {max(common)} at most",
    )
