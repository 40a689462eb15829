"""Prompts: no question twice, none of the benchmarks, a held-out part that nothing moves, and counts that add up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pard_train.config import PrepareConfig, SourceConfig
from pard_train.data.prompts import mix, prepare
from pard_train.data.rows import source_version
from pard_train.errors import UserError

ROOT = Path(__file__).parents[1]
CODE = "from typing import List\n\n\ndef has_close_elements(numbers: List[float], threshold: float) -> bool:\n"


def question(number: int) -> str:
    """Questions with few words in common."""
    return " ".join(f"w{(number * 31 + k * k * 7) % 9973}" for k in range(20))


def write(path: Path, questions: list[str]) -> Path:
    """A file of one-turn chats."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}] for q in questions]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


def rows(path: Path) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(path: Path) -> list[str]:
    """The questions of a file."""
    return [row["messages"][0]["content"] for row in rows(path)]


def config_of(*files: Path, **settings: object) -> PrepareConfig:
    """Each file a source of its name, no benchmarks."""
    sources = {path.stem: SourceConfig(path=str(path)) for path in files}
    defaults = {"decontaminate": [], "held_out_fraction": 0.2, "num_workers": 1}
    return PrepareConfig(sources=sources, **{**defaults, **settings})


def counts_of(folder: Path) -> dict[str, dict[str, int]]:
    """Rows by source and fate."""
    return json.loads((folder / "manifest.json").read_text())["counts"]


def test_every_row_has_one_fate_and_the_counts_add_up(tmp_path: Path) -> None:
    texts = [question(n) for n in range(60)]
    source = write(tmp_path / "a.jsonl", [*texts, texts[3].upper(), texts[5] + " w1", "  " + texts[7]])
    config = config_of(source, num_rows=30)
    train, held_out = prepare(config, tmp_path / "prompts", seed=1)
    counts = counts_of(tmp_path / "prompts")["a"]
    assert counts["read"] == 63 == sum(number for fate, number in counts.items() if fate != "read")
    assert (counts["duplicate"], counts["near_duplicate"]) == (2, 1)
    assert counts["train"] == 30 == len(rows(train))
    assert counts["held_out"] == len(asked(held_out[0])) > 0
    assert not set(asked(train)) & set(asked(held_out[0]))
    assert set(asked(train)) | set(asked(held_out[0])) <= set(texts)  # of equal questions the first stays
    assert {row["source"] for row in rows(train)} == {"a"}
    files = json.loads((tmp_path / "prompts" / "manifest.json").read_text())["files"]
    assert files == {name: source_version(SourceConfig(path=str(tmp_path / "prompts" / name))) for name in files}
    assert set(files) == {"train.jsonl", "held_out/a.jsonl"}
    assert len({row["id"] for row in rows(train)}) == 30


def test_with_other_tools_it_is_another_question(tmp_path: Path) -> None:
    tools = [None, [{"name": "f", "strict": True}], [{"name": "g", "strict": True}], [{"strict": True, "name": "f"}]]
    chats = [{"messages": [{"role": "user", "content": question(1)}], "tools": offered} for offered in tools]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    train, _ = prepare(config_of(source, held_out_fraction=0.0), tmp_path / "prompts", seed=1)
    assert counts_of(tmp_path / "prompts")["a"] == {"read": 4, "rejected": 0, "duplicate": 1, "train": 3}
    assert sorted(row.get("tools", [{}])[0].get("function", {}).get("name", "") for row in rows(train)) == [
        "",
        "f",
        "g",
    ]


def test_other_data_moves_no_row_between_training_and_held_out(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [question(n) for n in range(200)])
    more = write(tmp_path / "b.jsonl", [question(n) for n in range(500, 700)])
    _, alone = prepare(config_of(first), tmp_path / "one", seed=1)
    _, together = prepare(config_of(more, first), tmp_path / "two", seed=9)
    assert [path.stem for path in together] == ["a", "b"]
    assert set(asked(alone[0])) == set(asked(together[0]))
    assert 20 <= len(asked(alone[0])) <= 60  # a fifth of 200, four standard deviations


