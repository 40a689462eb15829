"""What is shown is what would be taught, and what would teach nothing good is refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny import CHATML, VOCABULARY, build_tokenizer, conversations, experiment
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pard_train.config import DataConfig, DraftConfig, ObjectiveConfig, ShowConfig
from pard_train.data.chat import ChatEncoder, Document
from pard_train.data.encoding import encode_corpus
from pard_train.data.inspection import STYLES, check_examples, count_supervised, render_text, visible
from pard_train.data.inspection import show_examples as run
from pard_train.data.slots import (
    PATTERN_SLOTS,
    TABLE_SLOTS,
    Slots,
    lay_out_slots,
    pattern_text,
    shorten,
    slot_table,
)
from pard_train.errors import RowError, UserError
from pard_train.layout import DrawKey, is_visible, sample_chain_lengths
from pard_train.model import load_tokenizer

ROOT = Path(__file__).parents[1]
MASK = VOCABULARY + 5  # a spare row
DRAFT = DraftConfig(num_draft_tokens=4)
DATA = DataConfig(max_length=512)
KEY = DrawKey(seed=1, epoch=0, example=2)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    """For ChatML and the tiny tokenizer."""
    return ChatEncoder(tokenizer)


def chat(*contents: str) -> list[dict[str, str]]:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(encoder: ChatEncoder, *contents: str, is_cut: bool = False) -> Document:
    (document,) = encoder.encode(chat(*contents), origin="chats.jsonl:1", is_cut=is_cut)
    return document


def slots_of(document: Document, decay: float = 0.5) -> Slots:
    return lay_out_slots(document, DRAFT, ObjectiveConfig(depth_decay=decay), mask_token_id=MASK, key=KEY)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def styled(document: Document, encoder: ChatEncoder) -> list[tuple[str, str]]:
    """(text, style) of everything shown, without underlines."""
    text = render_text(document, encoder)
    assert [str(span.style).endswith("underline") for span in text.spans] == [
        i % 2 == 1 for i in range(len(text.spans))
    ]
    return [(text.plain[s.start : s.end], str(s.style).removesuffix(" underline")) for s in text.spans]


def test_every_token_has_the_style_of_its_part(encoder: ChatEncoder) -> None:
    prompt, special, taught, end = (STYLES[kind] for kind in ("prompt", "special", "supervised", "end of turn"))
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.add_tokens(["<call>"])  # unlike control tokens, a model may write it
    encoder = ChatEncoder(tokenizer)
    assert styled(encode(encoder, "the cat", "a dog<call>"), encoder) == [
        ("<|im_start|>", special),
        *[(token, prompt) for token in ("us", "er", "↵\n", "the", " ", "cat")],
        ("<|im_end|>", special),
        ("↵\n", prompt),
        ("<|im_start|>", special),
        *[(token, prompt) for token in ("a", "s", "s", "i", "s", "t", "a", "n", "t", "↵\n")],
        *[(token, taught) for token in ("a", " ", "dog")],
        ("<call>", STYLES["supervised special"]),
        ("<|im_end|>", end),
    ]


def test_an_answer_that_was_cut_ends_with_a_mark_and_no_other_does(encoder: ChatEncoder) -> None:
    shown = styled(encode(encoder, "a", "the", "a", "the dog", is_cut=True), encoder)
    ends = [text for text, style in shown if style in (STYLES["end of turn"], STYLES["end missing"])]
    assert ends == ["<|im_end|>", "[end missing]"]
    assert shown[-2:] == [("dog", STYLES["supervised"]), ("[end missing]", STYLES["end missing"])]


def test_characters_of_several_tokens_are_shown_whole(encoder: ChatEncoder) -> None:
    document = encode(encoder, "早", "a 🌅漢 é🤖")
    shown = [text for text, _ in styled(document, encoder)]
    assert shown[-6:] == ["🌅", "漢", " ", "é", "🤖", "<|im_end|>"]
    assert "\ufffd" not in "".join(shown)


def test_bytes_that_are_no_character_are_shown_a_few_at_a_time(encoder: ChatEncoder) -> None:
    (byte,) = encoder.tokenizer.convert_tokens_to_ids(["Ł"])  # 0x9f, which begins no character
    document = encode(encoder, "a", "123456 dog")
    broken = replace(document, input_ids=np.where(document.loss_mask, byte, document.input_ids))
    broken.input_ids[-3:] = document.input_ids[-3:]  # a space, dog, the end of the turn
    shown = [text for text, _ in styled(broken, encoder)]
    assert shown[-4:] == ["\ufffd" * 4, "\ufffd" * 2 + " ", "dog", "<|im_end|>"]


def test_the_text_shown_is_the_text_rendered(encoder: ChatEncoder) -> None:
    for messages in conversations(30, seed=3):
        (document,) = encoder.encode(messages, origin="")
        prompt = encoder.render(messages).removesuffix(encoder.turn_suffix) + encoder.end_of_turn
        assert render_text(document, encoder).plain == visible(prompt)


def test_nothing_in_a_chat_can_command_the_terminal_or_hide() -> None:
    assert visible("a\tb\nc") == "a⇥   b↵\nc"
    assert visible("\x1b[31m\r\x9b\u202e\u00a0") == "<U+001B>[31m<U+000D><U+009B><U+202E><U+00A0>"
    assert visible("👩\u200d👧 [bold]ü漢") == "👩\u200d👧 [bold]ü漢"


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def test_the_counts_are_those_of_the_documents(encoder: ChatEncoder) -> None:
    cut_off = encode(encoder, "a", "the", "a", "the dog", is_cut=True)  # 2 + 3 labels, the second turn does not end
    ended = encode(encoder, "cat", "dog cat")  # 4 labels
    length = len(ended.input_ids)
    counts = check_examples([cut_off, ended], encoder, replace(DATA, max_length=length, overlong="drop"))
    assert counts == {
        "documents": 2,
        "overlong": 1,
        "tokens": len(cut_off.input_ids) + length,
        "supervised": 2 + 3 + 4,
        "turns": 3,
        "ended": 2,
    }


def test_what_truncation_leaves_is_what_counts(encoder: ChatEncoder) -> None:
    document = encode(encoder, "cat", "dog cat")
    data = replace(DATA, max_length=len(document.input_ids) - 1, overlong="truncate")
    counts = count_supervised(document, encoder, data)
    assert [counts[name] for name in ("overlong", "supervised", "ended")] == [1, 3, 0]
    with pytest.raises(UserError, match="all 1 answers are cut"):
        check_examples([document], encoder, data)


def test_data_in_which_every_end_of_turn_is_lost_are_refused(encoder: ChatEncoder) -> None:
    cut = [encode(encoder, "a", "the dog", is_cut=True), encode(encoder, "a", "a", is_cut=True)]
    with pytest.raises(UserError, match="all 2 answers are cut"):
        check_examples(cut, encoder, DATA)
    check_examples([*cut, encode(encoder, "a", "a")], encoder, DATA)


def test_data_without_a_label_are_refused(encoder: ChatEncoder) -> None:
    document = encode(encoder, "a", "the dog")
    nothing = replace(document, loss_mask=np.zeros_like(document.loss_mask))
    for documents in ([], [nothing]):
        with pytest.raises(UserError, match=f"no supervised token in {len(documents)} documents"):
            check_examples(documents, encoder, DATA)


def merging_line_ends() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one more entry, two line ends, as large tokenizers have it."""
    tokenizer = build_tokenizer()
    tree = json.loads(tokenizer.backend_tokenizer.to_str())
    tree["model"]["vocab"]["ĊĊ"] = VOCABULARY
    tree["model"]["merges"].append(["Ċ", "Ċ"])
    tree["pre_tokenizer"]["use_regex"] = False  # GPT-2's would split line ends before a word
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def test_a_row_whose_text_has_other_tokens_when_tokenized_whole_is_refused_by_name() -> None:
    encoder = ChatEncoder(merging_line_ends())
    good = encode(encoder, "the cat\n\n", "a\n\ndog")
    check_examples([good], encoder, DATA)
    bad = replace(encode(encoder, "the cat", "\na dog"), origin="chats.jsonl:7")
    with pytest.raises(RowError) as caught:
        check_examples([good, bad], encoder, DATA)
    (place,) = np.flatnonzero(np.diff(bad.loss_mask.astype(int)) == 1)  # the line end before the answer
    assert str(caught.value).startswith(
        f"chats.jsonl:7: token {place} differs when the text is tokenized whole: it is 'n' 't' '\\n' '\\n' 'a', an "
        "engine reads 'n' 't' '\\n\\n' 'a' ' '; strip"
    )
    with pytest.raises(RowError):  # of the greatest length, too
        check_examples([bad], encoder, replace(DATA, max_length=len(bad.input_ids)))


