"""Cache a target's log-probabilities of every supervised token, for objectives that need a teacher.

    python data_scripts/score.py experiment=qwen2.5-0.5b targets=[Qwen/Qwen2.5-7B-Instruct] output_dir=outputs/my-data
    torchrun --nproc_per_node 8 data_scripts/score.py ...        # the processes share the work

Reads OUTPUT_DIR/tokens, or score.tokens. Writes TOKENS/scores/FINGERPRINT/, the data.scores of training. The same
command resumes an interrupted run.
"""

from __future__ import annotations

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_score


def run(config: Config) -> None:
    """Score the tokens with the first target, and print how many and where."""
    from pard_train.device import this_process
    from pard_train.runs import MANIFEST_FILE, read_json
    from pard_train.targets.scoring import score

    folder = score(config)
    if this_process().is_main_process:
        manifest = read_json(folder / MANIFEST_FILE)
        summary = "{tokens:,} supervised tokens of {documents:,} documents, {bytes_per_token} bytes each"
        print(summary.format(**manifest["counts"]))
        print(f"probability outside of the top {config.score.top_k}: {manifest['mass_outside_top_k']:.2%}")
        print(f"{folder}\ntrain with data.source={folder.parents[1]} data.scores={folder}")


if __name__ == "__main__":
    hydra_program("score", validate_score, run)
