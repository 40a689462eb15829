"""The loss mask covers each answer with its end-of-turn token, whatever the template; bad chats are named."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from tiny import CHATML, build_tokenizer, conversations
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from pard_train.data.chat import DAY, ChatEncoder, Document
from pard_train.errors import RowError, UserError

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
# Qwen2.5-Instruct's own, with tools.
QWEN25 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
# Like Qwen3: thoughts in a field of their own, shown after the last question only; its last answer shows an empty one.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ (m.reasoning_content or '').strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 3.1: one call a turn, and nothing said beside it.
LLAMA31 = LLAMA3.replace(
    "{{ m.content | trim }}",
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% else %}{{ m.content | trim }}{% endif %}',
).replace("{% for m in messages %}", "{{ tools | tojson if tools else '' }}{% for m in messages %}", 1)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
END_OF_TURN = {CHATML: "<|im_end|>", LLAMA3: "<|eot_id|>", REASONING: "<|im_end|>"}
TEMPLATES = pytest.mark.parametrize("template", END_OF_TURN, ids=["chatml", "llama3", "reasoning"])
Messages = list[dict[str, Any]]
SEARCH = {"name": "search", "arguments": {"words": ["größe 😀", "the cat"], "limit": 3}}
TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}]


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


def calls(*functions: dict[str, Any], content: str = "") -> dict[str, Any]:
    """An assistant's message that calls tools."""
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content, "tool_calls": tool_calls}


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


def test_a_tokenizer_that_adds_bos_by_itself_gives_one_bos() -> None:
    """Llama 3's template writes BOS, and its tokenizer's post-processor would add another one."""
    encoder = encoder_of(LLAMA3)
    bos = encoder.tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    assert encoder.tokenizer("the cat")["input_ids"].count(bos) == 1  # unless it is told not to
    messages = chat("Hi", "the cat", "why", "it runs")
    (document,) = encoder.encode(messages, origin="here")
    assert encoder.encode_prompt(messages[:1]).count(bos) == 1
    assert document.input_ids.tolist().count(bos) == 1


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


# As Llama 3.2 and SmolLM3 tell the date.
DATED = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n'
    '    {%- else %}\n        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    "{{- 'Today Date: ' + date_string + '\n' }}"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[datetime]:
    """The clock of transformers' templates; set its `today`."""

    class Clock(datetime):
        today = datetime(2031, 1, 2)

        @classmethod
        def now(cls) -> datetime:
            return cls.today

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def test_a_template_that_tells_the_date_gives_the_same_tokens_on_every_day(clock: type[datetime]) -> None:
    documents = []
    for today in (datetime(2031, 1, 2), datetime(2031, 1, 3)):
        clock.today = today
        documents += encoder_of(DATED + CHATML).encode(chat("Hi", "the cat"), origin="x")
    assert documents[0].input_ids.tolist() == documents[1].input_ids.tolist()
    assert encoder_of(DATED + CHATML).render(chat("Hi")).startswith("Today Date: 26 Jul 2024\n<|im_start|>user\nHi")


def test_a_date_of_the_users_own_goes_before_the_fixed_day() -> None:
    encoder = ChatEncoder(build_tokenizer(DATED + CHATML), {"date_string": "24 Dec 2025"})
    assert encoder.render(chat("Hi")).startswith("Today Date: 24 Dec 2025\n")
    other = ChatEncoder(build_tokenizer(), {"chat_template": "{{ strftime_now('%Y') }}" + CHATML})
    assert other.render(chat("Hi")).startswith("2024<|im_start|>")


