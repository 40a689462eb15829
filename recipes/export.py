"""Write a draft model as the plain Hugging Face folder that serving engines load.

    python recipes/export.py checkpoint=outputs/my-draft/draft output_dir=outputs/my-draft/export \\
        target=Qwen/Qwen2.5-7B-Instruct
"""

from __future__ import annotations

from pard_train.config import ExportConfig
from pard_train.validation import validate_export
from recipes.app import hydra_program


def run(config: ExportConfig) -> None:
    """Export and say where."""
    from pard_train.export import export

    print(f"exported and reloaded: {export(config)}")


def main() -> None:
    """Entry point of `pard-export`."""
    hydra_program("export", validate_export, run)


if __name__ == "__main__":
    main()
