"""Have target models write the answers: acceptance is decided by training on the target's own text.

    python data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data
    torchrun --nproc_per_node 8 data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data
    python data_scripts/regenerate.py experiment=qwen2.5-0.5b output_dir=outputs/my-data \\
        regenerate.servers=[http://a:8000/v1,http://b:8000/v1]

Every assistant turn is written anew, turn by turn, after the new earlier ones. Reads OUTPUT_DIR/prompts/train.jsonl, or
regenerate.prompts. Writes OUTPUT_DIR/answers/: answers.jsonl, one chat a line in the order of the prompts ({"messages",
"finish_reason", "target", ...}, what else the row had is kept); rejects.jsonl with those without an answer, and why;
manifest.json; and target_text/, where every answer is kept as it comes. The same command goes on where it was killed,
and ends with the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.device import this_process
from pard_train.errors import UserError
from pard_train.program import hydra_program
from pard_train.targets.compatibility import check_revision_unused
from pard_train.targets.regeneration import ANSWERS_FOLDER, PROMPTS_FILE, write_answers
from pard_train.validation import validate_regenerate


def run(config: Config) -> None:
    """Write the answers of an experiment and say where."""
    prompts = Path(config.regenerate.prompts or Path(config.output_dir) / PROMPTS_FILE)
    if not prompts.is_file():
        raise UserError(
            f"{prompts}: no such file; make it with data_scripts/prepare.py, or give regenerate.prompts=FILE"
        )
    targets = config.regenerate.targets or [config.model.path]
    check_revision_unused(config.model, targets)
    written = write_answers(
        config.regenerate,
        targets,
        prompts,
        Path(config.output_dir) / ANSWERS_FOLDER,
        template_kwargs=config.data.template_kwargs,
        seed=config.seed,
    )
    if this_process().is_main_process:
        print(written.summary())
        print(written.path)


if __name__ == "__main__":
    hydra_program("data", lambda config: validate_regenerate(config.regenerate), run, shares_work=True)
