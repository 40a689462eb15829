"""Turn chats into the tokens that training reads: rendered, tokenized, masked, memory-mapped.

    python data_scripts/encode.py experiment=qwen2.5-0.5b data.source=outputs/my-data/answers/answers.jsonl \\
        output_dir=outputs/my-data

Writes OUTPUT_DIR/tokens, to be trained on with data.source=OUTPUT_DIR/tokens. Training on the chats themselves does the
same into the cache; this program is for doing it once, ahead, on a machine with many cores. Tokens that are there
already stand as they are.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.data.chat import ChatEncoder
from pard_train.data.encoding import encode_corpus
from pard_train.data.store import TOKENS_FOLDER, TokenStore, is_encoded
from pard_train.downloads import local_model
from pard_train.model import load_tokenizer
from pard_train.program import hydra_program
from pard_train.validation import validate_encode


def run(config: Config) -> None:
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
    hydra_program("encode", validate_encode, run)
