"""Benchmarks: the exact prompts of every name that needs no hub, the three forms of a file, and what errors name."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pard_train.data.benchmarks import NAMED, Benchmark, Prompt, check_benchmark, load_benchmark
from pard_train.data.sources import GSM8K_SAMPLE, HUMAN_EVAL, MT_BENCH, OnHub, OnWeb, read_packaged_rows
from pard_train.downloads import fetch_from_hub, fetch_from_web, read_packaged
from pard_train.errors import UserError

OUT_OF_REACH = [name for name, recipe in NAMED.items() if isinstance(recipe.source, OnHub)]
OFFLINE = [name for name, recipe in NAMED.items() if recipe.source.is_offline and name != "generated-maths"]


def texts(prompt: Prompt) -> list[str]:
    """What the user says, turn by turn, where every turn is one message."""
    assert all(len(turn) == 1 and turn[0]["role"] == "user" for turn in prompt.turns)
    return [turn[0]["content"] for turn in prompt.turns]


def write(path: Path, *rows: Any) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Named benchmarks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFLINE)
def test_a_named_benchmark_holds_as_many_prompts_as_it_says_and_nothing_twice(name: str) -> None:
    benchmark, recipe = load_benchmark(name), NAMED[name]
    assert (benchmark.name, benchmark.license, benchmark.source) == (name, recipe.license, str(recipe.source))
    assert len(benchmark.prompts) == recipe.num_prompts
    assert len({prompt.id for prompt in benchmark.prompts}) == recipe.num_prompts
    assert len({prompt.turns for prompt in map(_hashable, benchmark.prompts)}) == recipe.num_prompts
    assert all(text.strip() for prompt in benchmark.prompts for text in texts(prompt))


def _hashable(prompt: Prompt) -> Prompt:
    return replace(prompt, turns=tuple(texts(prompt)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OFFLINE)
def test_a_prompt_is_the_instruction_around_the_question(name: str) -> None:
    before, after = NAMED[name].instruction.split("{question}")
    for prompt in load_benchmark(name, 10).prompts:
        for text in texts(prompt):
            assert text.startswith(before)
            assert text.endswith(after)
            assert len(text) > len(before + after)


def test_humaneval_asks_for_all_problems_in_order() -> None:
    benchmark = load_benchmark("humaneval")
    assert [prompt.id for prompt in benchmark.prompts] == [f"HumanEval/{number}" for number in range(164)]
    problems = [row["prompt"] for row in read_packaged_rows(HUMAN_EVAL)]
    assert problems[0].startswith("from typing import List\n\n\ndef has_close_elements(")
    expected = [["Complete the following Python function.\n\n" + problem] for problem in problems]
    assert [texts(prompt) for prompt in benchmark.prompts] == expected


def test_gsm8k_asks_the_questions_as_they_stand() -> None:
    benchmark = load_benchmark("gsm8k")
    rows = read_packaged_rows(GSM8K_SAMPLE)
    assert [(prompt.id, texts(prompt)) for prompt in benchmark.prompts] == [(r["id"], [r["prompt"]]) for r in rows]
    assert texts(benchmark.prompts[0])[0].startswith("Melanie is a door-to-door saleswoman.")


def test_mt_bench_has_two_turns_in_each_of_eight_categories() -> None:
    prompts = load_benchmark("mt-bench").prompts
    assert [texts(prompt) for prompt in prompts] == [row["turns"] for row in read_packaged_rows(MT_BENCH)]
    assert {len(prompt.turns) for prompt in prompts} == {2}
    assert set(Counter(prompt.category for prompt in prompts).values()) == {10}
    assert [prompt.id for prompt in prompts] == [str(number) for number in range(81, 161)]
    assert texts(prompts[0]) == [
        "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences and "
        "must-see attractions.",
        "Rewrite your previous response. Start every sentence with the letter A.",
    ]


def test_codeio_asks_for_a_function_of_described_input_and_output() -> None:
    (text,) = texts(load_benchmark("codeio", 1).prompts[0])
    assert text.startswith(
        "Write a Python function `main_solution` that does the following.\n\nGiven the volume and weight of a moist"
    )
    assert "of the sand specimen?\n\nInput:\n  `V_ms` (float)" in text


def test_long_code_asks_about_the_first_of_twenty_four_functions_thousands_of_words_away() -> None:
    prompts = load_benchmark("long-code").prompts
    problems = read_packaged_rows(HUMAN_EVAL)
    for prompt in prompts:
        (text,) = texts(prompt)
        assert 1400 < len(text.split()) < 3500
    (text,) = texts(prompts[1])
    assert prompts[1].id == "HumanEval/4"
    before = "Read this Python module.\n\n```python\n"
    assert text.startswith(before + (problems[4]["prompt"] + problems[4]["canonical_solution"]).strip() + "\n\n\n")
    places = [text.find(problem["canonical_solution"].strip()) for problem in problems[4:28]]
    assert places == sorted(places)
    assert places[0] > 0
    assert problems[28]["entry_point"] not in text
    (last,) = texts(prompts[-1])  # begins with the last four problems and goes on with the first ones
    assert problems[0]["canonical_solution"].strip() in last


@pytest.mark.skipif("not _has_reasoning_gym()", reason="pip install reasoning-gym")
def test_generated_maths_is_the_same_on_every_machine() -> None:
    benchmark = load_benchmark("generated-maths")
    assert benchmark.fingerprint == "23c44b277767"
    assert Counter(prompt.category for prompt in benchmark.prompts) == {"gsm_symbolic": 80, "leg_counting": 20}
    assert texts(benchmark.prompts[0])[0].endswith("Do not include units.\n\nReason step by step.")


def _has_reasoning_gym() -> bool:
    try:
        return f"reasoning-gym=={version('reasoning-gym')}" in str(NAMED["generated-maths"].source)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif("_has_reasoning_gym()", reason="reasoning-gym is installed")
def test_generated_maths_without_its_generator_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"^benchmark generated-maths: .* pip install reasoning-gym==[\d.]+$"):
        load_benchmark("generated-maths")


def test_the_named_benchmarks_are_the_ones_whose_results_are_published() -> None:
    """Fingerprints of all prompts. A change here makes old results incomparable."""
    assert {name: load_benchmark(name).fingerprint for name in OFFLINE} == {
        "humaneval": "65a0d208537d",
        "gsm8k": "e674dc0a6bad",
        "mt-bench": "7c9c7e9d1fa8",
        "codeio": "4f73f2b5d6a8",
        "long-code": "f2e13a20a41f",
    }


def test_the_docs_name_every_benchmark_with_its_size_license_and_exact_instruction() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "benchmarks.md").read_text()
    cells = [[cell.strip() for cell in line.split(" | ")] for line in page.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("| `"): row[1:] for row in cells if len(row) == 6}
    assert {name: (row[0], row[3]) for name, row in rows.items()} == {
        name: (str(recipe.num_prompts), recipe.license) for name, recipe in NAMED.items()
    }
    assert [row[2].startswith(("package", "generated")) for row in rows.values()] == [
        recipe.source.is_offline for recipe in NAMED.values()
    ]
    instructions = {row[0].strip("| `"): row[1].removesuffix(" |").strip("`") for row in cells if len(row) == 2}
    assert instructions == {
        name: recipe.instruction.replace("\n", r"\n")
        for name, recipe in NAMED.items()
        if recipe.instruction != "{question}"
    }


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_a_benchmark_of_the_hub_without_the_hub_names_it_and_what_there_is_instead(name: str) -> None:
    """The tests run with HF_HUB_OFFLINE=1."""
    pattern = rf"^benchmark {name}: .*hub: .*; without a network there are humaneval, gsm8k, mt-bench, [^\n]*$"
    with pytest.raises(UserError, match=pattern):
        load_benchmark(name)


def test_a_file_of_the_hub_is_read_from_its_cache_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = NAMED["math-500"].source
    assert isinstance(source, OnHub)
    snapshot = tmp_path / "datasets--HuggingFaceH4--MATH-500" / "snapshots" / source.revision
    snapshot.mkdir(parents=True)
    rows = [
        {"problem": f"${n} + {n}$?", "subject": ["Algebra", "Geometry"][n % 2], "unique_id": f"test/{n}.json"}
        for n in range(500)
    ]
    write(snapshot / source.file, *rows)
    assert fetch_from_hub(source.repo, source.revision, source.file) == snapshot / source.file
    prompts = load_benchmark("math-500").prompts
    assert prompts[3] == Prompt("test/3.json", (({"role": "user", "content": "$3 + 3$?"},),), "Geometry")
    write(snapshot / source.file, *rows[:499])
    with pytest.raises(UserError, match=r"math-500: 500 rows expected of HuggingFaceH4/MATH-500.* found 499"):
        load_benchmark("math-500")


def test_reports_are_cut_to_a_number_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    source = NAMED["govreport"].source
    assert isinstance(source, OnHub)
    path = tmp_path / "datasets--ccdv--govreport-summarization" / "snapshots" / source.revision / source.file
    path.parent.mkdir(parents=True)
    words = [f"w{number}" for number in range(6001)]
    reports = ["\n ".join(words), *(f"report {number}" for number in range(99))]
    pq.write_table(pa.table({"report": reports, "summary": reports}), path)
    prompts = load_benchmark("govreport").prompts
    assert len(prompts) == 80
    assert texts(prompts[0]) == ["Summarize the following report.\n\n" + "\n ".join(words[:6000])]
    assert texts(prompts[1]) == ["Summarize the following report.\n\nreport 0"]


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address of a server of files, its folder, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()


def test_processes_that_fetch_a_package_at_once_all_have_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 5_000_000
    with zipfile.ZipFile(tmp_path / "demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("demo/text", text)
        wheel.writestr("demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n")
        wheel.writestr("demo-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo-1.0.dist-info/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    left = tmp_path / "pard_train" / "wheels" / "demo-1.0.partial-0" / "demo-1.0-py3-none-any.whl"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"PK")  # of a process that was killed
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read_packaged, [("demo==1.0", "demo/text")] * 4))
    assert found == [text.encode()] * 4
    assert {path.name for path in left.parents[1].iterdir()} == {"demo-1.0", left.parent.name}


@pytest.fixture
def mt_bench_rows() -> list[dict[str, Any]]:
    """Read before `web` gives the cache another place."""
    return read_packaged_rows(MT_BENCH)


def test_spec_bench_has_six_categories_that_take_turns(
    mt_bench_rows: list[dict[str, Any]], web: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, folder = web
    rows = mt_bench_rows
    for category in ("translation", "summarization", "qa", "math_reasoning", "rag"):
        numbers = range(len(rows) + 81, len(rows) + 161)
        rows += [
            {"question_id": n, "category": category, "turns": [f"{category} {n}"], "reference": []} for n in numbers
        ]
    write(folder / "question.jsonl", *rows)
    source = OnWeb(f"{address}/question.jsonl")
    monkeypatch.setitem(NAMED, "spec-bench", replace(NAMED["spec-bench"], source=source))
    benchmark = load_benchmark("spec-bench")
    six = {"mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"}
    assert Counter(prompt.category for prompt in benchmark.prompts) == dict.fromkeys(six, 80)
    assert [len(prompt.turns) for prompt in benchmark.prompts] == [2] * 80 + [1] * 400
    assert benchmark.source == source.url
    some = load_benchmark("spec-bench", 48).prompts
    assert Counter(prompt.category for prompt in some) == dict.fromkeys(six, 8)
    assert [prompt.id for prompt in some[:9]] == ["81", "82", "83", "84", "85", "86", "87", "88", "161"]


def test_a_file_of_the_web_is_fetched_once(web: tuple[str, Path]) -> None:
    address, folder = web
    (folder / "a.jsonl").write_text("first")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.jsonl").write_text("other")
    path = fetch_from_web(f"{address}/a.jsonl")
    (folder / "a.jsonl").write_text("second")
    assert fetch_from_web(f"{address}/a.jsonl").read_text() == "first"
    assert fetch_from_web(f"{address}/sub/a.jsonl").read_text() == "other"
    with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/b.jsonl could not be downloaded: HTTP Error 404"):
        fetch_from_web(f"{address}/b.jsonl")
    assert len(list(path.parent.iterdir())) == 2


def test_a_benchmark_of_the_web_without_it_names_it_and_what_there_is_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    source = OnWeb("http://127.0.0.1:1/question.jsonl")  # nobody listens there
    monkeypatch.setitem(NAMED, "alpaca", replace(NAMED["alpaca"], source=source))
    with pytest.raises(
        UserError, match=r"^benchmark alpaca: http.* could not be downloaded: .*; without a network there are human"
    ):
        load_benchmark("alpaca")


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_may_hold_prompts_turns_and_conversations(tmp_path: Path) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And you?"}
    answer = {"role": "assistant", "content": "Fine."}
    path = write(
        tmp_path / "mine.jsonl",
        {"prompt": "Hello?", "task_id": "t/1", "category": "greetings"},
        {"turns": ["Hello?", "And then?"], "question_id": 7},
        {"messages": [system, user, answer, user, answer], "id": "x", "task_id": "not this"},
        {"messages": [user, answer, {**user, "name": None}]},
    )
    benchmark = load_benchmark(path)
    assert benchmark == Benchmark("mine", benchmark.prompts, path, "unknown", "{question}")
    assert benchmark.prompts == (
        Prompt("t/1", (({"role": "user", "content": "Hello?"},),), "greetings"),
        Prompt("7", (({"role": "user", "content": "Hello?"},), ({"role": "user", "content": "And then?"},))),
        Prompt("x", ((system, user, answer, user),)),
        Prompt("4", ((user, answer, user),)),  # named by its line
    )


def test_a_tools_result_is_a_question_too(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    asked = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**call, "function": {"name": "f", "arguments": '{"x": 1}'}}],
    }
    messages = [{"role": "user", "content": "f(1)?"}, asked, {"role": "tool", "content": "3"}]
    path = write(tmp_path / "a.jsonl", {"messages": [*messages, {"role": "assistant", "content": "It is 3."}]})
    (turn,) = load_benchmark(path).prompts[0].turns
    assert turn == (messages[0], {**asked, "tool_calls": [call]}, messages[2])


def test_a_gzipped_file_and_one_with_blank_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl.gz"
    path.write_bytes(gzip.compress(b'\n{"prompt": "a"}\n\n{"prompt": "b"}\n'))
    benchmark = load_benchmark(str(path))
    assert benchmark.name == "mine"
    assert [(prompt.id, texts(prompt)) for prompt in benchmark.prompts] == [("2", ["a"]), ("4", ["b"])]


def test_the_first_prompts_are_taken_and_categories_take_turns(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", *({"prompt": f"p{n}"} for n in range(5)))
    assert [texts(prompt) for prompt in load_benchmark(plain, 2).prompts] == [["p0"], ["p1"]]
    assert len(load_benchmark(plain, 0).prompts) == len(load_benchmark(plain, 9).prompts) == 5
    sorted_ = write(tmp_path / "sorted.jsonl", *({"prompt": f"{c}{n}", "category": c} for c in "abc" for n in range(3)))
    taken = [texts(prompt)[0] for prompt in load_benchmark(sorted_, 5).prompts]
    assert taken == ["a0", "a1", "b0", "b1", "c0"]


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "a prompt needs one of `prompt` (a text), `turns` (a list of texts) and `messages` (a list of {role"),
        ({"text": "a"}, "content}), found none"),
        ({"prompt": "a", "messages": [USER]}, "found prompt and messages"),
        ({"prompt": 3}, "`prompt` must be a text that is not empty, found 3"),
        ({"prompt": " \n"}, "`prompt` must be a text that is not empty, found ' \\n'"),
        ({"prompt": "\ud800"}, "message 0 (user) has half a character"),
        ({"turns": "a"}, "`turns` must be a list of texts that are not empty, found 'a'"),
        ({"turns": []}, "`turns` must be a list of texts that are not empty, found []"),
        ({"turns": ["a", ""]}, "`turns` must be a list of texts that are not empty, found ['a', '']"),
        ({"turns": ["a", {"content": "b"}]}, "`turns` must be a list of texts"),
        ({"messages": []}, "`messages` must be a non-empty list"),
        ({"messages": "a"}, "`messages` must be a non-empty list"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "message 0 has role 'robot': allowed are system, user"),
        ({"messages": [{"role": "user", "content": None}]}, "message 0 (user) must have a text `content`"),
        ({"messages": [ANSWER]}, "message 0 is an answer without a user's message before it"),
        ({"messages": [{"role": "system", "content": "a"}]}, "ends with a system prompt, so nothing is asked"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "`tools` cannot be offered to a target: remove them"),
        ({"prompt": "a", "system": "b"}, "`system` is not read beside `prompt`: give the chat as `messages`"),
        ({"turns": ["a"], "tools": [{"name": "f"}]}, "`tools` is not read beside `turns`: give the chat as `messages`"),
        ({"prompt": "a", "category": 3}, "`category` must be a text, found 3"),
        ({"prompt": "a", "id": 1.5}, "`id` must be a text or a whole number, found 1.5"),
        ({"prompt": "a", "question_id": True}, "`question_id` must be a text or a whole number, found True"),
        ([], "a row must be a JSON object, found list"),
    ],
)  # fmt: skip
def test_an_error_names_file_line_field_and_what_is_allowed(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"prompt": "good"}, row)
    with pytest.raises(UserError) as error:
        load_benchmark(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_ids_are_unique_and_the_error_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "id": 3}, {"prompt": "b"}, {"prompt": "c"})
    with pytest.raises(UserError) as error:
        load_benchmark(path)
    assert str(error.value) == f"{path}:3: id '3' stands at {path}:1 too: ids must be unique"


def test_an_unknown_name_lists_what_is_allowed_and_nothing_is_read(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{")
    check_benchmark(str(damaged))
    for name in NAMED:
        check_benchmark(name)
    (tmp_path / "prompts.txt").write_text("Hello?")
    for source in ("humanevil", str(tmp_path / "none.jsonl"), str(tmp_path / "prompts.txt"), str(tmp_path)):
        for refuse in (check_benchmark, load_benchmark):
            with pytest.raises(UserError) as error:
                refuse(source)
            assert str(error.value).startswith(f"benchmark {source!r}: allowed are humaneval, gsm8k, gsm8k-test, ")
            assert str(error.value).endswith(", or an existing .jsonl file of prompts")


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"empty\.jsonl: no prompts"):
        load_benchmark(path)


def test_the_fingerprint_changes_with_every_prompt_and_with_nothing_else(tmp_path: Path) -> None:
    rows = [{"turns": ["a", "b"], "id": "1", "category": "c"}, {"prompt": "d", "id": "2"}]
    first = load_benchmark(write(tmp_path / "a.jsonl", *rows))
    assert len(first.fingerprint) == 12
    assert int(first.fingerprint, 16) >= 0
    same = load_benchmark(write(tmp_path / "b.jsonl", *({**row, "reference": "r"} for row in rows)))
    assert same.fingerprint == first.fingerprint
    changes = [{"turns": ["a", "b "]}, {"turns": ["a"]}, {"id": "0"}, {"category": "d"}]
    changed = [load_benchmark(write(tmp_path / "c.jsonl", rows[0] | change, rows[1])) for change in changes]
    fingerprints = {
        benchmark.fingerprint for benchmark in [first, *changed, load_benchmark(str(tmp_path / "a.jsonl"), 1)]
    }
    assert len(fingerprints) == 6
