"""Write a draft model as the plain Hugging Face folders that serving engines load.

    python recipes/export.py draft.path=outputs/my-draft output_dir=outputs/my-draft/export \\
        targets=[Qwen/Qwen2.5-7B-Instruct,Qwen/Qwen2.5-1.5B-Instruct]
"""

from __future__ import annotations

from pard_train.config import Config
from pard_train.program import hydra_program
from pard_train.validation import validate_export


def run(config: Config) -> None:
    """Export, and print the folders."""
    from pard_train.publishing.export import export

    for folder in export(config):
        print(f"exported and reloaded: {folder}")


if __name__ == "__main__":
    hydra_program("export", validate_export, run)
