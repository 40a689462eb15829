"""A load is replayed step by step as an engine does it, K follows from it, and vLLM itself is loaded and predicted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from hypothesis import given
from hypothesis import strategies as st
from tiny import conversations, write_served_pair
from transformers import PreTrainedTokenizerBase
from vllm_server import ROOT, vllm_python

from pard_train.acceptance.load import LAST_BATCH, Request, StepTimes, best_k, predict_load, schedules, simulate
from pard_train.config import Config, LoadConfig
from pard_train.engines.vllm_server import ServerSettings, VllmServer, counters_in
from pard_train.errors import UserError
from pard_train.evaluation.load import Load, Reply, _ask, _step_seconds, measure_load
from pard_train.reports.load import load_charts, load_tables, render_load, write_load
from pard_train.validation import validate_load

# A step of the target alone takes 1 s for one request and 1 s more for each further one; with a draft, K / 10 s more.
TIMES = StepTimes({k: {1: 1 + k / 10, 4: 4 + k / 10} for k in (0, 2, 4)}, {0: 3.0, 2: 3.5, 4: 3.5}, 10)


def loop(requests: list[Request], k: int, concurrency: int) -> float:
    """The engine's loop, told by single tokens: who joins reads its prompt, all others advance by a step."""
    waiting, running, seconds = list(requests), [], 0.0
    while waiting or running:
        decoding = list(running)
        if decoding:
            seconds += len(decoding) + k / 10
        for state in decoding:
            accepted = min(state["matches"][state["done"]], k)
            state["done"] += accepted + 1
        running = [state for state in running if state["done"] < len(state["matches"])]
        for request in [waiting.pop(0) for _ in range(min(concurrency - len(decoding), len(waiting)))]:
            seconds += max((3.5 if k else 3.0) * request.num_prompt_tokens / 10, 1 + k / 10)
            if len(request.matches) > 1:
                running.append({"matches": list(request.matches), "done": 1})
    return seconds


REQUESTS = [
    Request(10, [4, 3, 2, 1, 0]),
    Request(20, [0] * 7),
    Request(1, [9]),  # ends with its first token
    Request(10, [0, 2, 1, 0, 1, 0, 3, 2, 1, 0]),
    Request(30, [1, 0, 1, 0, 1, 0]),
]


@pytest.mark.parametrize("concurrency", [1, 2, 4])
@pytest.mark.parametrize("k", [0, 2, 4])
def test_a_load_takes_as_long_as_the_engines_loop_token_by_token(k: int, concurrency: int) -> None:
    assert simulate(REQUESTS, TIMES, k, concurrency) == pytest.approx(loop(REQUESTS, k, concurrency))


def test_a_prediction_counts_the_tokens_of_the_load_and_compares_with_the_target_alone() -> None:
    rows = predict_load(REQUESTS, TIMES, 2)
    assert [row["num_draft_tokens"] for row in rows] == [0, 2, 3, 4]
    assert [row["is_interpolated"] for row in rows] == [False, False, True, False]
    tokens = sum(len(request.matches) for request in REQUESTS)
    for row, k in zip(rows, (0, 2, 3, 4), strict=True):
        assert row["tokens_per_second"] == pytest.approx(tokens / simulate(REQUESTS, TIMES, k, 2))
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
    assert rows[2]["step_seconds"] == pytest.approx(2.3)  # between 2 clients of 1 and 4, and between K of 2 and 4


def test_no_draft_is_best_where_every_k_loses_or_hardly_gains() -> None:
    rows = [{"num_draft_tokens": k, "speedup": s} for k, s in ((0, 1.0), (2, 1.02), (4, 0.9))]
    assert best_k(rows) == 0
    assert best_k([*rows, {"num_draft_tokens": 3, "speedup": 1.2}]) == 3


def test_schedules_cover_every_batch_size_and_never_ask_tensorrt_llm_for_no_draft() -> None:
    found = schedules({16: 0, 1: 6, 4: 3})
    assert found["tensorrt_llm"] == {"max_draft_len": 6, "draft_len_schedule": {1: 6, 4: 3, LAST_BATCH: 1}}
    assert found["vllm"]["num_speculative_tokens"] == {1: 6, 4: 3, 16: 0}
    assert schedules({1: 0})["tensorrt_llm"] == {"max_draft_len": 1, "draft_len_schedule": {LAST_BATCH: 1}}


@given(st.dictionaries(st.integers(1, 64), st.integers(0, 12), min_size=1))
def test_a_schedule_of_tensorrt_llm_begins_with_its_longest_draft(best: dict[int, int]) -> None:
    """Its settings are refused otherwise (`validate_draft_len_schedule_and_sort`)."""
    found = schedules(best)["tensorrt_llm"]
    lengths = found["draft_len_schedule"]
    assert lengths[min(lengths)] == max(lengths.values()) == found["max_draft_len"] >= 1


