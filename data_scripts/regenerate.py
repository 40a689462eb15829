"""Have the targets write the answers: a draft learns to predict what its targets write.

    python data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data
    torchrun --nproc_per_node 8 data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data
    python data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data \\
        inference.servers=[http://a:8000/v1,http://b:8000/v1]

Every assistant turn is written anew, after the new earlier turns. Reads OUTPUT_DIR/prompts/train.jsonl, or
regenerate.prompts. Writes OUTPUT_DIR/answers/: answers.jsonl, one chat per line in the order of the prompts
({"messages", "finish_reason", "target", ...} and the other fields of the row); rejects.jsonl with the rows without an
answer, and why; manifest.json; and target_text/, the cache of answers. The same command resumes an interrupted run and
writes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.commands import command
from pard_train.config import Config
from pard_train.errors import UserError
from pard_train.program import hydra_program
from pard_train.validation import validate_regenerate


def run(config: Config) -> None:
    """Write the answers of an experiment and print the counts."""
    from pard_train.data.prompts import PROMPTS_FOLDER, TRAIN_FILE
    from pard_train.device import this_process
    from pard_train.runs import MANIFEST_FILE, read_json
    from pard_train.targets.regeneration import ANSWERS_FOLDER, write_answers

    prompts = Path(config.regenerate.prompts or Path(config.output_dir) / PROMPTS_FOLDER / TRAIN_FILE)
    if not prompts.is_file():
        raise UserError(f"{prompts}: no such file; write it with {command('prepare')}, or give regenerate.prompts=FILE")
    answers = write_answers(config, prompts, Path(config.output_dir) / ANSWERS_FOLDER)
    if this_process().is_main_process:
        summary = (
            "{rows:,} rows -> {answered:,} conversations with {answers:,} answers ({cut:,} cut by the length limit), "
            "{rejected:,} rejected; {new_tokens:,} new tokens, {tokens_per_second:,.0f} tokens/s"
        )
        print(f"{summary.format(**read_json(answers.parent / MANIFEST_FILE)['counts'])}\n{answers}")


if __name__ == "__main__":
    hydra_program("regenerate", validate_regenerate, run)
