"""Tables, CSV, thresholds and comparison say what the records say, and say it when something is missing."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import KS, document, predictions, samples

from pard_train.errors import UserError
from pard_train.evaluation.live import predict_speedup
from pard_train.evaluation.speed import Latencies
from pard_train.reports.comparison import (
    compare,
    compare_results,
    comparison_tables,
    ratios,
    ratios_below,
    render_comparison,
)
from pard_train.reports.records import label_of, pooled_tau, read_result, scalars
from pard_train.reports.report import render_report, tau_below, write_report
from pard_train.reports.sections import build_sections
from pard_train.reports.tables import Table, prediction_table, tau_tables
from pard_train.runs import flatten

ROOT = Path(__file__).parents[1]
SMALL, LARGE = "Qwen2.5-7B-Instruct", "Qwen2.5-Coder-14B-Instruct"


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The whole matrix; tests change copies of it only."""
    return document()


def rows_of(table: str) -> list[list[str]]:
    """Cells of the body of a Markdown table."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def greedy(whole: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """Replayed records with these values."""
    return [r for r in whole["records"] if r["mode"] == "replay" and all(r[k] == v for k, v in fields.items())]


def test_the_report_fits_a_terminal_and_its_figures_are_those_of_the_records(whole: dict[str, Any]) -> None:
    report = render_report(whole)
    assert max(len(line) for line in report.splitlines()) <= 120
    rows = [row for row in rows_of(report.split(f"target {SMALL}")[1].split("target ")[0]) if "T=" not in row[1]]
    for row in rows[:9]:
        for k, cell in zip((1, 2, 4, 8, 12, 16), row[2:8], strict=True):
            (record,) = greedy(whole, target=SMALL, benchmark=row[0], draft=row[1], num_draft_tokens=k)
            assert cell == f"{record['tau']:.2f}"
        assert row[8] == f"[{record['tau_low']:.2f}, {record['tau_high']:.2f}]"
        assert row[9] == f"{record['vllm_tau']:.2f}"
    pooled = greedy(whole, target=SMALL, draft="pard-0.5b", num_draft_tokens=16)
    tokens, steps = (sum(r[name] for r in pooled) for name in ("num_tokens", "num_steps"))
    drafts, accepted = (sum(r[name] for r in pooled) for name in ("vllm_drafts", "vllm_accepted"))
    (row,) = (row for row in rows if row[:2] == ["all", "pard-0.5b"])
    assert row[7:] == [f"{tokens / steps:.2f}", row[8], f"{1 + accepted / drafts:.2f}", "72"]
    low, high = map(float, row[8].strip("[]").split(","))
    draws = np.random.default_rng(1).integers(72, size=(4000, 72))  # resampled prompts, whatever their benchmark
    counts = np.concatenate([r["prompt_counts"] for r in pooled])[draws].sum(axis=1)
    assert (low, high) == pytest.approx(np.quantile(counts[:, 0] / counts[:, 1], [0.025, 0.975]), abs=0.03)
    older = [{name: value for name, value in r.items() if name != "prompt_counts"} for r in pooled]
    assert tau_tables(older)[0].rows[-1][-3] == ""  # figures of before counts by prompt were kept


def test_what_failed_stands_before_every_figure(whole: dict[str, Any]) -> None:
    report = render_report(whole)
    line = "target Qwen2.5-72B-Instruct, benchmark humaneval: CUDA out of memory."
    assert report.index(line) < report.index("tau by number of draft tokens")
    assert "Failed" not in render_report({**whole, "failures": []})


def test_live_rows_show_speed_and_whether_the_text_is_the_targets_own(whole: dict[str, Any]) -> None:
    for target in (SMALL, LARGE):
        rows = rows_of(render_report(whole).split(f"speed on target {target}")[1].split("speed on")[0])
        timed = [r for r in whole["records"] if r["mode"] == "live" and r["target"] == target]
        for row, record in zip(rows, timed, strict=True):
            assert row[:3] == [label_of(record), "humaneval", f"{record['speed']['speedup']:.2f}x"]
            assert row[-1] == ("sampled" if record["temperature"] else "8 of 8")


def test_a_speed_up_above_tau_is_flagged_wherever_it_stands(whole: dict[str, Any]) -> None:
    assert "(!)" not in render_report(whole)
    live = next(r for r in whole["records"] if r["mode"] == "live")
    slow = {**live, "speed": {**live["speed"], "speedup": live["tau"] + 0.01}}
    result = {**whole, "records": [slow]}
    report = render_report(result)
    assert f"{live['tau'] + 0.01:.2f}x (!)" in report
    assert "the target alone decodes more slowly than it must" in " ".join(report.split())
    speed = next(section for section in build_sections(result) if section.anchor == "speed")
    assert speed.charts[0].rows == ["batch size 1 (!)"]
    assert "(!) marks a speed-up above tau" in speed.text
    (table,) = comparison_tables(compare_results({"old": {**whole, "records": [live]}, "new": result}))
    assert table.rows[0][-1] == f"{live['speed']['speedup']:.2f}x to {live['tau'] + 0.01:.2f}x (!)"
    row = {"num_draft_tokens": 4, "tau": 2.0, "draft_seconds": 0.1, "verify_seconds": 0.8, "speedup": 2.2}
    predicted = {"draft": "d", "target": "t", "batch_size": 1, "rows": [row], "recommended_num_draft_tokens": 4}
    assert prediction_table([predicted]).rows[0][-1] == "2.20x (!)"


def test_a_matrix_too_long_for_a_screen_prints_pooled_rows_only(whole: dict[str, Any]) -> None:
    many = {**whole, "records": [{**r, "target": f"{r['target']}-{i}"} for i in range(3) for r in whole["records"]]}
    tables = render_report(many).split("## Measured speed")[0]
    assert {row[0] for row in rows_of(tables)} >= {"all"}
    assert "| humaneval" not in tables
    assert "report.html" in tables


def test_a_draft_that_lacks_a_benchmark_gets_no_pooled_figure(whole: dict[str, Any]) -> None:
    records = greedy(whole, target=SMALL)
    partial = [r for r in records if (r["draft"], r["benchmark"]) != ("untrained", "mt-bench")]
    rows = {tuple(row[:2]): row for row in tau_tables(partial)[0].rows}
    assert set(rows["all", "untrained"][2:8]) == {"-"}
    assert "-" not in rows["all", "pard-0.5b"][2:8]
    pooled = {
        draft: [name for name in scalars([r for r in partial if r["draft"] == draft], partial) if "/all/" in name]
        for draft in ("untrained", "pard-0.5b")
    }
    assert pooled == {"untrained": [], "pard-0.5b": [f"eval/tau_by_k/{SMALL}/all/k_{k}" for k in KS]}
    for draft, is_whole in (("untrained", False), ("pard-0.5b", True)):
        found = predict_speedup(
            partial, {"draft": draft, "target": SMALL}, Latencies(1, 256, "cpu", 1.0, {8: 0.1}, {8: 1.1})
        )
        assert bool(found["rows"]) == is_whole


def test_markdown_columns_line_up_and_a_pipe_in_a_name_stays_in_its_cell() -> None:
    text = Table(["name", "n"], [["a|b\nc", "1"], ["long name", "12"]]).markdown()
    assert text.splitlines() == [
        "| name      |   n |",
        "| --------- | --: |",
        r"| a\|b c    |   1 |",
        "| long name |  12 |",
    ]


def test_csv_has_one_row_per_record_and_every_field_of_it(tmp_path: Path) -> None:
    whole = document(drafts=["pard-0.5b"])
    write_report(whole, tmp_path, predictions=predictions(whole), samples=samples(whole))
    with (tmp_path / "acceptance.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(whole["records"])
    for row, record in zip(rows, whole["records"], strict=True):
        assert json.loads(row["survival"]) == record["survival"]
        assert json.loads(row["histogram"]) == record["histogram"]
        assert float(row["tau"]) == record["tau"]
        assert row["provenance.command"] == "recipes/evaluate.py 'draft=outputs/my draft/export' " + (
            "'targets=[Qwen/Qwen2.5-7B-Instruct]'"
        )
        assert row["provenance.versions.torch"] == "2.13.0"
        assert row["speed.speedup"] == (str(record["speed"]["speedup"]) if record.get("speed") else "")
        flat = flatten({k: v for k, v in record.items() if k not in ("groups", "speed")})
        assert {name: "" if value is None else str(value) for name, value in flat.items()}.items() <= row.items()
    with (tmp_path / "groups.csv").open(newline="") as file:
        groups = list(csv.DictReader(file))
    assert len(groups) == sum(len(r.get("groups", ())) for r in whole["records"])
    assert (tmp_path / "acceptance.png").read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.md").read_text()
    assert report.startswith(render_report(whole))
    assert whole["records"][0]["draft_fingerprint"] in (tmp_path / "report.html").read_text()


def test_every_field_of_a_result_is_documented(whole: dict[str, Any]) -> None:
    documented = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "reference" / "acceptance-json.md").read_text()))
    parts = [whole, *whole["records"], *whole["failures"], *predictions(whole), *samples(whole)]
    parts += [r["provenance"] for r in whole["records"]] + [whole["records"][0]["provenance"]["git"]]
    parts += [r["speed"] for r in whole["records"] if r.get("speed")]
    parts += [group for r in whole["records"] for group in r.get("groups", ())]
    parts += [row for p in predictions(whole) for row in p["rows"]] + [s for a in samples(whole) for s in a["steps"]]
    assert {name for part in parts for name in part} <= documented


def test_thresholds_name_every_miss_at_the_largest_k(whole: dict[str, Any]) -> None:
    passing = {**whole, "failures": []}
    taus = {(r["draft"], r["target"]): r["tau"] for r in greedy(whole, benchmark="gsm8k", num_draft_tokens=16)}
    bar = sorted(taus.values())[2]
    misses = tau_below(passing, {"gsm8k": bar})
    expected = {pair: tau for pair, tau in taus.items() if tau < bar}
    assert len(misses) == len(expected) == 2
    for (draft, target), tau in expected.items():
        assert f"gsm8k: draft {draft} on target {target}: tau {tau:.2f} at K=16 is below {bar:.2f}" in misses
    pooled = pooled_tau(greedy(whole, draft="pard-0.5b", target=LARGE, num_draft_tokens=16))
    assert not [m for m in tau_below(passing, {"all": pooled}) if f"draft pard-0.5b on target {LARGE}" in m]
    assert [m for m in tau_below(passing, {"all": pooled + 1e-6}) if f"draft pard-0.5b on target {LARGE}" in m]


def test_a_threshold_on_what_was_not_measured_is_a_miss(whole: dict[str, Any]) -> None:
    assert tau_below(whole, {"math500": 1.0}) == ["math500: not measured, so tau is not known to be at least 1.00"]
    (miss,) = tau_below(whole, {"humaneval": 1.0})
    assert miss.startswith("humaneval: not measured: target Qwen2.5-72B-Instruct")
    assert tau_below(whole, {"gsm8k": 1.0}) == []
    untimed = {"draft": "pard-0.5b", "target": SMALL, "benchmark": "gsm8k", "reason": "batch size 4, but 1 answer"}
    assert tau_below({**whole, "failures": [untimed]}, {"gsm8k": 1.0}) == []
    everywhere = {"draft": "lost", "target": SMALL, "benchmark": None, "reason": "out of memory"}
    assert tau_below({**whole, "failures": [everywhere]}, {"gsm8k": 1.0}) == [
        f"gsm8k: not measured: draft lost, target {SMALL}: out of memory"
    ]


def test_an_estimate_stands_beside_what_was_measured_and_sets_no_threshold(whole: dict[str, Any]) -> None:
    (estimate, *_) = (r for r in whole["records"] if r["mode"] == "estimate" and r["num_draft_tokens"] == 16)
    table = render_report(whole).split(f"target {LARGE}")[1]
    (row,) = (row for row in rows_of(table) if row[:2] == [estimate["benchmark"], "untrained, T=0.7 (estimate)"])
    assert f"{estimate['tau']:.2f}" in row
    assert row[-2] == "-"
    assert not [m for m in tau_below(whole, {"all": 9.0}) if "T=0.7" in m]


def test_long_names_cost_columns_of_k_and_not_the_width(whole: dict[str, Any]) -> None:
    long = {**whole, "records": [{**r, "draft": f"{r['draft']}-of-a-longer-name"} for r in whole["records"]]}
    table = render_report(long).split("## Measured speed")[0]
    assert max(len(line) for line in table.splitlines()) <= 120
    (header, *_) = (line for line in table.splitlines() if line.startswith("| benchmark"))
    ks = re.findall(r"K=(\d+)", header)
    assert 2 <= len(ks) < 6
    assert (ks[0], ks[-1]) == ("1", "16")


def test_labels_tell_methods_temperatures_and_engines_apart() -> None:
    record = {"draft": "mine", "method": "pard", "mode": "replay", "temperature": 0.0}
    assert label_of(record) == "mine"
    assert label_of({**record, "mode": "engine"}) == "mine, in an engine"
    assert label_of({**record, "mode": "live", "method": "draft", "temperature": 0.7}) == "mine, autoregressive, T=0.7"
    assert label_of({**record, "mode": "live", "method": "ngram"}) == "prompt lookup"


def test_a_file_that_is_no_result_of_ours_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"acceptance.json does not exist"):
        read_result(tmp_path)
    path = tmp_path / "acceptance.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="schema_version=None"):
        read_result(path)
    path.write_text('{"schema_version": 1}')  # of version 0.1, with other names
    with pytest.raises(UserError, match="schema_version=1"):
        read_result(tmp_path)
    path.write_text("{")
    with pytest.raises(UserError, match=r"acceptance.json is not valid JSON"):
        read_result(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------------------------


def results() -> tuple[dict[str, Any], dict[str, Any]]:
    """A main result, and one of a better draft of another name."""
    main, mine = document(drafts=["pard-0.5b"]), document(drafts=["pard-0.5b-dpace"])
    return {**main, "failures": []}, {**mine, "failures": []}


def test_rows_are_matched_by_what_they_measure_and_not_by_the_drafts_name() -> None:
    main, mine = results()
    better = compare_results({"main": main, "mine": mine})
    worse = compare_results({"mine": mine, "main": main})
    for comparison in (better, worse):
        assert len(comparison.pairs) == len(main["records"])
        assert comparison.notes == comparison.missing == []
        for pair in comparison.pairs:
            for name in ("target", "benchmark", "num_draft_tokens", "mode", "method", "temperature", "batch_size"):
                assert pair.first[name] == pair.later[name]
            assert pair.ratio == pair.later["tau"] / pair.first["tau"]
    for pair, back in zip(better.pairs, worse.pairs, strict=True):
        assert pair.first is back.later
        if pair.first["mode"] == "replay":
            assert pair.interval[0] <= pair.ratio <= pair.interval[1]
            assert back.interval == pytest.approx((1 / pair.interval[1], 1 / pair.interval[0]))


def test_one_prompt_gives_a_ratio_without_an_interval() -> None:
    main, mine = results()
    for r in (*main["records"], *mine["records"]):
        r["prompt_counts"] = r["prompt_counts"][:1]
    assert {pair.interval for pair in compare_results({"main": main, "mine": mine}).pairs} == {None}


def test_what_a_failure_says_stays_text_in_markdown() -> None:
    main, mine = results()
    mine["failures"] = [{"draft": None, "target": SMALL, "benchmark": "humaneval", "reason": "![x](http://a/b.png)"}]
    text = render_comparison(compare_results({"main": main, "mine": mine}))
    assert "a/b.png" in text and "![x](" not in text


def test_several_drafts_are_matched_by_name_and_an_unknown_one_is_not_guessed() -> None:
    both = document(drafts=["pard-0.5b", "pard-0.5b-dpace"], targets=[SMALL])
    comparison = compare_results({"a": both, "b": both})
    pairs = comparison.pairs
    assert len(ratios(comparison)) == len(pairs) > 0
    assert {name.split("/")[2] for name in ratios(comparison)} == {"pard-0.5b", "pard-0.5b-dpace"}
    assert ratios_below(comparison, 1.1)[0].startswith(f"b/{pairs[0].later['draft']}: ")
    assert all(pair.ratio == 1.0 and pair.first is pair.later for pair in pairs)
    renamed = deepcopy(both)
    for r in renamed["records"]:
        r["draft"] = "other"
    comparison = compare_results({"a": both, "b": renamed})
    assert not [p for p in comparison.pairs if p.later["mode"] == "replay"]
    reason = (
        f"b: not compared: humaneval on {SMALL}: draft other could be compared with any of pard-0.5b, pard-0.5b-dpace"
    )
    assert reason in comparison.notes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("benchmark_fingerprint", "000000000000"),
        ("target_fingerprint", "000000000000"),
        ("max_new_tokens", 128),
        ("dtype", "float32"),
        ("template_kwargs", {"enable_thinking": False}),
        ("system_prompt", "You are terse."),
        ("num_prompts", 3),
        ("top_p", 0.9),
        ("prompt_template", "Be brief.\n\n{question}"),
        ("chat_template", "000000000000"),
        ("answer_dtype", "as served"),
    ],
)
def test_unlike_rows_are_named_in_one_line_and_never_compared(field: str, value: Any) -> None:
    main, mine = results()
    for r in main["records"] if field in ("chat_template", "answer_dtype") else ():
        r[field] = "of old"  # results of earlier versions lack them, and are compared all the same
    for r in mine["records"]:
        if (r["target"], r["benchmark"], r["mode"]) == (SMALL, "gsm8k", "replay"):
            r[field] = value
    comparison = compare_results({"main": main, "mine": mine})
    assert not [p for p in comparison.pairs if (p.later["target"], p.later["benchmark"]) == (SMALL, "gsm8k")]
    (note,) = comparison.notes
    assert note.startswith(f"mine: not compared: gsm8k on {SMALL}: {field} is {value!r}, not ")
    assert note in render_comparison(comparison)
    assert ratios_below(comparison, 0.1) == [f"mine: gsm8k on {SMALL}: not compared"]


def test_ratios_below_name_every_row_that_falls_behind() -> None:
    main, mine = results()
    comparison = compare_results({"main": mine, "mine": main})  # the worse one is the later
    misses = ratios_below(comparison, 0.95)
    behind = [p for p in comparison.pairs if p.ratio < 0.95]
    assert 0 < len(misses) == len(behind) < len(comparison.pairs)
    for miss, pair in zip(misses, behind, strict=True):
        assert f"{pair.ratio:.3f} of {pair.first['tau']:.2f}, below 0.950" in miss
    assert ratios_below(comparison, None) == []


def test_a_benchmark_that_a_later_result_lost_is_a_note_and_a_miss() -> None:
    main, mine = results()
    mine["records"] = [r for r in mine["records"] if r["benchmark"] != "mt-bench"]
    comparison = compare_results({"main": main, "mine": mine})
    assert f"mine: not compared: mt-bench on {SMALL}: this result has no such row" in comparison.notes
    assert f"mine: mt-bench on {LARGE}: not compared" in ratios_below(comparison, 0.5)


def test_rows_that_a_later_result_lost_are_few_notes_and_misses_and_those_it_has_more_are_none() -> None:
    first = document(drafts=["untrained", "pard-0.5b"], targets=[SMALL])
    names = ("humaneval", "gsm8k", "mt-bench")
    everywhere = ", ".join(f"{name} on {SMALL}" for name in names)

    def lost(**fields: Any) -> list[str]:
        later = deepcopy(first)
        later["records"] = [r for r in first["records"] if any(r[name] != value for name, value in fields.items())]
        comparison = compare_results({"main": first, "mine": later})
        assert len(comparison.pairs) == len(later["records"]) < len(first["records"])
        assert not compare_results({"mine": later, "main": first}).missing
        notes = [note for note in comparison.notes if "not measured" not in note]
        assert [note.split(": ", 2)[2].removesuffix(": this result has no such row") for note in notes] == [
            miss.split(": ", 1)[1] for miss in comparison.missing
        ]
        return [miss.removeprefix("mine: ") for miss in ratios_below(comparison, 1.0)]

    draft = "draft untrained, replay, K=1, 2, 4, 8, 12, 16"
    assert f"{draft}: {everywhere}: not compared" in lost(draft="untrained")
    assert lost(draft="untrained", num_draft_tokens=4, mode="replay") == [
        f"draft untrained, replay, K=4: {everywhere}: not compared"
    ]
    assert lost(mode="replay", benchmark="humaneval", num_draft_tokens=16) == [
        f"draft {name}, replay, K=16: humaneval on {SMALL}: not compared" for name in ("untrained", "pard-0.5b")
    ]
    assert lost(temperature=0.7, mode="live") == [
        f"draft {name}, live, T=0.7, K=8: humaneval on {SMALL}: not compared" for name in ("untrained", "pard-0.5b")
    ]
    assert f"gsm8k on {SMALL}: not compared" in lost(benchmark="gsm8k")


def test_a_comparison_shows_what_each_draft_is_worth_at_every_batch_size_and_k(tmp_path: Path) -> None:
    contents = dict(zip(("main", "mine"), results(), strict=True))
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "acceptance.json").write_text(json.dumps(content))
    own = predictions(contents["mine"])
    (tmp_path / "mine" / "predictions.json").write_text(json.dumps(own))  # the other one was not timed
    compare({name: str(tmp_path / name) for name in contents}, tmp_path / "out")
    table = (tmp_path / "out" / "compare.md").read_text().split("predicted speed-up by batch size and K")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "mine: " in line]
    assert len(rows) == len(own) > 1
    for row, p in zip(rows, own, strict=True):
        assert row[:4] == [f"mine: {p['draft']}", p["target"], str(p["batch_size"]), row[3]]
        assert row[4:] == [f"{r['speedup']:.2f}x" for r in p["rows"]]
    assert "predicted speed-up by batch size" in (tmp_path / "out" / "compare.html").read_text()


def test_nothing_comparable_is_an_error(tmp_path: Path) -> None:
    main, mine = results()
    for r in mine["records"]:
        r["max_new_tokens"] = 1
    for name, content in (("main", main), ("mine", mine)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = {name: str(tmp_path / f"{name}.json") for name in ("main", "mine")}
    with pytest.raises(UserError, match=r"nothing to compare: mine: not compared: humaneval on .* max_new_tokens is 1"):
        compare(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_compare_program_exits_with_3_for_a_miss_2_for_bad_input_and_0_otherwise(tmp_path: Path) -> None:
    main, mine = results()
    for name, content in (("main", main), ("mine", mine)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "acceptance.json").write_text(json.dumps(content))

    def run(first: str, later: str, *extra: str) -> subprocess.CompletedProcess[str]:
        paths = [f"results.a={tmp_path / first}", f"results.b={tmp_path / later}", f"output_dir={tmp_path / 'out'}"]
        command = [sys.executable, str(ROOT / "recipes" / "compare.py"), *paths, *extra]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    passed = run("main", "mine", "min_ratio=0.9")
    assert passed.returncode == 0, passed.stderr
    assert (tmp_path / "out" / "compare.md").read_text() in passed.stdout
    assert (tmp_path / "out" / "compare.html").exists()
    missed = run("mine", "main", "min_ratio=1.0")
    assert missed.returncode == 3
    misses = ratios_below(compare_results({"a": mine, "b": main}), 1.0)
    assert missed.stderr.splitlines() == [f"compare.py: below threshold: {miss}" for miss in misses]
    assert "Traceback" not in missed.stderr
    absent = run("main", "nowhere")
    assert absent.returncode == 2
    assert absent.stderr.startswith("compare.py: error: ")
