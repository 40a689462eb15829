"""Score a token store: a target's log-probabilities of every supervised token, for objectives with a teacher."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config, ModelConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encoder_identity
from pard_train.data.scores import Scores, write_scores
from pard_train.data.store import TOKENS_FOLDER, TokenStore
from pard_train.device import this_process
from pard_train.errors import UserError
from pard_train.mask_token import produced_ids
from pard_train.model import check_same_tokenizer, load_base_tokenizer
from pard_train.runs import MANIFEST_FILE, SEAL_FILE, check_sealed, fingerprint, provenance, seal_folder, write_json
from pard_train.targets.target import first_target, load_targets


def score(config: Config) -> Path:
    """Score a store with the first target.

    Returns:
        Folder of the scores.

    Raises:
        UserError: if the tokens, the target or finished scores cannot be read, their tokenizers differ or have fewer
            than top_k tokens, or the number of processes does not fit.
    """
    settings, process = config.score, this_process()
    _check_nodes(process)
    name = first_target(config)
    target = load_targets(replace(config, targets=config.targets[:1]))[0]
    tokens = Path(settings.tokens or Path(config.output_dir) / TOKENS_FOLDER)
    store = TokenStore.open(tokens)
    _check_tokens(store, target.tokenizer, config.model, name)
    num_tokens = max(produced_ids(target.tokenizer)) + 1  # rows beyond are padding, of which a draft may have fewer
    if settings.top_k > num_tokens:
        raise UserError(f"score.top_k={settings.top_k}: the tokenizer has {num_tokens} tokens; give at most as many")
    identity = {"target": target.fingerprint, "dtype": target.dtype, "top_k": settings.top_k, "num_tokens": num_tokens}
    folder = tokens / "scores" / fingerprint(identity)
    if (folder / SEAL_FILE).exists():  # finished
        check_sealed(folder)
        return folder
    with process.main_process_first():
        scores = Scores.open(folder, store, top_k=settings.top_k, create=True)
    write_scores(
        lambda: target.weights,
        store,
        scores,
        batch_tokens=settings.batch_tokens,
        process=process,
        num_tokens=num_tokens,
    )
    if process.is_main_process:
        counts = {"documents": len(store), "tokens": int(scores.first[-1]), "bytes_per_token": 2 + 6 * settings.top_k}
        made_of = {"identity": identity, "target": name, "tokens": store.manifest["identity"]}
        outside = {"mass_outside_top_k": round(scores.mass_outside(), 6)}
        write_json(folder / MANIFEST_FILE, {**made_of, "counts": counts, **outside, "made_by": provenance()})
        seal_folder(folder)
    return folder


def _check_nodes(process: PartialState) -> None:
    if int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes)) < process.num_processes:
        raise UserError(
            "score.py runs on one node: its processes write into the same memory-mapped files, which lose writes when "
            "nodes share them over a network. Start it on one node"
        )


def _check_tokens(store: TokenStore, tokenizer: PreTrainedTokenizerBase, base: ModelConfig, target: str) -> None:
    """Check that draft, target and store use the same tokens. Raises UserError."""
    own = load_base_tokenizer(base)
    check_same_tokenizer(own, tokenizer, base.path, target)
    if store.manifest["identity"]["tokenizer"] != encoder_identity(ChatEncoder(own))["tokenizer"]:
        raise UserError(
            f"{store.folder} was encoded with the tokenizer of {store.manifest['model']}, not with that of "
            f"model.path={base.path}: give the model it was encoded for"
        )
