"""The tokenizers of SmolLM2, Qwen2.5 and Qwen3 as they are shipped: exact masks on chats as people write them."""

from __future__ import annotations

import pytest
from packaged_tokenizers import packaged_tokenizer

from pard_train.config import DataConfig
from pard_train.data.chat import ChatEncoder
from pard_train.data.inspection import check_examples
from pard_train.data.slots import quoted

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
def encoder(request: pytest.FixtureRequest) -> ChatEncoder:
    """Each family's own tokenizer and chat template."""
    return ChatEncoder(packaged_tokenizer(request.param))


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


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gemma3"])
def test_every_token_can_be_shown_in_quotes(family: str) -> None:
    tokenizer = packaged_tokenizer(family)
    odd = tokenizer("\ufffd caf\ufffd \U0001f389", add_special_tokens=False)["input_ids"]
    assert all(quoted(token, tokenizer)[0] in "'\"" for token in odd)
