"""Input from strangers ends with a result or one line, and the text of a model cannot act where it is shown."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import document
from rich.console import Console
from test_config import composed

from pard_train.config import SourceConfig
from pard_train.data.benchmarks import file_prompt
from pard_train.data.inspection import visible
from pard_train.data.rows import read_jsonl
from pard_train.data.schemas import to_chat
from pard_train.errors import UserError
from pard_train.overrides import check_overrides
from pard_train.program import to_config
from pard_train.reports.records import read_result
from pard_train.reports.report import write_report
from pard_train.validation import validate_evaluate

FIELDS = [
    "messages",
    "conversations",
    "role",
    "content",
    "from",
    "value",
    "type",
    "text",
    "tool_calls",
    "function",
    "name",
    "arguments",
    "tools",
    "prompt",
    "turns",
    "instruction",
    "input",
    "output",
    "system",
    "id",
    "category",
    "token_ids",
    "finish_reason",
    "reasoning_content",
    "thinking",
]
TEXT = st.text(max_size=12) | st.sampled_from(
    ["user", "assistant", "tool", "human", "gpt", "\ud800", "text", "<think>"]
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | TEXT, inner, max_size=5),
    max_leaves=12,
)
ROLE = st.sampled_from(["user", "assistant", "system", "tool"]) | JSON
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": JSON}, optional={"tool_calls": JSON, "name": JSON})
ROW = (
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)
    | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=4)}, optional={"tools": JSON, "token_ids": JSON})
    | st.fixed_dictionaries({"instruction": JSON, "output": JSON})
    | st.fixed_dictionaries({"turns": JSON}, optional={"id": JSON, "category": JSON})
)
RESULT = JSON | st.fixed_dictionaries({"schema_version": st.sampled_from([1, 3]), "records": JSON, "failures": JSON})
SETTING = st.sampled_from(["trainer.learning_rate", "experiment", "targets", "deepspeed", "+a", "~trainer", "runs.x"])
LINE = st.text(max_size=30) | st.tuples(SETTING, st.text(max_size=12)).map("=".join)
NUM_CASES = int(os.environ.get("NUM_CASES", 400))  # of each parser


def fuzzed(function: Any) -> Any:
    """Run a test on NUM_CASES cases, of any duration."""
    return settings(max_examples=NUM_CASES, deadline=None, suppress_health_check=list(HealthCheck))(function)


@fuzzed
@given(ROW, st.sampled_from(["auto", "messages", "sharegpt", "alpaca", "prompt"]))
def test_any_row_is_a_chat_or_one_line(row: dict[str, Any], schema: str) -> None:
    try:
        chat = to_chat(row, SourceConfig(path="f.jsonl", schema=schema), "f.jsonl:1")
    except UserError as error:
        assert str(error).strip()
    else:
        assert all(isinstance(message["role"], str) for message in chat.messages)


@fuzzed
@given(ROW)
def test_any_row_is_a_prompt_or_one_line(row: dict[str, Any]) -> None:
    try:
        assert file_prompt(row, "f.jsonl:1").turns
    except UserError as error:
        assert str(error).strip()


@fuzzed
@given(data=st.binary(max_size=60) | st.lists(ROW, max_size=2).map(lambda rows: json.dumps(rows).encode()))
def test_any_file_has_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    try:
        assert all(isinstance(row, dict) for row, _ in read_jsonl(path))
    except UserError as error:
        assert str(error).strip()


@fuzzed
@given(result=RESULT)
def test_any_acceptance_json_is_a_result_or_one_line(tmp_path_factory: pytest.TempPathFactory, result: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(result))
    try:
        assert all("tau" in record for record in read_result(path)["records"])
    except UserError as error:
        assert str(error).strip()


@fuzzed
@given(LINE)
def test_any_override_is_parsed_or_one_line(line: str) -> None:
    try:
        check_overrides([line])
    except UserError as error:
        assert str(error).strip()


@pytest.mark.parametrize("depth", [970, 100_000])
def test_deeply_nested_rows_end_with_one_line(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"messages": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(UserError, match=r"deep.jsonl:1"):
        [to_chat(row, SourceConfig(path=str(path)), origin) for row, origin in read_jsonl(path)]


def test_text_of_strangers_stays_text_in_reports_and_tables(tmp_path: Path) -> None:
    result, evil = document(), '=HYPERLINK("http://x")<script>alert(1)</script>[a](javascript:b)\x1b[2J'
    for record in result["records"]:
        record["benchmark"] = evil
    result["failures"][0]["reason"] = evil
    write_report(result, tmp_path)
    page, report = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "<script>alert" not in page and "&lt;script&gt;" in page
    assert "\x1b" not in report and "](javascript" not in report
    assert "<script>" not in report.replace("\\<script>", "")
    with (tmp_path / "acceptance.csv").open(newline="") as file:
        cells = [row["benchmark"] for row in csv.DictReader(file)]
    assert cells and all(cell.startswith("'=HYPERLINK") for cell in cells)


def test_a_terminal_shows_control_characters_and_does_not_obey_them() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=False).print(visible("red\x1b[31m \x07 and\n\ttabs, é", {}))
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    assert visible("a\n\tb é 🌺", {}) == "a\n\tb é 🌺"


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    needed = {"targets": "[t]", "draft.path": "d", "output_dir": "out", "evaluate.benchmarks": "[humaneval]"}
    config = to_config(composed("inference.servers=['http://me:hunter2@host:8000/v1']", **needed))
    with pytest.raises(UserError, match=r"inference.servers holds a secret.*OPENAI_API_KEY") as refused:
        validate_evaluate(config)
    assert "hunter2" not in str(refused.value)
