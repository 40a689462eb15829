"""Write a draft model as the plain Hugging Face folders that serving engines load.

    python recipes/export.py draft.path=outputs/my-draft output_dir=outputs/my-draft/export \\
        targets=[Qwen/Qwen2.5-7B-Instruct,Qwen/Qwen2.5-1.5B-Instruct]
"""

from __future__ import annotations

from pathlib import Path

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_export


def run(config: Config) -> None:
    """Export, print the folders, and upload them if asked to."""
    from pard_train.publishing.export import export
    from pard_train.publishing.hub import push_to_hub

    folders = export(config)
    for folder in folders:
        print(f"exported and reloaded: {folder}")
    if config.export.push_to_hub is not None:
        for address in push_to_hub(folders, Path(config.output_dir), config.export):
            print(f"uploaded: {address}")


if __name__ == "__main__":
    hydra_program("export", validate_export, run)
