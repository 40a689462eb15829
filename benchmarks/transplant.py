"""What a tokenizer transplant costs: the model with its new vocabulary against the one with its own, on the same text.

    python benchmarks/transplant.py ORIGINAL CHATS.jsonl DRAFT [DRAFT ...]

Both read the chat as ORIGINAL's template writes it, each in its own tokens. Compared are the answers:

* bits per byte: of the answer's text, comparable between vocabularies.
* agreement: of the places where both have a token boundary, the share where the most likely next tokens are equal, as
  bytes; and where one is the beginning of the other, because one vocabulary may cut finer.

The mask token is left out of the choice. Depth 0 only: acceptance is what recipes/evaluate.py measures.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pard_train.data.chat import ChatEncoder
from pard_train.mask_token import mask_token_of
from pard_train.model import load_causal_lm, load_tokenizer
from pard_train.transplant import Pieces


@dataclass(frozen=True)
class Reading:
    """What a model says of an answer.

    Attributes:
        choice: place in the text, in bytes, -> most likely next token, as bytes.
        bits: of the answer's tokens.
        num_tokens: of the answer.
    """

    choice: dict[int, bytes]
    bits: float
    num_tokens: int


class Reader:
    """A model that reads texts."""

    def __init__(self, name: str):
        self.pieces = Pieces(load_tokenizer(name), name)
        self.model = load_causal_lm(name, dtype=torch.float32).eval()
        self.mask = mask_token_of(self.model.config)

    @torch.inference_mode()
    def read(self, text: str, start: int) -> Reading:
        """Read a text whose answer starts at a byte."""
        ids = self.pieces.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = np.cumsum([len(self.pieces.of[i][0]) for i in ids])
        assert ends[-1] == len(text.encode())
        logits = self.model(torch.tensor([ids])).logits[0]
        if self.mask is not None:
            logits[:, self.mask] = -torch.inf
        logprobs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        is_answer = ends[1:] > start
        best = logits.argmax(-1).tolist()
        choice = {
            int(end): self.pieces.of.get(i, (b"", False))[0] for end, i in zip(ends, best, strict=True) if end >= start
        }
        choice.pop(int(ends[-1]))
        return Reading(choice, float(-logprobs[is_answer].sum() / np.log(2)), int(is_answer.sum()))


def main() -> None:
    """Print one line per model."""
    original, chats, *drafts = sys.argv[1:]
    reader = Reader(original)
    encoder, texts = ChatEncoder(reader.pieces.tokenizer), []
    for line in Path(chats).read_text().splitlines():
        messages = json.loads(line)["messages"][:2]
        prompt = encoder.render(messages[:1], generation_prompt=True)
        texts.append((prompt + messages[1]["content"] + encoder.end_of_turn, len(prompt.encode())))
    num_bytes = sum(len(text.encode()) - start for text, start in texts)
    own = [reader.read(*text) for text in texts]
    print(f"{len(texts)} answers, {num_bytes} bytes")
    print("| model | tokens | bits per byte | places | equal | or beginning |\n| --- | --- | --- | --- | --- | --- |")
    print(f"| {original} | {sum(r.num_tokens for r in own)} | {sum(r.bits for r in own) / num_bytes:.3f} | | | |")
    for name in drafts:
        reader = Reader(name)
        theirs = [reader.read(*text) for text in texts]
        pairs = [
            (a.choice[p], b.choice[p]) for a, b in zip(own, theirs, strict=True) for p in a.choice.keys() & b.choice
        ]
        equal = np.mean([a == b for a, b in pairs])
        begins = np.mean([bool(a and b) and (a.startswith(b) or b.startswith(a)) for a, b in pairs])
        size, bits = sum(r.num_tokens for r in theirs), sum(r.bits for r in theirs) / num_bytes
        print(f"| {name} | {size} | {bits:.3f} | {len(pairs)} | {equal:.1%} | {begins:.1%} |", flush=True)


if __name__ == "__main__":
    main()
