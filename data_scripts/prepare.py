"""From any chats to clean prompts: one schema, no question twice, nothing of the benchmarks, a part held out.

    M="model=qwen2.5-0.5b output_dir=outputs/my-data"
    python data_scripts/prepare.py $M source=[ultrachat,evol_codealpaca]
    python data_scripts/prepare.py $M prepare.sources.mine.path=chats.jsonl prepare.bad_rows=set_aside
    python data_scripts/prepare.py $M source=[ultrachat,openr1_math] prepare.sources.ultrachat.weight=3 \\
        prepare.sources.openr1_math.weight=1 prepare.num_rows=100000

Presets are the files of conf/source/. Writes OUTPUT_DIR/prompts/: train.jsonl and held_out/SOURCE.jsonl, one chat a
line ({"messages": [...], "id", "source", ...}), in an order that depends on nothing but the chats and the seed;
rejects.jsonl if rows were set aside; and manifest.json with the count of rows at every step.
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.data.prompts import PROMPTS_FOLDER, TRAIN, prepare
from pard_train.program import hydra_program
from pard_train.runs import MANIFEST_FILE, read_json
from pard_train.validation import validate_prepare


def run(config: Config) -> None:
    """Write the prompts of an experiment and say what became of the rows."""
    folder = Path(config.output_dir) / PROMPTS_FOLDER
    train, held_out = prepare(config.prepare, folder, seed=config.seed)
    counts = read_json(folder / MANIFEST_FILE)["counts"]
    for name, number_of in counts.items():
        print(f"{name}: " + ", ".join(f"{number:,} {fate}" for fate, number in number_of.items()))
    print(f"{sum(number_of.get(TRAIN, 0) for number_of in counts.values()):,} rows to train on")
    print("\n".join(map(str, [train, *held_out])))


if __name__ == "__main__":
    hydra_program("data", lambda config: validate_prepare(config.prepare), run)