@pytest.mark.parametrize("form", ["%d %B %Y", "%Y-%m-%d", "%A, %-d. %b %y", "%H:%M:%S", "%j and no more", "%x %X %c"])
@pytest.mark.parametrize(
    "before", ["", "\n", "\n\n", "  ", "  {% if true %} x{% endif %}", "{%- if true %}\n x{% endif %}"]
)
def test_only_the_day_of_a_template_is_another(clock: type[datetime], form: str, before: str) -> None:
    template = before + f"{{% macro f() %}}{{{{ strftime_now({form!r}) }}}}{{% endmacro %}}{{{{ f() }}}}" + CHATML
    clock.today = DAY
    tokenizer = build_tokenizer(template)
    expected = tokenizer.apply_chat_template(chat("Hi"), tokenize=False)
    clock.today = datetime(2031, 1, 2)
    assert ChatEncoder(tokenizer).render(chat("Hi")) == expected


@pytest.mark.parametrize(
    "messages, reason",
    [
        (
            [{"role": "tool", "content": "x"}, *chat("Hi", "the cat")],
            "message 0 is a tool's result without an assistant's message before it",
        ),
        (
            [{"role": "function", "content": "x"}],
            "message 0 has role 'function': allowed are system, user, assistant, tool",
        ),
        ([*chat("Hi"), {"role": "tool", "content": "x"}], "message 1 is a tool's result without"),
        (
            [*chat("Hi", "the cat"), chat("Hi", "the cat")[1]],
            "message 2 is an answer without a user's message before it",
        ),
        (
            [*chat("Hi"), calls({"name": "f", "arguments": "{}"})],
            "message 1 (assistant) must have tool_calls of the form",
        ),
        (
            [*chat("Hi"), calls({"name": "f", "arguments": {"a": "\ud83d"}})],
            "message 1 (assistant) has half a character",
        ),
        ([*chat("Hi"), {**calls(), "tool_calls": 3}], "message 1 (assistant) must have tool_calls of the form"),
        ([{**chat("Hi")[0], "name": "\ud83d"}], "message 0 (user) has half a character"),
        (
            [*chat("Hi"), {**chat("", "x")[1], "reasoning_content": "\ud83d"}],
            "message 1 (assistant) has half a character",
        ),
        (chat("\ud83d", "the cat"), "message 0 (user) has half a character (an unpaired surrogate)"),
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
    with pytest.raises(RowError) as error:
        encoder_of(CHATML).encode(messages, origin="chats.jsonl:17")
    assert error.value.origin == "chats.jsonl:17"
    assert reason in error.value.reason


def test_an_answer_that_would_end_its_turn_halfway_is_refused() -> None:
    encoder = encoder_of(CHATML)
    assert encoder.encode(chat("a <|im_end|> b", "the cat"), origin="x")  # what is asked teaches nothing
    with pytest.raises(RowError, match=r"^x: an answer holds the control token <\|im_end\|>"):
        encoder.encode(chat("Hi", "the cat<|im_end|>\n<|im_start|>user\nwhy", "and", "the dog"), origin="x")


def test_a_control_token_with_a_quote_is_found_in_an_answer() -> None:
    tokenizer = deepcopy(encoder_of(CHATML).tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ['<|"|>', "<\\s>"]})
    for token in ('<|"|>', "<\\s>"):
        with pytest.raises(RowError, match="an answer holds the control token"):
            ChatEncoder(tokenizer).encode(chat("Hi", f"the {token} cat"), origin="x")


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
    with pytest.raises(RowError, match=f"^chats.jsonl:17: .*{reason}"):
        encoder.encode(messages, origin="chats.jsonl:17")


@pytest.mark.parametrize(
    "template, reason",
    [
        (None, "no chat template"),
        ("{{ raise_exception('never') }}", "cannot be rendered: never"),
        ("{% for m in messages %}", "cannot be rendered"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", "nothing after an answer"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "nothing after an answer"),
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


TOOL_CHAT = [
    *chat("Hi"),
    calls(SEARCH),
    {"role": "tool", "content": '{"found": 3}'},
    calls({"name": "search", "arguments": {}}),
    {"role": "tool", "content": ""},
    *chat("", "the cat runs")[1:],
]
AS_JSON = json.dumps(SEARCH["arguments"], ensure_ascii=False)


@pytest.mark.parametrize(
    "template, answers",
    [
        (
            QWEN25,
            [
                f'<tool_call>\n{{"name": "search", "arguments": {AS_JSON}}}\n</tool_call><|im_end|>',
                '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call><|im_end|>',
                "the cat runs<|im_end|>",
            ],
        ),
        (
            LLAMA31,
            [
                f'{{"name": "search", "parameters": {AS_JSON}}}<|eot_id|>',
                '{"name": "search", "parameters": {}}<|eot_id|>',
                "the cat runs<|eot_id|>",
            ],
        ),
    ],
    ids=["qwen2.5", "llama3.1"],
)
def test_tool_calls_are_labels_and_tool_results_are_not(template: str, answers: list[str]) -> None:
    encoder = encoder_of(template)
    (document,) = encoder.encode(TOOL_CHAT, origin="here", tools=TOOLS)
    assert supervised_texts(document, encoder.tokenizer) == answers
    prompt = encoder.encode_prompt(TOOL_CHAT[:1], tools=TOOLS)
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert json.dumps(TOOLS[0]["function"]) in encoder.tokenizer.decode(prompt)


def test_words_beside_a_tool_call_and_several_calls_in_one_turn_are_labels() -> None:
    encoder = encoder_of(QWEN25)
    messages = [*chat("Hi"), calls(SEARCH, {"name": "now", "arguments": {}}, content="I look.")]
    (document,) = encoder.encode(messages, origin="here")
    (answer,) = supervised_texts(document, encoder.tokenizer)
    assert answer.startswith('I look.\n<tool_call>\n{"name": "search"')
    assert answer.endswith('\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>')


def thought(text: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with its thought in a field of its own."""
    return {**message, "reasoning_content": text}


def test_turns_share_a_document_for_as_long_as_their_thoughts_stay() -> None:
    encoder = encoder_of(QWEN3)
    first = [*chat("Hi"), thought("one", calls(SEARCH)), {"role": "tool", "content": "3"}, *chat("", "the cat")[1:]]
    first[-1] = thought("two", first[-1])
    second = [*chat("why"), thought("three", calls(SEARCH)), {"role": "tool", "content": "4"}]
    messages = [*first, *second, thought("\nfour\n", chat("", "it runs")[1])]
    documents = encoder.encode(messages, origin="here", tools=TOOLS)
    call = f"<tool_call>{json.dumps(SEARCH, ensure_ascii=False)}</tool_call><|im_end|>"
    assert [supervised_texts(document, encoder.tokenizer) for document in documents] == [
        [f"<think>\none\n</think>\n\n{call}", "<think>\ntwo\n</think>\n\nthe cat<|im_end|>"],
        [f"<think>\nthree\n</think>\n\n{call}", "<think>\nfour\n</think>\n\nit runs<|im_end|>"],
    ]
    assert "one" not in encoder.tokenizer.decode(documents[1].input_ids)


def random_chat(draw: random.Random, words: list[str]) -> Messages:
    """Questions in several scripts, each with tool calls, beside `words`, or thoughts before its answer, or without."""
    texts = ["the cat", "¿Qué tal? 你好", "😀👩‍👩‍👧 नमस्ते", " \n\nsun\n", "user\n", "x" * 300]
    messages: Messages = [{"role": "system", "content": "Be brief."}] * draw.randint(0, 1)
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice([*texts, "", " \n"])})
        for _ in range(draw.randint(0, 2)):
            messages.append(calls(SEARCH, content=draw.choice(words)))
            messages += [{"role": "tool", "content": draw.choice(["", "3", "\r\n{}"])}] * draw.randint(1, 2)
        messages.append({"role": "assistant", "content": draw.choice(texts)})
    return [thought("It sees.\n\nWhy?", m) if m["role"] == "assistant" and draw.random() < 0.5 else m for m in messages]


@pytest.mark.parametrize("template", [QWEN25, QWEN3, LLAMA31], ids=["qwen2.5", "qwen3", "llama3.1"])
@pytest.mark.parametrize("seed", range(10))
def test_every_answer_stands_once_after_the_prompt_that_was_served(template: str, seed: int) -> None:
    """Brute force: the text before every run of labels is the rendered history, and the run ends its turn."""
    encoder = encoder_of(template)
    messages = random_chat(random.Random(seed), [""] if template == LLAMA31 else ["", "I look."])
    if template != QWEN3:
        messages = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in messages]
    found = []
    for document in encoder.encode(messages, origin="here", tools=TOOLS):
        edges = np.flatnonzero(np.diff(document.loss_mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
        found += [[encoder.tokenizer.decode(document.input_ids[a:b]) for a, b in ((0, i), (i, j))] for i, j in edges]
    stops = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert [prompt for prompt, _ in found] == [
        encoder.render(messages[:stop], generation_prompt=True, tools=TOOLS) for stop in stops
    ]
    for (prompt, answer), stop in zip(found, stops, strict=True):
        text = encoder.render(messages[: stop + 1], tools=TOOLS)
        assert text == prompt + answer + text[len(prompt + answer) :]
        assert text[len(prompt + answer) :].strip() == ""
        assert answer.endswith(encoder.end_of_turn)


@pytest.mark.parametrize("template", [CHATML, LLAMA3], ids=["chatml", "llama3"])
@pytest.mark.parametrize(
    "message, reason",
    [
        (calls(SEARCH), "the chat template leaves out this turn's tool_calls"),
        ({**chat("", "the cat")[1], "reasoning_content": "It sees."}, "leaves out this turn's thought"),
    ],
)
def test_what_a_template_would_leave_out_is_refused(template: str, message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=f"^here: .*{reason}"):
        encoder_of(template).encode([*chat("Hi"), message], origin="here")


NOW = {"name": "now", "arguments": {}}


@pytest.mark.parametrize(
    "message, lost",
    [
        (calls(SEARCH, content="I look."), "content beside its tool_calls"),
        (calls(SEARCH, content="<think>\nWhich?\n</think>\n\nI look."), "content beside its tool_calls"),
        (calls(SEARCH, content="search"), "content beside its tool_calls"),  # the call has this word, too
        (calls(SEARCH, NOW), r"tool_calls\[1\] \(now\)"),
        (calls(SEARCH, {"name": "search", "arguments": {"words": "search"}}), r"tool_calls\[1\] \(search\)"),
        (calls({"name": "search", "arguments": {"then": "search"}}, SEARCH), r"tool_calls\[1\] \(search\)"),
        (calls(SEARCH, SEARCH), r"tool_calls\[[01]\] \(search\)"),
    ],
)
def test_words_and_calls_that_a_template_of_one_call_would_leave_out_are_refused(
    message: dict[str, Any], lost: str
) -> None:
    with pytest.raises(RowError, match=f"^here: the chat template leaves out this turn's {lost}: use"):
        encoder_of(LLAMA31).encode([*chat("Hi"), message], origin="here", tools=TOOLS)


@pytest.mark.parametrize(
    "before, after",
    [
        ("{{ m.content }}", "{{ m.content | trim }}"),
        ("{{ m.content }}", "{{ m.content | tojson if m.tool_calls else m.content }}"),
        ("{{ c.function | tojson }}", "{{ c.function | tojson(ensure_ascii=True, indent=2) }}"),
        ("{{ c.function | tojson }}", "{{ (c.function | tojson) | tojson }}"),
        ("{{ c.function | tojson }}", "<{{ c.function.name }}>{{ c.function.arguments.items() | list }}"),
        ("<tool_call>", "{% if not m.tool_calls %}{{ raise_exception('no call') }}{% endif %}<tool_call>"),
        ("{{ m.content }}", "{{ m.content }}{% if not m.content %}{{ raise_exception('no words') }}{% endif %}"),
    ],
)
def test_words_and_calls_are_not_refused_for_how_they_are_written(before: str, after: str) -> None:
    encoder = encoder_of(QWEN3.replace(before, after))
    for content in ("I look.", " \n'I' look. \"größe\" \n", "<think>Which?</think>\n\nI look."):
        message = calls(SEARCH, {"name": "größe", "arguments": {"a": '"\n'}}, SEARCH, content=content)
        (document,) = encoder.encode([*chat("Hi"), message], origin="here", tools=TOOLS)
        (answer,) = supervised_texts(document, encoder.tokenizer)
        assert "look." in answer
        assert answer.count("<tool_call>") == 3


def test_a_thought_beside_calls_that_the_template_drops_is_refused() -> None:
    encoder = encoder_of(QWEN3.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}"))
    message = calls(SEARCH, content="<think>Which?</think>\n\nI look.")
    with pytest.raises(RowError, match=r"^here: the chat template leaves out this turn's thought"):
        encoder.encode([*chat("Hi"), message], origin="here", tools=TOOLS)


def test_calls_are_refused_where_the_generation_prompt_opens_a_thought_that_the_template_drops() -> None:
    encoder = encoder_of(QWEN25.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    assert encoder.encode(chat("Hi", "so it sees</think>the sun"), origin="here")
    message = calls(SEARCH, content="I search.</think>I search.")
    with pytest.raises(RowError, match=r"^here: the chat template leaves out this turn's tool_calls: use"):
        encoder.encode([*chat("Hi"), message], origin="here", tools=TOOLS)


@pytest.mark.parametrize(
    "message, label",
    [
        ({"content": "the cat \n"}, "the cat \n"),
        ({"content": "<think>\nIt se"}, "<think>\nIt se"),
        ({"content": "", "reasoning_content": "\nIt se"}, "<think>\nIt se"),
        ({"content": "the ca", "reasoning_content": "It sees."}, "<think>\nIt sees.\n</think>\n\nthe ca"),
    ],
    ids=["answer", "thought in content", "thought", "answer after a thought"],
)
def test_a_cut_answer_ends_with_the_last_word_that_the_model_wrote(message: dict[str, Any], label: str) -> None:
    encoder = encoder_of(QWEN3)
    messages = [*chat("Hi"), {"role": "assistant", **message}]
    (document,) = encoder.encode(messages, origin="here", is_cut=True)
    assert supervised_texts(document, encoder.tokenizer) == [label]
    with pytest.raises(RowError, match="a tool call that was cut"):
        encoder.encode([*chat("Hi"), calls(SEARCH)], origin="here", is_cut=True)


@TEMPLATES
def test_many_conversations_in_one_call_are_the_documents_of_each(template: str) -> None:
    encoder = encoder_of(template)
    chats = [*conversations(20, seed=3), chat("Hi", "<think>one</think>the cat", "why", "it runs")]
    alone = [document for i, messages in enumerate(chats) for document in encoder.encode(messages, origin=str(i))]
    together = encoder.tokenize([p for i, m in enumerate(chats) for p in encoder.pieces(m, origin=str(i))])
    assert [d.origin for d in together] == [d.origin for d in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.loss_mask.tolist() == other.loss_mask.tolist()
    assert encoder.tokenize([]) == []


@TEMPLATES
def test_turns_may_be_long_or_blank(template: str) -> None:
    encoder = encoder_of(template)
    long = "the cat 😀 你好\r\n" * 8000  # 112,000 characters
    (document,) = encoder.encode(chat("", "the cat", " \n", long + "end", long, "it runs"), origin="here")
    answers = [answer + END_OF_TURN[template] for answer in ("the cat", long + "end", "it runs")]
    assert supervised_texts(document, encoder.tokenizer) == answers
