"""Tokenizer transplant: the rows that the tokens of another tokenizer get from those of a model.

A token that both tokenizers have keeps its row. A special token that the old one lacks gets the row of the token with
its role: end of turn, end, start, padding. Any other gets the mean of the rows of its spelling in the old tokenizer.

Tokens are compared as bytes. Byte-level BPE writes each byte as one character. BPE with byte fallback, as converted
from SentencePiece, writes text with a mark for spaces, and rare bytes as <0xE2>. Other tokenizers are refused.
"""

from __future__ import annotations

import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pard_train.errors import UserError

Piece = tuple[bytes, bool]  # spelling of a token, and whether it is special

CHAR_OF_BYTE = bytes_to_unicode()
BYTE_OF_CHAR = {char: byte for byte, char in CHAR_OF_BYTE.items()}
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
SPACE = "\u2581"  # of SentencePiece
NUM_BYTES = 256
PROBE = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]


class Pieces:
    """The entries of a tokenizer as bytes.

    Args:
        tokenizer: byte-level BPE, or a tokenizer with byte fallback.
        name: of its model, for errors.

    Attributes:
        of: id -> piece.
        ids: piece -> id.

    Raises:
        UserError: if the tokenizer is missing, or its entries are not spelled in bytes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        self.tokenizer, vocabulary = tokenizer, tokenizer.get_vocab()
        if len(vocabulary) < NUM_BYTES:
            raise UserError(f"model.tokenizer: {name} has no tokenizer files: name a folder or model that has them")
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend else ""
        self._is_byte_level = '"ByteLevel"' in decoder
        if not self._is_byte_level and '"ByteFallback"' not in decoder:
            raise UserError(
                f"model.tokenizer: tokens of {name} are not spelled in bytes, so they cannot be compared: both "
                "tokenizers must be byte-level BPE or have byte fallback; leave model.tokenizer null"
            )
        self._model, self._ids = backend.model, vocabulary
        added = tokenizer.added_tokens_decoder
        self.of: dict[int, Piece] = {
            i: (added[i].content.encode(), added[i].special) if i in added else (self._bytes(token), False)
            for token, i in vocabulary.items()
        }
        in_order = sorted(vocabulary, key=lambda token: BYTE_TOKEN.fullmatch(token) is None)  # "A" replaces <0x41>
        self.ids = {self.of[vocabulary[token]]: vocabulary[token] for token in in_order}

    def _bytes(self, token: str) -> bytes:
        if self._is_byte_level:
            is_known = all(char in BYTE_OF_CHAR for char in token)
            return bytes(BYTE_OF_CHAR[char] for char in token) if is_known else token.encode()
        found = BYTE_TOKEN.fullmatch(token)
        return bytes([int(found[1], 16)]) if found else token.replace(SPACE, " ").encode()

    def spell(self, text: bytes) -> list[int]:
        """Ids of the tokens that some bytes consist of; empty if the vocabulary lacks them."""
        if self._is_byte_level:
            return [token.id for token in self._model.tokenize("".join(CHAR_OF_BYTE[byte] for byte in text))]
        try:
            return [token.id for token in self._model.tokenize(text.decode().replace(" ", SPACE))]
        except UnicodeDecodeError:  # part of a character
            return [self._ids[name] for byte in text if (name := f"<0x{byte:02X}>") in self._ids]

    def roles(self) -> dict[str, int]:
        """Ids of the special tokens that have a role."""
        tokenizer = self.tokenizer
        roles = {
            "end of turn": self._end_of_turn(),
            "end": tokenizer.eos_token_id,
            "start": tokenizer.bos_token_id,
            "padding": tokenizer.pad_token_id,
        }
        return {role: i for role, i in roles.items() if i is not None}

    def _end_of_turn(self) -> int | None:
        """The first added token that the chat template writes after an answer, else the end of a text."""
        if not self.tokenizer.chat_template:
            return self.tokenizer.eos_token_id
        _, found, tail = self.tokenizer.apply_chat_template(PROBE, tokenize=False).rpartition(PROBE[-1]["content"])
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
        return next((i for i in ids if i in self.tokenizer.added_tokens_decoder), self.tokenizer.eos_token_id)


def rows_to_average(old: Pieces, new: Pieces, num_rows: int) -> tuple[list[list[int]], str]:
    """The old rows whose mean each new row is.

    Args:
        old: of the model.
        new: of the target.
        num_rows: of the target's vocabulary.

    Returns:
        Old ids of every new row, empty for a row without a token; and a summary in one line.
    """
    role_of = {i: role for role, i in reversed(new.roles().items())}  # the first role counts
    old_roles, rows = old.roles(), []
    num = dict.fromkeys(("shared", "spelled", "special", "without a spelling"), 0)
    for i in range(num_rows):
        piece, role = new.of.get(i), role_of.get(i)
        if piece in old.ids:
            kind, ids = "shared", [old.ids[piece]]
        elif role in old_roles:
            kind, ids = "special", [old_roles[role]]
        else:
            ids = old.spell(piece[0]) if piece else []
            kind = "spelled" if ids else "without a spelling"
        num[kind] += 1
        rows.append(ids)
    return rows, ", ".join(f"{count:,} {kind}" for kind, count in num.items())
