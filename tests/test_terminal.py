"""A chat in the terminal says what it decodes, and how fast."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny import config_for
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from vllm_server import ROOT

from pard_train.config import DraftConfig, ModelConfig
from pard_train.data.chat import ChatEncoder
from pard_train.errors import UserError
from pard_train.generation.decoding import Step
from pard_train.generation.terminal import ChatSession, TokenPrinter
from pard_train.model import inspect_base, write_initial_draft


@pytest.fixture(scope="module")
def draft_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The untrained draft of the tiny base model."""
    folder = tmp_path_factory.mktemp("drafts") / "draft"
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 4, folder)
    return folder


def test_words_whose_space_is_told_by_their_context_are_shown_as_the_whole_answer_is() -> None:
    words = Tokenizer(WordLevel({"\u2581Hello": 0, "\u2581big": 1, "\u2581world": 2}))
    words.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer, output = PreTrainedTokenizerFast(tokenizer_object=words), io.StringIO()
    printer = TokenPrinter(tokenizer, Console(file=output, width=200))
    printer.show(Step([0, 1], 1))
    printer.show(Step([2], 0))
    assert output.getvalue() == tokenizer.decode([0, 1, 2]) == "Hello big world"


def chat(draft: Path, target: Path, **settings: object) -> tuple[list[str], str]:
    """Two answers of a session, and all that stood on the console."""
    config = config_for("generate", draft=draft, target=target, max_new_tokens=12, num_draft_tokens=3, **settings)
    output = io.StringIO()
    session = ChatSession(config, Console(file=output, width=200, highlight=False, soft_wrap=True))
    return [session.answer("the cat sees"), session.answer("why")], output.getvalue()


def test_a_question_that_is_too_long_does_not_end_the_conversation(draft_folder: Path, base_folder: Path) -> None:
    command = [sys.executable, "recipes/generate.py", f"draft.path={draft_folder}", f"targets=[{base_folder}]"]
    questions = "the cat sees\n" + "the cat " * 2000 + "\nwhy\n\n"
    options = {"cwd": ROOT, "input": questions, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run([*command, "max_new_tokens=8"], check=True, **options)
    assert done.stdout.count("(tau ") == 2
    assert "start a new conversation" in done.stdout


def test_the_target_of_a_chat_goes_where_the_device_map_says(draft_folder: Path, base_folder: Path) -> None:
    config = config_for("generate", draft=draft_folder, target=base_folder, device_map="nowhere")
    with pytest.raises(UserError, match="nowhere"):
        ChatSession(config)


def test_a_greedy_chat_shows_the_answers_and_that_they_are_the_targets_own(
    draft_folder: Path, base_folder: Path
) -> None:
    answers, output = chat(draft_folder, base_folder)
    assert output.count("same text)") == 2
    assert output.count("(tau ") == output.count("without draft") == 2
    for answer in answers:
        assert answer.rstrip("\ufffd") in output


def test_a_target_that_cannot_be_decoded_is_refused_before_any_weights_are_read(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(base_folder, tmp_path / "target")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"layer_types": ["chunked_attention"] * 2}))
    (target / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"it has chunked_attention layers"):
        chat(draft_folder, target)


def test_a_chat_beyond_the_length_of_training_says_so_once(
    draft_folder: Path, base_folder: Path, tmp_path: Path
) -> None:
    short = shutil.copytree(draft_folder, tmp_path / "draft")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"pard_trained_length": 16}))
    _, output = chat(short, base_folder)
    assert output.count("the draft was trained on up to 16 tokens; this may take ") == 1
    assert "was trained on" not in chat(draft_folder, base_folder)[1]


@pytest.mark.parametrize("which", ["draft", "target"])
def test_a_question_is_refused_where_its_answer_might_leave_the_context(
    draft_folder: Path, base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, which: str
) -> None:
    folders = {"draft": draft_folder, "target": base_folder}
    short = folders[which] = shutil.copytree(folders[which], tmp_path / which)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 64}
    (short / "config.json").write_text(json.dumps(config))
    question, output = "the cat sees", io.StringIO()
    num_prompt = len(ChatEncoder(tokenizer).encode_prompt([{"role": "user", "content": question}]))

    def session(num_tokens: int) -> ChatSession:
        limits = {"num_draft_tokens": 3, "max_new_tokens": num_tokens - 3 - num_prompt}
        config = config_for("generate", **folders, **limits)
        return ChatSession(config, Console(file=output))

    too_long = session(65)
    with pytest.raises(UserError, match=rf"{which} has 64 positions, .* may take 65: ask something shorter"):
        too_long.answer(question)
    assert (too_long.messages, output.getvalue()) == ([], "")
    assert session(64).answer(question)


def test_a_sampled_chat_is_decided_by_its_seed(draft_folder: Path, base_folder: Path) -> None:
    def sampled(seed: int) -> list[str]:
        answers, output = chat(draft_folder, base_folder, temperature=1.0, top_p=0.9, seed=seed)
        assert "same text" not in output
        assert "TEXT DIFFERS" not in output
        return answers

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