def test_counters_are_read_from_the_page_of_metrics_and_summed_over_engines() -> None:
    lines = [
        "# HELP vllm:spec_decode_num_drafts_total Number of drafts.",
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 5.0',
        'vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0',
        'vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09',
        'vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 14.0',
        'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 6.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 4.0',
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 2.0',
    ]
    found = counters_in("\n".join(lines), 2)
    assert (found.num_drafts, found.num_draft_tokens, found.num_accepted_tokens) == (7, 14, 6)
    assert found.accepted_per_position == [4, 2]
    assert counters_in("", 0).num_drafts == 0


def test_our_own_server_is_asked_directly_and_a_page_that_fails_is_no_page_of_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody listens there
    server = VllmServer(ServerSettings("T", "D", 6), python=None, log=tmp_path / "log.txt", timeout=1.0)
    with pytest.raises(UserError, match=r"its page of metrics did not answer within 10 s \(log: .*log\.txt"):
        server.counters()
    with FakeServer(lambda ids: {}, models=({"id": "T"},)) as fake:
        server.address = fake.url.removesuffix("/v1")
        assert '"T"' in str(server.read("v1/models"))


def test_a_server_gets_the_draft_in_parallel() -> None:
    settings = ServerSettings("T", "D", 6, arguments=["--enforce-eager"])
    command = settings.command("python", 8000)
    spoken = json.loads(command[command.index("--speculative-config") + 1])
    assert spoken["parallel_drafting"] is True
    assert (spoken["method"], spoken["num_speculative_tokens"]) == ("draft_model", 6)
    assert command[-2:] == ["--disable-hybrid-kv-cache-manager", "--enforce-eager"]
    alone = ServerSettings("T").command("python", 8000)
    assert not {"--speculative-config", "--disable-hybrid-kv-cache-manager"} & set(alone)


def test_a_step_is_timed_once_all_have_begun_and_latencies_are_those_of_the_stream() -> None:
    replies = [Reply([1, 2, 3, 4], 0.0, [1.0, 5.0, 6.0, 7.0]), Reply([1, 2, 3], 0.5, [4.5, 6.5, 7.5])]
    assert _step_seconds(replies) == 1.0  # the gap of 4 s is another request's prompt
    assert replies[0].first_token_seconds == 1.0
    assert replies[1].token_seconds == pytest.approx(1.5)


def test_requests_repeat_the_prompts_and_leave_vllm_the_context_that_it_drafts_in() -> None:
    load = Load(LoadConfig(num_draft_tokens=[8, 2, 8], max_new_tokens=20), [[1] * 5, [1] * 9, [2]], [2])
    assert load.values_of_k == [0, 2, 8]
    assert load.indexes(1) == [0, 1, 2, 0]
    assert len(load.indexes(4)) == 8
    assert load.max_model_len == 32 + 20 + 16 + 1  # a calibration asks 32 tokens
    assert replace(load, prompts=[[1] * 50]).max_model_len == 50 + 20 + 16 + 1


@pytest.mark.parametrize("name", ["benchmarks", "num_draft_tokens", "concurrency"])
def test_empty_lists_are_refused(name: str) -> None:
    config = Config(targets=["t"], output_dir="out", load=LoadConfig(**{name: []}))
    config.draft.path = "d"
    with pytest.raises(UserError, match=rf"load\.{name} is empty"):
        validate_load(config)


def result() -> dict[str, Any]:
    """load.json of two clients at K 4, in two rounds."""
    runs = []
    for number, (plain, own) in enumerate([(10.0, 15.0), (12.0, 24.0)]):
        for k, speed in ((0, plain), (4, own)):
            run = {"num_draft_tokens": k, "concurrency": 2, "round": number, "tokens_per_second": speed}
            run |= {"first_token_seconds": 0.5, "token_seconds": 0.02, "vllm_tau": 1.9 if k else 1.0}
            runs.append(run | {"num_identical": 4, "num_texts": 4})
    rows = [
        {"num_draft_tokens": k, "concurrency": 2, "vllm_tau": tau, "step_seconds": 0.1, "is_interpolated": k == 3}
        | {"tokens_per_second": 11.0 * speedup, "speedup": speedup, "is_best": k == 4}
        for k, tau, speedup in ((0, 1.0, 1.0), (3, 1.8, 1.4), (4, 1.9, 1.6))
    ]
    head = {"draft": "a/d", "target": "b/t", "dtype": "float32", "engine_version": "0.32.0"}
    return {**head, "runs": runs, "predictions": rows, "schedules": schedules({2: 4})}


def test_tables_show_medians_ranges_within_rounds_and_the_error_of_the_prediction(tmp_path: Path) -> None:
    measured, predicted, best = load_tables(result())
    assert measured.rows[1][:5] == ["2", "4", "19.5", "1.75x", "1.50 to 2.00"]
    assert predicted.rows[1][3] == "100 ms (between)"
    assert predicted.rows[1][5:7] == ["-", "-"]  # K = 3 was not served
    assert predicted.rows[2][4:] == ["17.6", "19.5", "-10%", "1.60x", "1.75x", "-9%"]
    assert best.rows == [["2", "4", "1.60x"]]
    (chart,) = load_charts(result())
    assert [(p.x, p.is_marked) for p in chart.series["predicted"]] == [(3, False), (4, True)]
    assert [(p.y, p.low, p.high) for p in chart.series["measured"]] == [(1.75, 1.5, 2.0)]
    text = render_load(result())
    assert "(!)" not in text
    assert '"draft_len_schedule": {"65536": 4}' in text
    slow = result()
    slow["runs"][-1]["tokens_per_second"] = 30.0
    assert "2.00x (!)" in render_load(slow)  # the median of 1.5 and 2.5
    write_load(result(), tmp_path)
    assert (tmp_path / "load.png").stat().st_size > 1000