# ---------------------------------------------------------------------------------------------------------------------
# Slots
# ---------------------------------------------------------------------------------------------------------------------


def brute_force_rows(document: Document, tokenizer: PreTrainedTokenizerBase) -> list[list[str]]:
    """All slots of a document as a table would show them, weight 0.5 ** depth."""
    ids, mask = document.input_ids.tolist(), document.loss_mask.tolist()
    lengths = sample_chain_lengths(document.loss_mask, DRAFT, KEY).tolist()
    names = [(anchor, 0) for anchor in range(len(ids))]
    names += [(anchor, depth) for anchor in range(len(ids)) for depth in range(1, lengths[anchor] + 1)]
    rows = []
    for slot, (anchor, depth) in enumerate(names):
        target = anchor + depth + 1
        is_taught = target < len(ids) and mask[target]
        token = "<mask>" if depth else repr(tokenizer.decode([ids[anchor]]))
        label, weight = (repr(tokenizer.decode([ids[target]])), f"{0.5**depth:.3g}") if is_taught else ("-", "0")
        rows.append([str(slot), token, str(anchor), str(depth), str(anchor + depth), label, weight])
    return rows


def table_rows(slots: Slots, tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[str]], str]:
    """Cells of the printed table, and its caption."""
    console = Console(width=200, file=StringIO())
    console.print(slot_table(slots, tokenizer))
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")], lines[-1]


