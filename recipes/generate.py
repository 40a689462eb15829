"""Chat with speculative decoding in the terminal; accepted draft tokens are shown in green.

python recipes/generate.py draft=outputs/my-draft/export target=Qwen/Qwen2.5-7B-Instruct prompt="Write a haiku."
"""

from __future__ import annotations

from pard_train.config import GenerateConfig
from pard_train.program import hydra_program
from pard_train.validation import validate_generate


def run(config: GenerateConfig) -> None:
    """Answer one prompt, or chat until an empty line."""
    from pard_train.generation.terminal import ChatSession

    session = ChatSession(config)
    if config.prompt is not None:
        session.answer(config.prompt)
        return
    print("An empty line ends the chat.")
    while question := _ask():
        session.answer(question)


def _ask() -> str:
    """The next question; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def main() -> None:
    """Entry point of `pard-generate`."""
    hydra_program("generate", validate_generate, run)


if __name__ == "__main__":
    main()
