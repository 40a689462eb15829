"""Turn chats into the tokens that training reads: rendered, tokenized, masked, memory-mapped.

    python data_scripts/encode.py experiment=qwen2.5-0.5b data.source=outputs/my-data/answers/answers.jsonl \\
        output_dir=outputs/my-data

Writes OUTPUT_DIR/tokens, to be trained on with data.source=OUTPUT_DIR/tokens. Training on the chats themselves does the
same into the cache; this program is for doing it once, ahead, on a machine with many cores. Tokens that are there
already stand as they are.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import DataConfig, TrainConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import corpus_identity, encode_corpus
from pard_train.data.packages import local_model
from pard_train.data.store import TokenStore, is_store
from pard_train.errors import UserError
from pard_train.model import load_tokenizer
from pard_train.validation import validate_encode
from recipes.app import hydra_program

TOKENS_FOLDER = "tokens"


def is_encoded(data: DataConfig, encoder: ChatEncoder, folder: Path) -> bool:
    """Whether a folder holds these very tokens. Raises UserError if it holds others."""
    if not is_store(folder):
        return False
    found, wanted = TokenStore.open(folder).manifest["identity"], corpus_identity(data, encoder)
    changed = ", ".join(name for name in wanted if found.get(name) != wanted[name])
    if changed:
        raise UserError(f"{folder} holds other tokens ({changed} differs): choose another output_dir, or delete it")
    return True


def run(config: TrainConfig) -> None:
    """Encode the chats of an experiment and say what became of them."""
    tokenizer = load_tokenizer(
        local_model(config.model.path),
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    encoder, folder = ChatEncoder(tokenizer, config.data.template_kwargs), Path(config.output_dir) / TOKENS_FOLDER
    if not is_encoded(config.data, encoder, folder):
        encode_corpus(config.data, encoder, folder)
    store = TokenStore.open(folder)
    speed = store.manifest["speed"]
    print(f"{store.summary()}\nlength of a document in tokens: {store.manifest['document_length']}")
    print("{tokens_per_second:,} tokens/s, {tokens_per_second_per_worker:,} for each of {workers}".format(**speed))
    print(folder)


if __name__ == "__main__":
    hydra_program("data", lambda config: validate_encode(config.data), run)
