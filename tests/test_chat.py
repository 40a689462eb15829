"""The loss mask covers each answer with its end-of-turn token, whatever the template; bad chats are named."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import CHATML, build_tokenizer
from transformers import PreTrainedTokenizerBase

from pard_train.chat import ChatEncoder, Document
from pard_train.errors import UserError

LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Like Qwen3: only answers after the last question keep their thoughts.
REASONING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
END_OF_TURN = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", REASONING: "<|im_end|>"}
TEMPLATES = pytest.mark.parametrize("template", END_OF_TURN, ids=["chatml", "llama3", "reasoning"])
Messages = list[dict[str, str]]


def encoder_of(template: str) -> ChatEncoder:
    """An encoder whose tokenizer merges newlines, so that text cut in pieces shows."""
    tokenizer = build_tokenizer(template)
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_SPECIAL}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(["\n\n"])
    tokenizer.name_or_path = "tiny-tokenizer"
    return ChatEncoder(tokenizer)


def chat(*contents: str) -> Messages:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def supervised_texts(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Text of every run of labels."""
    edges = np.flatnonzero(np.diff(document.loss_mask.astype(int), prepend=0, append=0))
    return [tokenizer.decode(document.input_ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


@TEMPLATES
@pytest.mark.parametrize(
    "contents",
    [
        ("Hi", "the cat runs"),
        ("Hi", "the cat runs", "and then", "it sleeps.\n\nThen eats", "why", "because"),
        ("¿Qué tal? 你好", "Très bien 😀👩‍👩‍👧 — 世界 नमस्ते"),
        ("What ends a turn?", "user\nassistant\n, or im_end and eot_id"),
        ("same", "same", "same", "same"),
        ("Hi", "the cat", "a question left open"),
    ],
    ids=["one turn", "three turns", "many scripts", "words of the template", "repeated text", "open end"],
)
def test_the_labels_are_the_answers_with_their_end_of_turn_tokens(template: str, contents: tuple[str, ...]) -> None:
    encoder = encoder_of(template)
    (document,) = encoder.encode(chat(*contents), origin="here")
    assert supervised_texts(document, encoder.tokenizer) == [a + END_OF_TURN[template] for a in contents[1::2]]
    assert document.input_ids.dtype == np.int32
    assert len(document.input_ids) == len(document.loss_mask)


@TEMPLATES
def test_a_document_begins_with_the_prompt_that_a_serving_engine_feeds(template: str) -> None:
    encoder = encoder_of(template)
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *chat("Hi\n\n", "the cat", "and then", "it runs")]
    (document,) = encoder.encode(messages, origin="here")
    first_prompt = encoder.encode_prompt(messages[:2])
    assert document.input_ids[: len(first_prompt)].tolist() == first_prompt
    assert np.flatnonzero(document.loss_mask)[0] == len(first_prompt)
    rendered = encoder.render(messages)
    assert rendered.startswith(encoder.tokenizer.decode(document.input_ids))  # all of it, in order, nothing twice
    if template == LLAMA3:
        assert document.input_ids.tolist().count(encoder.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")) == 1


def test_an_answer_that_begins_with_newlines_is_tokenized_apart_from_its_prompt() -> None:
    encoder = encoder_of(CHATML)
    messages = chat("Hi", "\n\nthe cat")
    (document,) = encoder.encode(messages, origin="here")
    prompt = encoder.encode_prompt(messages[:1])
    answer = encoder.tokenizer("\n\nthe cat<|im_end|>")["input_ids"]
    assert document.input_ids.tolist() == prompt + answer
    assert (
        document.input_ids.tolist()
        != encoder.tokenizer(encoder.render(messages))["input_ids"][: len(document.input_ids)]
    )


@TEMPLATES
def test_an_answer_cut_by_its_length_limit_is_not_taught_as_ended(template: str) -> None:
    encoder = encoder_of(template)
    messages = chat("Hi", "the cat runs", "and then", "it sleeps and")
    (whole,), (cut,) = (encoder.encode(messages, origin="here", is_cut=is_cut) for is_cut in (False, True))
    assert supervised_texts(cut, encoder.tokenizer) == ["the cat runs" + END_OF_TURN[template], "it sleeps and"]
    assert cut.input_ids.tolist() == whole.input_ids[: len(cut.input_ids)].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[: len(cut.input_ids)].tolist()


def test_a_template_that_drops_earlier_thoughts_gives_a_document_per_turn() -> None:
    encoder = encoder_of(REASONING)
    answers = ["<think>one</think>\n\nthe cat", "<think>two</think>\n\nit runs"]
    messages = chat("Hi", answers[0], "and then", answers[1])
    documents = encoder.encode(messages, origin="here", is_cut=True)
    texts = [supervised_texts(document, encoder.tokenizer) for document in documents]
    assert texts == [[answers[0] + "<|im_end|>"], [answers[1]]]  # only the last answer was cut
    for document, stop in zip(documents, (1, 3), strict=True):
        prompt = encoder.encode_prompt(messages[:stop])
        assert document.input_ids[~document.loss_mask].tolist() == prompt
    assert "one" not in encoder.tokenizer.decode(documents[1].input_ids)


def test_end_of_turn_is_a_label_even_where_it_is_the_padding_token() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    (document,) = ChatEncoder(tokenizer).encode(chat("Hi", "the cat", "why", "it runs"), origin="here")
    ends = np.flatnonzero(document.input_ids == tokenizer.pad_token_id)
    assert document.loss_mask[ends].tolist() == [False, True, False, True]  # those of the user are not


def test_template_arguments_reach_the_template() -> None:
    encoder = ChatEncoder(build_tokenizer("{{ mark }}" + CHATML), {"mark": "one"})
    assert encoder.render(chat("Hi")) == "one<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "messages, reason",
    [
        (
            [{"role": "tool", "content": "x"}, *chat("Hi", "the cat")],
            "message 0 has role 'tool': allowed are system, user",
        ),
        ([{"from": "human", "value": "x"}], "message 0 has role None"),
        (chat("Hi"), "no assistant turn"),
        (chat("Hi", ""), "message 1 is an empty answer"),
        (chat("Hi", "the cat", "why", " \n\t"), "message 3 is an empty answer"),
        ([{"role": "user", "content": None}], "message 0 (user) must have a text `content`"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must have a text `content`"),
        ([], "must be a non-empty list"),
        ("Hi", "must be a non-empty list"),
        (None, "must be a non-empty list"),
        (["Hi"], "message 0 has role None"),
    ],
)
def test_a_bad_conversation_is_refused_by_its_origin(messages: Messages, reason: str) -> None:
    with pytest.raises(UserError) as error:
        encoder_of(CHATML).encode(messages, origin="chats.jsonl:17")
    assert str(error.value).startswith("chats.jsonl:17: ")
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "template, reason",
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
            "no system",
        ),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'system' else m.content.x.y }}"),
            "cannot be rendered",
        ),
        (
            CHATML.replace("<|im_end|>", "{{ '' if messages[0].role == 'system' else '<|im_end|>' }}"),
            "does not end this turn",
        ),
    ],
    ids=["raises", "fails", "leaves a turn open"],
)
def test_a_chat_that_the_template_cannot_follow_is_refused_by_its_origin(template: str, reason: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat("Hi", "the cat")]
    encoder = encoder_of(template)
    assert encoder.encode(messages[1:], origin="good")  # other chats go through
    with pytest.raises(UserError, match=f"^chats.jsonl:17: .*{reason}"):
        encoder.encode(messages, origin="chats.jsonl:17")


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "cannot be rendered: never"),
        ("{% for m in messages %}", "cannot be rendered"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "puts nothing after an answer"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "puts nothing after an answer"),
    ],
    ids=["none", "raises", "syntax", "open turns", "no content"],
)
def test_a_tokenizer_without_a_usable_template_is_refused_by_name(template: str | None, reason: str) -> None:
    with pytest.raises(UserError, match=f"tiny-tokenizer .*{reason}"):
        encoder_of(template)


def test_a_thought_that_the_generation_prompt_opens_is_taught_as_the_model_writes_it() -> None:
    """DeepSeek-R1's template opens <think> for the model, and drops thoughts when it renders a history."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
        "assistant\n{%", "assistant\n<think>\n{%"
    )
    encoder = encoder_of(template)
    messages = chat("the cat", "so it sees</think>the sun", "why", "because</think>the moon runs")
    documents = encoder.encode(messages, origin="x")
    assert len(documents) == 2  # the second prompt no longer holds the first thought
    for document, stop in zip(documents, (1, 3), strict=True):
        prompt = encoder.encode_prompt(messages[:stop])
        assert document.input_ids[: len(prompt)].tolist() == prompt
        answer = encoder.tokenizer.decode(document.input_ids[document.loss_mask])
        assert answer == messages[stop]["content"] + "<|im_end|>"