@pytest.mark.parametrize("contents", [("the cat", "a dog sleeps then the sun sees"), ("the cat runs over why", "a")])
def test_the_table_lists_the_slots_around_the_first_label(encoder: ChatEncoder, contents: tuple[str, ...]) -> None:
    document = encode(encoder, *contents)
    num_text, first = len(document.input_ids), int(np.argmax(document.loss_mask)) - 1
    expected = brute_force_rows(document, encoder.tokenizer)
    rows, caption = table_rows(slots_of(document), encoder.tokenizer)
    start = min(first - 3, num_text - TABLE_SLOTS)
    masks = expected[num_text:][:TABLE_SLOTS]
    assert rows == expected[start : start + TABLE_SLOTS] + masks
    assert expected[first] in rows
    left = f"{TABLE_SLOTS} of {num_text} text slots, {len(masks)} of {len(expected) - num_text} mask slots"
    assert caption.strip() == left


def test_part_of_a_character_is_shown_as_its_bytes(encoder: ChatEncoder) -> None:
    rows, _ = table_rows(slots_of(encode(encoder, "a", "早")), encoder.tokenizer)
    assert [row[5] for row in rows if row[3] == "0"][-5:] == ["'\\xe6'", "'\\x97'", "'\\xa9'", "'<|im_end|>'", "-"]


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_draft_tokens", [1, 8, 100])
def test_a_document_is_shortened_as_little_as_the_picture_allows(encoder: ChatEncoder, num_draft_tokens: int) -> None:
    draft = DraftConfig(num_draft_tokens=num_draft_tokens, retention_ratio=1.0, min_retention=1.0)
    document = encode(encoder, "the cat", "dog " * 100)
    short = shorten(document, draft, KEY)
    start = int(np.argmax(document.loss_mask)) - int(np.argmax(short.loss_mask))

    def num_slots(stop: int) -> int:
        return stop - start + int(sample_chain_lengths(document.loss_mask[start:stop], draft, KEY).sum())

    stop = start + len(short.input_ids)
    assert short.input_ids.tolist() == document.input_ids[start:stop].tolist()
    assert num_slots(stop) <= PATTERN_SLOTS < num_slots(stop + 1)


