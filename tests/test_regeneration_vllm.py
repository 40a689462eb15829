"""Answers that a real vLLM server writes are those of generation in this process, through a kill and a resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import ROOT, num_answered, vllm_server

from pard_train.data.benchmarks import load_benchmark
from pard_train.data.chat import ChatEncoder
from pard_train.downloads import unpack_model
from pard_train.engines.vllm_server import VllmServer
from pard_train.generation.decoding import end_ids_of
from pard_train.targets.answers import Answer, prompt_key

COUNTRIES = "France Japan Italy Egypt Peru Kenya Norway India Spain Chile Greece Cuba Iran Mali Nepal Oman".split()  # noqa: SIM905
TURNS = ("What is the capital of {}?", "In which continent is that?", "Thank you!")
NUM_PROBLEMS = 12  # of HumanEval, whose answers the length limit cuts
MAX_NEW_TOKENS = 48
NEAR_TIE = 1e-3  # logits closer than this may fall either way between two float32 implementations


@pytest.fixture
def server(tmp_path: Path) -> Iterator[VllmServer]:
    """SmolLM2-135M-Instruct in float32."""
    with vllm_server(unpack_model("SmolLM2-135M-Instruct"), tmp_path / "server.log", max_model_len=1024) as server:
        yield server


def write_prompts(path: Path) -> Path:
    """Chats of three turns, and problems of one."""
    rows = [[{"role": "user", "content": turn.format(country)} for turn in TURNS] for country in COUNTRIES]
    rows += [list(prompt.turns[0]) for prompt in load_benchmark("humaneval", NUM_PROBLEMS).prompts]
    path.write_text("".join(json.dumps({"id": n, "messages": row}) + "\n" for n, row in enumerate(rows)))
    return path


def read_cache(folder: Path) -> dict[str, Answer]:
    """Answers by key, as far as whole lines of the cache tell."""
    lines = [
        line for file in folder.glob("answers/target_text/*/*.jsonl") for line in file.read_bytes().splitlines(True)
    ]
    rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return {row["key"]: Answer(row["ids"], row["is_cut"]) for row in rows}


def asked_prompts(row: dict[str, Any], encoder: ChatEncoder) -> list[list[int]]:
    """Ids of what was asked before each answer of a conversation."""
    messages = row["messages"]
    return [encoder.encode_prompt(messages[:n]) for n, m in enumerate(messages) if m["role"] == "assistant"]


def greedy(model: Any, prompt: list[int], end_ids: frozenset[int]) -> Answer:
    """Greedy generation of Transformers, one prompt at a time and without padding."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "eos_token_id": sorted(end_ids)}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=min(end_ids), **settings)
    answer = output[0, len(prompt) :].tolist()
    return Answer(answer, is_cut=answer[-1] not in end_ids)


@torch.inference_mode()
def margin(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float:
    """How far apart the logits of two texts' tokens are where the texts first differ."""
    place = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1]
    return float((logits[ours[place]] - logits[theirs[place]]).abs())


@pytest.mark.slow
def test_a_real_server_writes_what_this_process_writes_through_a_kill(server: VllmServer, tmp_path: Path) -> None:
    model_folder, prompts = unpack_model("SmolLM2-135M-Instruct"), write_prompts(tmp_path / "prompts.jsonl")
    command = [sys.executable, str(ROOT / "data_scripts" / "regenerate.py"), f"output_dir={tmp_path / 'data'}"]
    command += [f"targets=[{model_folder}]", f"regenerate.prompts={prompts}", f"inference.servers=[{server.url}]"]
    command += [f"regenerate.max_new_tokens={MAX_NEW_TOKENS}", "inference.concurrency=4"]

    client = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(read_cache(tmp_path / "data")) < 10:
        assert client.poll() is None
        time.sleep(0.02)
    client.send_signal(signal.SIGKILL)
    client.wait()
    known = read_cache(tmp_path / "data")
    assert not (tmp_path / "data" / "answers" / "answers.jsonl").exists()
    time.sleep(2)  # the server ends what the client left
    num_before = num_answered(server)

    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    served = read_cache(tmp_path / "data")
    assert num_answered(server) - num_before == len(served) - len(known)  # nothing twice, nothing left out
    assert {key: served[key] for key in known} == known

    rows = [json.loads(line) for line in (tmp_path / "data" / "answers" / "answers.jsonl").open()]
    assert [row["id"] for row in rows] == list(range(len(COUNTRIES) + NUM_PROBLEMS))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    asked = [asked_prompts(row, ChatEncoder(tokenizer)) for row in rows]
    flat = [prompt for conversation in asked for prompt in conversation]
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    end_ids = end_ids_of(str(model_folder), tokenizer)
    ours = [greedy(model, prompt, end_ids) for prompt in flat]
    margins = [
        margin(model, prompt, answer.ids, served[prompt_key(prompt)].ids)
        for prompt, answer in zip(flat, ours, strict=True)
        if served[prompt_key(prompt)] != answer
    ]
    print(f"{len(rows)} conversations, {len(flat)} answers, {len(known)} before the kill; differing: {margins}")
    assert all(m < NEAR_TIE for m in margins)
    assert len(margins) <= len(flat) // 20
    for row, conversation in zip(rows, asked, strict=True):
        is_cut = served[prompt_key(conversation[-1])].is_cut
        assert row["finish_reason"] == ("length" if is_cut else "stop")
    reasons = [row["finish_reason"] for row in rows]
    assert min(reasons.count("stop"), reasons.count("length")) >= 5
    assert sum(len(conversation) == 3 for conversation in asked) >= 10
