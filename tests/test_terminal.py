"""A chat in the terminal says what it decodes, and how fast."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from pard_train.config import DraftConfig, GenerateConfig, ModelConfig
from pard_train.generation.terminal import ChatSession
from pard_train.model import inspect_base, write_initial_draft


@pytest.fixture(scope="module")
def draft_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained draft of the tiny base model."""
    folder = tmp_path_factory.mktemp("drafts") / "draft"
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 4, folder)
    return folder


def chat(draft: Path, target: Path, **settings: object) -> tuple[list[str], str]:
    """Two answers of a session, and all that stood on the console."""
    config = GenerateConfig(draft=str(draft), target=str(target), max_new_tokens=12, num_draft_tokens=3, **settings)
    output = io.StringIO()
    session = ChatSession(config, Console(file=output, width=200, highlight=False, soft_wrap=True))
    return [session.answer("the cat sees"), session.answer("why")], output.getvalue()


def test_a_greedy_chat_shows_the_answers_and_that_they_are_the_targets_own(
    draft_folder: Path, base_folder: Path
) -> None:
    answers, output = chat(draft_folder, base_folder)
    assert output.count("same text)") == 2
    assert output.count("(tau ") == output.count("without draft") == 2
    for answer in answers:
        assert answer.rstrip("\ufffd") in output


def test_a_sampled_chat_is_decided_by_its_seed(draft_folder: Path, base_folder: Path) -> None:
    def sampled(seed: int) -> list[str]:
        answers, output = chat(draft_folder, base_folder, temperature=1.0, top_p=0.9, seed=seed)
        assert "same text" not in output
        assert "TEXT DIFFERS" not in output
        return answers

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