def test_the_marks_of_the_picture_are_what_each_slot_sees() -> None:
    encoder = ChatEncoder(build_tokenizer())
    slots = slots_of(shorten(encode(encoder, "早", "a dog sleeps then the sun"), DRAFT, KEY))
    _, *lines = pattern_text(slots, encoder.tokenizer).plain.split("\n")
    layout, seen = slots.layout, is_visible(slots.layout, slots.layout)
    assert len(lines) == len(slots)
    for query, line in enumerate(lines):
        marks = re.search(r"[■▲●·]+", line)[0]
        own = ["●" if query == key else "▲" if layout.depth[key] else "■" for key in range(len(slots))]
        assert marks == "".join(mark if seen[query, key] else "·" for key, mark in enumerate(own)), query
    assert set("".join(lines)) >= set("■▲●·")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_row_and_its_attention_pattern(
    base_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    settings = {
        "model.path": base_folder,
        "data.source": chats_file,
        "output_dir": tmp_path,
        "show.row": 3,
        "show.picture": "true",
    }
    command = [sys.executable, "data_scripts/show.py", *(f"{name}={value}" for name, value in settings.items())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    messages = json.loads(chats_file.read_text().splitlines()[3])["messages"]
    assert all(visible(f"{m['role']}\n{m['content']}<|im_end|>") in result.stdout for m in messages)
    assert f"\n{chats_file}:4\n" in result.stdout
    assert re.search(
        r"checked: documents 40 \(0 longer than data.max_length=512, data.overlong=truncate\)   tokens [\d,]+",
        result.stdout,
    )
    assert "attention pattern:" in result.stdout and "·●" in result.stdout


def test_every_kind_of_bad_row_is_counted_with_its_first_origin(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    control = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a<|endoftext|>b"}]
    rows = chats_file.read_text().splitlines()[:2]
    bad = json.dumps({"messages": control})
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join([rows[0], bad, '{"broken', rows[1], bad]))
    config = experiment(base_folder, chats, tmp_path)
    with pytest.raises(RowError, match=r"chats.jsonl:2: .*control token <\|endoftext\|>"):
        run(config)
    shown = capsys.readouterr().out
    assert re.search(r"checked: documents 2 ", shown)
    assert re.search(rf"bad rows: 2 x .*control token <\|endoftext\|>.* \(first: {chats}:2\)", shown)
    assert re.search(rf"bad rows: 1 x .*\(first: {chats}:3\)", shown)


def test_a_row_that_is_not_there_is_refused(base_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = experiment(base_folder, chats_file, tmp_path)
    with pytest.raises(UserError, match=r"^show.row=40: \S+ has no such row"):
        run(replace(config, show=ShowConfig(row=40)))


@pytest.mark.parametrize("bad", ['{"messages": []}', '{"broken', "3"], ids=["chat", "json", "object"])
def test_a_row_that_training_sets_aside_keeps_its_number_and_is_passed_over(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    rows = chats_file.read_text().splitlines()[:3]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join([bad, rows[0], bad, bad, *rows[1:], bad]))
    config = experiment(base_folder, chats, tmp_path)
    with pytest.raises(RowError, match=r"chats.jsonl:1: "):
        run(config)
    config = replace(config, data=replace(config.data, bad_rows="set_aside"))
    for row in (1, 4, 5):
        run(replace(config, show=ShowConfig(row=row)))
        shown = capsys.readouterr().out
        assert f"\n{chats}:{row + 1}\n" in shown
        assert "checked: documents 3 " in shown
    for row in (0, 2, 3, 6, 7):
        with pytest.raises(
            UserError, match=rf"^show.row={row}: \S+ has no such row \(the first is 0\), or it is unusable"
        ):
            run(replace(config, show=ShowConfig(row=row)))
    capsys.readouterr()
    run(replace(config, show=ShowConfig(row=1, num_checked=4)))
    assert "checked: documents 1 " in capsys.readouterr().out


def test_rows_after_those_looked_at_are_not_read(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("\n".join([*chats_file.read_text().splitlines()[:2], '{"broken']))
    run(replace(experiment(base_folder, chats, tmp_path), show=ShowConfig(row=1, num_checked=2)))
    assert f"\n{chats}:2\n" in capsys.readouterr().out


def test_a_folder_of_tokens_shows_what_its_chats_show(
    base_folder: Path, chats_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = experiment(base_folder, chats_file, tmp_path)
    config = replace(config, data=replace(config.data, max_length=80, overlong="truncate"), show=ShowConfig(row=3))
    run(config)
    from_chats = capsys.readouterr().out
    encode_corpus(config.data, ChatEncoder(load_tokenizer(str(base_folder))), tmp_path / "tokens")
    capsys.readouterr()
    run(replace(config, data=replace(config.data, source=str(tmp_path / "tokens"))))
    as_stored = re.sub(r"\(\d+ longer", "(0 longer", from_chats)  # a store holds what is left of them
    assert capsys.readouterr().out == as_stored != from_chats
