"""Chat with speculative decoding in the terminal; accepted draft tokens are green.

python recipes/generate.py draft.path=outputs/my-draft/export targets=[Qwen/Qwen2.5-7B-Instruct] prompt="Write a haiku."
"""

from __future__ import annotations

from pard_train.config import Config
from pard_train.errors import UserError
from pard_train.program import hydra_program
from pard_train.validation import validate_generate


def run(config: Config) -> None:
    """Answer one prompt, or chat until an empty line."""
    from pard_train.generation.terminal import ChatSession

    session = ChatSession(config)
    if config.generate.prompt is not None:
        session.answer(config.generate.prompt)
        return
    print("An empty line ends the chat.")
    while question := _read_question():
        try:
            session.answer(question)
        except UserError as error:  # too long, or refused by the template: the conversation goes on
            print(error)


def _read_question() -> str:
    """The next question; empty at the end of the input."""
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    hydra_program("generate", validate_generate, run)
