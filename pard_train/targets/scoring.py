"""A target's log-probabilities of every supervised token of a store, for objectives that need a teacher."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pard_train.config import Config, ModelConfig, ScoreConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encoder_identity
from pard_train.data.scores import Scores, write_scores
from pard_train.data.store import TOKENS_FOLDER, TokenStore
from pard_train.device import default_device, this_process
from pard_train.downloads import local_model
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.model import DTYPES, check_same_tokenizer, load_causal_lm, load_tokenizer
from pard_train.runs import MANIFEST_FILE, fingerprint, provenance, write_json
from pard_train.targets.compatibility import check_revision_unused


def score(config: Config) -> Path:
    """Score a store with a target.

    Returns:
        Folder of the scores.

    Raises:
        UserError: if the tokens or the target cannot be read, their tokenizers differ or have fewer than top_k tokens,
            or the processes are not as the settings need them.
    """
    settings, process = config.score, this_process()
    if int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes)) < process.num_processes:
        raise UserError(
            "score.py runs on one node: its processes write into the same memory-mapped files, which lose writes when "
            "nodes share them over a network. Start it on one node"
        )
    if settings.device_map and process.num_processes > 1:
        raise UserError(
            f"score.device_map={settings.device_map} spreads the target over the GPUs of one process, but "
            f"{process.num_processes} were started: call score.py with python"
        )
    name = settings.target or next(iter(config.regenerate.targets), config.model.path)
    check_revision_unused(config.model, [name])
    path, tokens = local_model(name), Path(settings.tokens or Path(config.output_dir) / TOKENS_FOLDER)
    store = TokenStore.open(tokens)
    tokenizer = load_tokenizer(path)
    _check_tokens(store, tokenizer, config.model, path)
    num_tokens = len(tokenizer)  # rows beyond are padding, of which a draft may have fewer
    if settings.top_k > num_tokens:
        raise UserError(f"score.top_k={settings.top_k}: the tokenizer has {num_tokens} tokens; give at most as many")
    identity = {"target": model_fingerprint(path), "dtype": settings.dtype, "top_k": settings.top_k}
    identity["num_tokens"] = num_tokens
    folder = tokens / "scores" / fingerprint(identity)
    with process.main_process_first():
        scores = Scores.open(folder, store, top_k=settings.top_k, create=True)
    write_scores(
        lambda: _load_target(path, settings),
        store,
        scores,
        batch_tokens=settings.batch_tokens,
        process=process,
        num_tokens=num_tokens,
    )
    if process.is_main_process:
        counts = {"documents": len(store), "tokens": int(scores.first[-1]), "bytes_per_token": 2 + 6 * settings.top_k}
        made_of = {"identity": identity, "target": path, "tokens": store.manifest["identity"]}
        outside = {"mass_outside_top_k": round(scores.mass_outside(), 6)}
        write_json(folder / MANIFEST_FILE, {**made_of, "counts": counts, **outside, "made_by": provenance()})
    return folder


def _check_tokens(store: TokenStore, tokenizer: PreTrainedTokenizerBase, draft: ModelConfig, target: str) -> None:
    """Check that draft, target and store speak of the same tokens. Raises UserError."""
    path, trust, revision = local_model(draft.path), draft.trust_remote_code, draft.revision
    own = load_tokenizer(path, trust_remote_code=trust, revision=revision)
    check_same_tokenizer(own, tokenizer, path, target)
    if store.manifest["identity"]["tokenizer"] != encoder_identity(ChatEncoder(own))["tokenizer"]:
        raise UserError(
            f"{store.folder} was encoded with the tokenizer of {store.manifest['model']}, which is not that of "
            f"model.path={draft.path}: give the model it was encoded for"
        )


def _load_target(path: str, settings: ScoreConfig) -> PreTrainedModel:
    model = load_causal_lm(path, dtype=DTYPES[settings.dtype], device_map=settings.device_map)
    return (model if settings.device_map else model.to(default_device())).eval()
