"""Have the target model write the answers: acceptance is decided by training on the target's own text.

    python data_scripts/regenerate.py experiment=qwen2.5-0.5b regenerate.prompts=outputs/my-data/prompts.jsonl \\
        output_dir=outputs/my-data

Greedy, in batches, in this process. Restartable: every finished batch is kept. Writes OUTPUT_DIR/answers.jsonl, whose
rows carry `messages` and `finish_reason`; an answer cut by the length limit is marked `length` and never taught as
ended.
"""

from __future__ import annotations

import json
from pathlib import Path

from pard_train.benchmarks import prompt_messages
from pard_train.chat import ChatEncoder
from pard_train.config import RegenerateConfig, TrainConfig
from pard_train.corpus import read_jsonl
from pard_train.decoding import Limits, end_ids_of
from pard_train.model import DTYPES, default_device, load_causal_lm, load_tokenizer
from pard_train.packages import local_model
from pard_train.target_text import Answer, fingerprint, greedy_answers, model_fingerprint
from pard_train.validation import validate_regenerate
from recipes.app import hydra_program

ANSWERS_FILE = "answers.jsonl"


def write_answers(
    config: RegenerateConfig, target: str, prompts_file: Path, folder: Path, template_kwargs: dict
) -> Path:
    """Write the target's greedy answer to every prompt.

    Args:
        config: limits, batch size and dtype.
        target: folder or hub name of the target model.
        prompts_file: JSONL of prompts.
        folder: where answers.jsonl and its cache go.
        template_kwargs: extra arguments of the chat template.

    Returns:
        The file of answers. A prompt that the target answers with nothing is left out.
    """
    target = local_model(target)
    tokenizer = load_tokenizer(target)
    encoder = ChatEncoder(tokenizer, template_kwargs)
    limits = Limits(config.max_new_tokens, end_ids_of(target, tokenizer))
    messages = [prompt_messages(row, origin) for row, origin in read_jsonl(prompts_file)]
    prompts = [encoder.encode_prompt(m) for m in messages]
    key = fingerprint([model_fingerprint(target), prompts, config.max_new_tokens, config.dtype])
    answers = greedy_answers(
        lambda: load_causal_lm(target, dtype=DTYPES[config.dtype]).to(default_device()).eval(),
        prompts,
        limits=limits,
        batch_size=config.batch_size,
        cache=folder / "target_text" / f"{key}.jsonl",
        pad_token_id=min(limits.end_ids),
        description=f"{Path(target).name} answers {prompts_file.name}",
    )
    rows = [_row(m, answer, encoder) for m, answer in zip(messages, answers, strict=True)]
    path = folder / ANSWERS_FILE
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row is not None))
    return path


def _row(messages: list[dict[str, str]], answer: Answer, encoder: ChatEncoder) -> dict | None:
    text = encoder.tokenizer.decode(answer.ids if answer.is_cut else answer.ids[:-1])
    if not text.strip():
        return None
    reason = "length" if answer.is_cut else "stop"
    return {"messages": [*messages, {"role": "assistant", "content": text}], "finish_reason": reason}


def run(config: TrainConfig) -> None:
    """Write the answers of an experiment and say where."""
    target = config.regenerate.target or config.model.path
    prompts, folder = Path(config.regenerate.prompts), Path(config.output_dir)
    print(write_answers(config.regenerate, target, prompts, folder, config.data.template_kwargs))


if __name__ == "__main__":
    hydra_program("data", lambda config: validate_regenerate(config.regenerate), run)
