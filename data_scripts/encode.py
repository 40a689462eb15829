"""Turn chats into the tokens that training reads: rendered, tokenized, with loss masks, memory-mapped.

    python data_scripts/encode.py experiment=qwen2.5-0.5b data.source=outputs/my-data/answers/answers.jsonl \\
        output_dir=outputs/my-data

Writes OUTPUT_DIR/tokens, for data.source=OUTPUT_DIR/tokens. Training on chats encodes them into the cache; this program
does it ahead of time, on a machine with many cores. The same command skips a finished folder.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_encode


def run(config: Config) -> None:
    """Encode the chats of an experiment and print the counts."""
    from pard_train.data.chat import ChatEncoder
    from pard_train.data.store import TOKENS_FOLDER, encode_once
    from pard_train.model import load_base_tokenizer

    encoder = ChatEncoder(load_base_tokenizer(config.model), config.data.template_kwargs)
    store = encode_once(config.data, encoder, Path(config.output_dir) / TOKENS_FOLDER)
    print(f"{store.summary()}\nlength of a document in tokens: {store.manifest['document_length']}")
    speed = store.manifest["speed"]
    print("{tokens_per_second:,} tokens/s, {tokens_per_second_per_worker:,} for each of {workers}".format(**speed))
    print(store.folder)


if __name__ == "__main__":
    hydra_program("encode", validate_encode, run)