def test_the_order_follows_from_contents_and_seed_alone(tmp_path: Path) -> None:
    texts = [question(n) for n in range(100)]
    forwards, backwards = write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])
    orders = [
        asked(prepare(config_of(path), tmp_path / f"{path.stem}{seed}", seed=seed)[0])
        for path, seed in [(forwards, 1), (backwards, 1), (forwards, 2)]
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_what_the_benchmarks_ask_is_left_out_and_counted_by_benchmark(tmp_path: Path) -> None:
    benchmark = tmp_path / "bench.jsonl"
    asked_there = "a farmer has seventeen sheep and all but nine of them run away how many are left in the field today"
    benchmark.write_text(json.dumps({"prompt": asked_there}) + "\n")
    texts = [question(1), f"Please tell me: {asked_there.upper()}?", question(2)]
    config = config_of(write(tmp_path / "a.jsonl", texts), decontaminate=[str(benchmark)], held_out_fraction=0.0)
    train, _ = prepare(config, tmp_path / "prompts", seed=1)
    assert sorted(asked(train)) == sorted([texts[0], texts[2]])
    assert counts_of(tmp_path / "prompts")["a"]["contaminated:bench"] == 1


def test_a_short_first_turn_of_a_benchmark_is_left_out_and_so_is_its_second(tmp_path: Path) -> None:
    turns = ["What are some business etiquette norms when doing business in Japan?", "Create a video script of that."]
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text(json.dumps({"turns": turns}) + "\n")
    texts = [question(1), *turns]
    config = config_of(write(tmp_path / "a.jsonl", texts), decontaminate=[str(benchmark)], held_out_fraction=0.0)
    train, _ = prepare(config, tmp_path / "prompts", seed=1)
    assert asked(train) == texts[:1]


def test_weights_are_shares_of_the_mix(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{name}.jsonl", [question(n + start) for n in range(100)])
        for name, start in [("a", 0), ("b", 500)]
    ]
    config = config_of(*files, held_out_fraction=0.0)
    train, _ = prepare(with_weights(replace(config, num_rows=40), 3.0, 1.0), tmp_path / "prompts", seed=1)
    assert Counter(row["source"] for row in rows(train)) == {"a": 30, "b": 10}


def test_a_mix_never_takes_more_than_there_is_and_keeps_its_shares() -> None:
    assert mix({"a": 3.0, "b": 1.0}, {"a": 600, "b": 500}, 0) == {"a": 600, "b": 200}
    assert mix({"a": 3.0, "b": 1.0}, {"a": 600, "b": 500}, 5000) == {"a": 600, "b": 200}
    assert mix({"a": None, "b": None}, {"a": 600, "b": 200}, 0) == {"a": 600, "b": 200}
    assert mix({"a": None, "b": None}, {"a": 600, "b": 200}, 400) == {"a": 300, "b": 100}
    assert mix({"a": 1.0, "b": 1.0}, {"a": 0, "b": 9}, 0) == {"a": 0, "b": 0}


def test_a_mix_takes_just_as_many_rows_as_are_wanted() -> None:
    assert mix({"a": None, "b": None, "c": None}, {"a": 50, "b": 30, "c": 20}, 7) == {"a": 4, "b": 2, "c": 1}
    for number in range(1, 101):
        rows = mix({"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 40, "b": 80, "c": 120}, number)
        assert sum(rows.values()) == number
        assert all(abs(rows[name] - number * share / 7) < 1 for name, share in (("a", 1), ("b", 2), ("c", 4)))


def with_weights(config: PrepareConfig, *weights: float) -> PrepareConfig:
    """A share for each source."""
    pairs = zip(config.sources.items(), weights, strict=True)
    return replace(config, sources={name: replace(source, weight=weight) for (name, source), weight in pairs})


def test_a_source_that_has_a_weight_and_nothing_to_train_on_is_named(tmp_path: Path) -> None:
    good, same = (write(tmp_path / f"{name}.jsonl", [question(n) for n in range(9)]) for name in ("good", "same"))
    config = with_weights(config_of(good, same, held_out_fraction=0.0), 3.0, 1.0)
    with pytest.raises(UserError, match=r"^prepare.sources.same has a weight but .*\(\{\"duplicate\": 9\}\)"):
        prepare(config, tmp_path / "prompts", seed=1)
    same.write_text('{"text": 3}\n{"broken\n')
    with pytest.raises(UserError, match=r"^prepare.sources.same has .*\(2 rejected, the last at \S+same.jsonl:"):
        prepare(replace(config, bad_rows="set_aside"), tmp_path / "prompts", seed=1)
    assert not (tmp_path / "prompts").exists()


def test_sources_of_many_schemas_become_one(tmp_path: Path) -> None:
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": question(1), "input": "", "output": "yes"}]))
    share = {"conversations": [{"from": "human", "value": question(2)}, {"from": "gpt", "value": "no"}]}
    (tmp_path / "share.jsonl").write_text(json.dumps(share) + "\n")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": question(3)}) + "\n")
    turns = [("human", question(4)), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "3")]
    tools = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "tools": '[{"name": "f"}]'}
    (tmp_path / "tools.jsonl").write_text(json.dumps(tools) + "\n")
    files = [tmp_path / name for name in ("alpaca.json", "share.jsonl", "plain.jsonl", "tools.jsonl")]
    train, _ = prepare(config_of(*files, held_out_fraction=0.0), tmp_path / "prompts", seed=1)
    assert sorted(asked(train)) == sorted(map(question, (1, 2, 3, 4)))
    assert {row["source"] for row in rows(train)} == {"alpaca", "share", "plain", "tools"}
    (with_tools,) = (row for row in rows(train) if row["source"] == "tools")
    assert with_tools["messages"][2] == {"role": "tool", "content": "3"}
    assert with_tools["tools"] == [{"type": "function", "function": {"name": "f"}}]


def test_rows_that_are_set_aside_are_counted_and_others_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [question(n) for n in range(5)])
    path.write_text(path.read_text() + '{"broken\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:6: "):
        prepare(config_of(path), tmp_path / "prompts", seed=1)
    assert not (tmp_path / "prompts").exists()
    prepare(config_of(path, bad_rows="set_aside", held_out_fraction=0.0), tmp_path / "prompts", seed=1)
    assert counts_of(tmp_path / "prompts")["a"] == {"read": 7, "rejected": 2, "train": 5}
    assert [row["origin"] for row in rows(tmp_path / "prompts" / "rejects.jsonl")] == [f"{path}:6", f"{path}:7"]


def test_why_the_last_row_was_set_aside_is_said_where_no_row_is_left(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"broken\n{"text": 3}\n')
    (tmp_path / "b.jsonl").write_text("")
    config = config_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl", bad_rows="set_aside")
    with pytest.raises(UserError) as error:
        prepare(config, tmp_path / "prompts", seed=1)
    start, _, reason = str(error.value).partition("2 rejected, the last at ")
    assert start == "prepare.sources have no row that can be used: a: "
    assert reason.startswith(f"{tmp_path / 'a.jsonl'}:2: no chat in the columns text: one of messages,")
    assert reason.endswith("; b: 0 rejected")


def test_a_time_among_the_arguments_of_a_call_is_set_aside(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"when": datetime(2024, 1, 1)}}}
    answers = [{"content": "yes"}, {"content": "", "tool_calls": [call]}]
    chats = [[{"role": "user", "content": question(n)}, {"role": "assistant", **a}] for n, a in enumerate(answers)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": messages} for messages in chats[::-1]]), path)
    with pytest.raises(UserError, match=r"a\.parquet\[0\]: message 1 \(assistant\) has a value that is not JSON"):
        prepare(config_of(path), tmp_path / "prompts", seed=1)
    prepare(config_of(path, bad_rows="set_aside", held_out_fraction=0.0), tmp_path / "prompts", seed=1)
    assert counts_of(tmp_path / "prompts")["a"] == {"read": 2, "rejected": 1, "train": 1}
    assert [row["origin"] for row in rows(tmp_path / "prompts" / "rejects.jsonl")] == [f"{path}[0]"]


def test_prompts_that_are_made_stand_and_are_not_overwritten_by_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [question(n) for n in range(20)])
    train, _ = prepare(config_of(path), tmp_path / "prompts", seed=1)
    before = train.stat().st_mtime_ns
    for num_workers in (1, 2):  # which changes no prompt
        again, _ = prepare(config_of(path, num_workers=num_workers), tmp_path / "prompts", seed=1)
        assert again.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds prompts of other sources or settings"):
        prepare(config_of(path), tmp_path / "prompts", seed=2)
    whole = train.read_text()
    train.write_text(whole.partition("\n")[2])
    with pytest.raises(UserError, match=r"was changed after it was written.*train.jsonl.*delete the folder"):
        prepare(config_of(path), tmp_path / "prompts", seed=1)
    train.write_text(whole)
    asked = tmp_path / "mine.jsonl"
    asked.write_text(json.dumps({"prompt": "Who?"}))
    with_own = config_of(path, decontaminate=[str(asked)])
    prepare(with_own, tmp_path / "decontaminated", seed=1)
    asked.write_text(json.dumps({"prompt": "Why?"}))
    with pytest.raises(UserError, match="holds prompts of other sources or settings"):
        prepare(with_own, tmp_path / "decontaminated", seed=1)
    write(path, [question(n) for n in range(21)])
    with pytest.raises(UserError, match="holds prompts of other sources or settings"):
        prepare(config_of(path), tmp_path / "prompts", seed=1)


def test_many_workers_write_what_one_writes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [question(n) for n in range(4100)])
    alone = prepare(config_of(path), tmp_path / "one", seed=1)[0]
    together = prepare(config_of(path, num_workers=2), tmp_path / "two", seed=1)[0]
    assert alone.read_bytes() == together.read_bytes()


def test_the_command_takes_presets_and_files_and_says_what_became_of_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [question(n) for n in range(50)] + [CODE + question(51)])
    command = [
        sys.executable,
        str(ROOT / "data_scripts" / "prepare.py"),
        f"prepare.sources.mine.path={path}",
        "model.path=unused",
    ]
    result = subprocess.run(
        [*command, "source=[gsm8k]", "prepare.decontaminate=[humaneval]", f"output_dir={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "gsm8k: 100 read" in result.stdout
    assert "mine: 51 read" in result.stdout
    refused = subprocess.run(
        [*command, "prepare.sources.mine.weight=2", "source=[gsm8k]", "output_dir=unused"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert "prepare.sources.gsm8k.weight is not set" in refused.stderr
