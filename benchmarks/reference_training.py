"""Train a draft as PARD's public reference does, to compare what it accepts with our recipe.

    make quickstart
    python benchmarks/reference_training.py --run outputs/quickstart/train --to outputs/reference \\
        --answers outputs/quickstart/answers/answers.jsonl --learning-rate 3e-4 --schedule linear
    python recipes/evaluate.py experiment=quickstart drafts.reference=outputs/reference ...

What follows the reference: COD drawn once per batch over prompt and padding, dense masks, labels on the prompt too and
none at the end of a turn (its padding token is the end-of-turn token), the first turn only, a mask row that keeps what
the base has there, equal weights for all depths, AdamW with PyTorch's betas. Two things are kinder than it is: the chat
template is the right one, and samples are padded to the longest of their batch. Its published schedule is
--learning-rate 3e-5 --schedule constant.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from reference import build_dense_batch, dense_loss, draw_kept
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from pard_train.config import DraftConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.downloads import local_model

WARMUP_STEPS = 5


def first_turns(answers: Path, encoder: ChatEncoder, max_length: int) -> list[Document]:
    """Every chat up to its first answer, with labels on all tokens but the ends of turns."""
    end = encoder.tokenizer.eos_token_id
    documents = []
    for line in answers.read_text().splitlines():
        messages = json.loads(line)["messages"]
        last = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
        [document] = encoder.encode(messages[: last + 1], origin=answers.name)
        ids = document.input_ids[:max_length]
        documents.append(replace(document, input_ids=ids, loss_mask=ids != end))
    return documents


def main() -> None:
    """Train and write the draft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="run of recipes/train.py whose init/ is the start")
    parser.add_argument("--answers", type=Path, required=True, help="JSONL of chats")
    parser.add_argument("--to", type=Path, required=True, help="folder of the draft")
    parser.add_argument("--base", default="pypi:SmolLM2-135M-Instruct", help="model that the mask row is taken from")
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--schedule", default="constant", help="of transformers.get_scheduler")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of a step")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=42)
    arguments = parser.parse_args()
    start = arguments.run / "init"
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="eager").train()
    model.gradient_checkpointing_enable()  # equal gradients in a fifth of the memory
    mask_token_id = model.config.mask_token_id
    base = AutoModelForCausalLM.from_pretrained(local_model(arguments.base), dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[mask_token_id] = base.get_input_embeddings().weight[mask_token_id]
    del base
    documents = first_turns(arguments.answers, ChatEncoder(tokenizer, {}), arguments.max_length)
    draft, draw = DraftConfig(), np.random.default_rng(arguments.seed)
    order = np.concatenate([draw.permutation(len(documents)) for _ in range(arguments.epochs)])
    batches = np.array_split(order, -(-len(order) // arguments.batch_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    warmup = WARMUP_STEPS if arguments.schedule != "constant" else 0
    schedule = get_scheduler(arguments.schedule, optimizer, warmup, len(batches))
    slots, started = 0, time.perf_counter()
    for numbers in (progress := tqdm(batches, unit="step")):
        chosen = [documents[number] for number in numbers]
        kept = draw_kept(max(len(document.input_ids) for document in chosen), draft, draw)
        batch = build_dense_batch(chosen, kept, mask_token_id, tokenizer.pad_token_id)
        slots += batch.input_ids.numel()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dense_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    shutil.copytree(start, arguments.to)
    model.save_pretrained(arguments.to)
    seconds = time.perf_counter() - started
    print(f"{len(batches)} steps, {slots:,} slots, {seconds:,.0f} s: {arguments.to}")


if __name__ == "__main__":
    main()