# ---------------------------------------------------------------------------------------------------------------------
# vLLM itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("keep_servers", [True, False], ids=["together", "one after another"])
def test_vllm_under_load_writes_the_targets_text_and_counts_what_replay_counts(
    keep_servers: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target, draft = write_served_pair("qwen2", tokenizer, tmp_path)
    prompts = tmp_path / "questions.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": c[0]["content"]}) + "\n" for c in conversations(6, seed=5)))
    arguments = {
        "draft.path": draft,
        "targets": f"[{target}]",
        "engine_python": vllm_python(),
        "benchmarks": f"[{prompts}]",
        "num_draft_tokens": "[2,4]",
        "concurrency": "[1,3]",
        "num_rounds": 2,
        "max_new_tokens": 24,
        "keep_servers": str(keep_servers).lower(),
        "server_arguments": "[--enforce-eager]",
        "output_dir": tmp_path / "out",
    }
    command = [sys.executable, "recipes/load.py", *(f"{name}={value}" for name, value in arguments.items())]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "load.json").read_text())
    assert len(found["runs"]) == 3 * 2 * 2
    assert all(run["num_identical"] == run["num_texts"] for run in found["runs"])
    predicted = {(row["concurrency"], row["num_draft_tokens"]): row for row in found["predictions"]}
    assert {k for _, k in predicted} == {0, 2, 3, 4}
    for run in found["runs"]:
        counters, k = run["counters"], run["num_draft_tokens"]
        assert counters["num_draft_tokens"] == k * counters["num_drafts"]
        tau = predicted[run["concurrency"], k]["vllm_tau"]
        assert run["vllm_tau"] == pytest.approx(tau, rel=0.1)  # matches past the end are in vLLM's counters only
    assert found["engine_version"]
    assert "K for the load" in (tmp_path / "out" / "load.md").read_text()


@pytest.mark.slow
def test_a_schedule_of_k_ends_vllm_with_parallel_drafts_so_none_is_written(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once this fails, vLLM has learnt it: write its schedule, and drop the warning."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    target, draft = write_served_pair("qwen2", tokenizer, tmp_path)
    config = {"method": "draft_model", "model": str(draft), "parallel_drafting": True, "max_model_len": 256}
    config |= {"num_speculative_tokens": 4, "num_speculative_tokens_per_batch_size": [[1, 1, 4], [2, 16, 1]]}
    arguments = ["--enforce-eager", "--speculative-config", json.dumps(config)]
    settings = ServerSettings(str(target), None, 4, max_model_len=256, max_num_seqs=4, arguments=arguments)
    with VllmServer(settings, python=vllm_python(), log=tmp_path / "log.txt", timeout=300) as server:
        asyncio.run(_ask(server, [[1, 50, 2]], 1, 24, {"ignore_eos": True}))
        alone = server.counters()
        assert alone.num_draft_tokens == 4 * alone.num_drafts > 0
        with pytest.raises(UserError, match="the vLLM server failed: EngineCore"):
            asyncio.run(_ask(server, [[1, 50 + c, 2] for c in range(4)], 4, 24, {"ignore_eos": True}))


def test_a_server_that_does_not_start_is_one_error_with_its_log(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Our own environment has no vLLM."""
    log = tmp_path / "log.txt"
    with (
        pytest.raises(UserError, match=r"the vLLM engine failed: it ended with status 1: .*launch/vllm_cpu.sh"),
        VllmServer(ServerSettings("T"), python=sys.executable, log=log, timeout=60),
    ):
        pass
    slow = tmp_path / "python"
    slow.write_text(f"#!{sys.executable}\nimport time; time.sleep(60)\n")
    slow.chmod(0o755)
    server = VllmServer(ServerSettings("T"), python=str(slow), log=log, timeout=0.5)
    with pytest.raises(UserError, match=r"timeout=0.5 s exceeded before the server answers"), server:
        pass
    assert server.process.poll() is not None  # ended
    config = Config(targets=[str(tmp_path)], output_dir=str(tmp_path / "out"))
    config.draft.path = str(tmp_path)
    with pytest.raises(UserError):
        measure_load(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_engine_with_its_children(number: int, tmp_path: Path) -> None:
    program = f"""
import signal, time
from pard_train.engines.process import engine_process
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup would not leave it
with open({str(tmp_path / "log")!r}, "w") as log, engine_process(["bash", "-c", "sleep 300 & echo $!; wait"], log):
    print("started", flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    while not (child := (tmp_path / "log").read_text().strip()):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "a child of the engine lives on"
        time.sleep(0.05)
