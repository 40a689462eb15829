"""Clean prompts from any chats: deduplicated, decontaminated, mixed by weight, with a held-out part.

    python data_scripts/prepare.py source=[ultrachat,evol_codealpaca] output_dir=outputs/my-data
    python data_scripts/prepare.py sources.mine.path=chats.jsonl bad_rows=set_aside output_dir=outputs/my-data
    python data_scripts/prepare.py source=[ultrachat,openr1_math] sources.ultrachat.weight=3 \\
        sources.openr1_math.weight=1 num_rows=100000 output_dir=outputs/my-data

Presets are the files of conf/source/. Writes OUTPUT_DIR/prompts/: train.jsonl and held_out/SOURCE.jsonl, one chat per
line ({"messages": [...], "id", "source", ...}), in an order that depends only on the chats and the seed; rejects.jsonl
if rows were set aside; and manifest.json with the number of rows at every step.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_prepare


def run(config: Config) -> None:
    """Write the prompts of an experiment and print the counts."""
    from pard_train.data.prompts import PROMPTS_FOLDER, TRAIN, prepare
    from pard_train.runs import MANIFEST_FILE, read_json

    folder = Path(config.output_dir) / PROMPTS_FOLDER
    train, held_out = prepare(config.prepare, folder, seed=config.seed)
    counts = read_json(folder / MANIFEST_FILE)["counts"]
    for name, number_of in counts.items():
        print(f"{name}: " + ", ".join(f"{number:,} {outcome}" for outcome, number in number_of.items()))
    print(f"{sum(number_of.get(TRAIN, 0) for number_of in counts.values()):,} training rows")
    print("\n".join(map(str, [train, *held_out])))


if __name__ == "__main__":
    hydra_program("prepare", validate_prepare, run)
