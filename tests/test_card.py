"""A model card says what is known, with a valid head and commands that can be run as they stand."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny import build_model, exporting
from transformers import PretrainedConfig, Qwen2Config

from pard_train.config import DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.model import inspect_base, write_initial_draft
from pard_train.publishing.card import Card, write_card
from pard_train.publishing.export import export
from pard_train.publishing.origin import (
    find_base,
    is_hub_name,
    public_name,
    read_acceptance,
    read_license,
    read_training,
)
from pard_train.training.checkpoints import Checkpoint

TARGET = "Qwen/Qwen2.5-7B-Instruct"
ELSEWHERE = Checkpoint("me/draft", "me/draft")  # of no run that is known here


def config(**keys: Any) -> PretrainedConfig:
    """Config of an exported draft."""
    return Qwen2Config(
        vocab_size=152064,
        architectures=["Qwen2ForCausalLM"],
        pard_token=151665,
        mask_token_id=151665,
        **{"pard_num_draft_tokens": 8, **keys},
    )


def written(card: Card, folder: Path) -> ModelCard:
    """The card as a reader of the hub gets it: an invalid head is an error here."""
    write_card(card, folder)
    return ModelCard.load(folder / "README.md")


def record(target: str, benchmark: str, k: int, tau: float, **more: Any) -> dict[str, Any]:
    """One record of acceptance.json, as far as a card reads it."""
    return {
        "draft": "mine",
        "target": target,
        "benchmark": benchmark,
        "mode": "replay",
        "method": "pard",
        "temperature": 0.0,
        "num_draft_tokens": k,
        "num_prompts": 20,
        "num_turns": 20,
        "num_tokens": 400,
        "num_steps": 100,
        "max_new_tokens": 256,
        "dtype": "float32",
        "tau": tau,
        "tau_low": tau - 0.125,
        "tau_high": tau + 0.125,
        **more,
    }


def acceptance(path: Path, *records: dict[str, Any]) -> str:
    """An acceptance.json."""
    path.write_text(json.dumps({"schema_version": 2, "records": list(records), "failures": []}))
    return str(path)


def test_the_head_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    card = Card(
        "me/my-draft",
        config(),
        "bfloat16",
        base="Qwen/Qwen2.5-0.5B-Instruct",
        license={"license": "other", "license_name": "qwen-research", "license_link": "https://example.org/license"},
        records=[record("7B", "humaneval", 8, 4.25), record("7B", "gsm8k", 8, 5.0)],
    )
    head = written(card, tmp_path).data
    assert head.library_name == "transformers"
    assert head.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert (head.license, head.license_name) == ("other", "qwen-research")
    assert {"speculative-decoding", "pard"} <= set(head.tags)
    results = {(result.dataset_name, result.metric_name): result.metric_value for result in head.eval_results}
    assert results == {("humaneval", "tau at K = 8 for 7B"): 4.25, ("gsm8k", "tau at K = 8 for 7B"): 5.0}


def test_commands_can_be_run_as_they_stand(tmp_path: Path) -> None:
    text = written(Card("me/my-draft", config(), "bfloat16", targets=[TARGET]), tmp_path).text
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)
    (shell,) = [block for language, block in blocks if language == "bash"]
    words = shlex.split(shell)
    assert words[:4] == ["vllm", "serve", TARGET, "--speculative-config"]
    settings = {"method": "draft_model", "model": "me/my-draft", "num_speculative_tokens": 8, "parallel_drafting": True}
    assert json.loads(words[4]) == settings
    vllm, tensorrt, transformers = [ast.parse(block) for language, block in blocks if language == "python"]
    calls = {node.func.id: node for node in ast.walk(vllm) if isinstance(node, ast.Call)}
    assert {k.arg: ast.literal_eval(k.value) for k in calls["LLM"].keywords} == {
        "model": TARGET,
        "speculative_config": settings,
    }
    (pard,) = [
        node for node in ast.walk(tensorrt) if isinstance(node, ast.Call) and node.func.id == "PARDDecodingConfig"
    ]
    assert {k.arg: ast.literal_eval(k.value) for k in pard.keywords} == {
        "max_draft_len": 8,
        "speculative_model": "me/my-draft",
    }
    assert "custom_generate" in {k.arg for node in ast.walk(transformers) for k in getattr(node, "keywords", [])}


def test_the_commands_for_sliding_windows_keep_a_drafts_layers_in_one_group_of_caches(tmp_path: Path) -> None:
    windowed = build_model("gemma3", seed=0).config
    windowed.update({"architectures": ["Gemma3ForCausalLM"], "pard_token": 300, "pard_num_draft_tokens": 8})
    text = written(Card("me/my-draft", windowed, "bfloat16"), tmp_path).text
    assert "}' --disable-hybrid-kv-cache-manager" in text
    assert "disable_hybrid_kv_cache_manager=True)" in text


def test_the_card_names_the_longest_document_of_training(tmp_path: Path) -> None:
    text = written(Card("me/draft", config(pard_trained_length=4096), "bfloat16"), tmp_path / "known").text
    assert "| longest training document | 4096 tokens |" in text
    text = written(Card("me/draft", config(), "bfloat16"), tmp_path / "unknown").text
    assert "| longest training document | unknown tokens |" in text


def test_a_packaged_target_is_named_but_not_as_one_that_an_engine_could_serve(tmp_path: Path) -> None:
    packaged = "pypi:SmolLM2-135M-Instruct"
    text = written(Card("me/draft", config(), "bfloat16", targets=[packaged]), tmp_path).text
    assert f"| targets | {packaged} |" in text
    assert "vllm serve TARGET " in text
    both = written(Card("me/draft", config(), "bfloat16", targets=[packaged, TARGET]), tmp_path).text
    assert f"vllm serve {TARGET} " in both


def test_the_transformers_call_of_the_card_generates_with_the_draft(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 4, tmp_path / "init")
    (folder,) = export(exporting(str(tmp_path / "init"), str(tmp_path / "export"), targets=[str(base_folder)]))
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)[-1]
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=12"), "card", "exec"), {})
    assert "<|im_start|>assistant" in capsys.readouterr().out


def test_the_table_has_a_row_per_target_and_benchmark_at_k_8_and_the_largest_k(tmp_path: Path) -> None:
    records = [
        *(record("7B", "humaneval", k, tau) for k, tau in ((1, 1.75), (8, 4.25), (16, 5.5))),
        record("7B", "humaneval", 8, 9.0, mode="live"),  # replay is exact
        record("7B", "humaneval", 16, 9.0, temperature=1.0),
        record("7B", "gsm8k", 8, 3.0, mode="live"),
        record("32B", "gsm8k", 16, 6.0),
    ]
    text = written(Card("me/draft", config(), "bfloat16", records=records), tmp_path).text
    assert "| target | benchmark | prompts | tau, K = 8 | tau, K = 16 |" in text
    assert "| 7B | humaneval | 20 | 4.25 [4.12, 4.38] | 5.50 [5.38, 5.62] |" in text
    assert "| 7B | gsm8k | 20 | 3.00 [2.88, 3.12] |  |" in text
    assert "| 32B | gsm8k | 20 |  | 6.00 [5.88, 6.12] |" in text
    assert "9.00" not in text
    assert "1.75" not in text


def test_a_few_live_prompts_at_another_k_do_not_stand_for_replay_of_all(tmp_path: Path) -> None:
    records = [record("7B", "humaneval", 4, 3.5), record("7B", "humaneval", 8, 9.0, mode="live")]
    text = written(Card("me/draft", config(), "bfloat16", records=records), tmp_path).text
    assert "| 7B | humaneval | 20 | 3.50 [3.38, 3.62] |" in text
    assert "9.00" not in text


def test_estimates_and_other_methods_are_no_acceptance_of_the_draft(tmp_path: Path) -> None:
    records = [
        record("7B", "humaneval", 8, 4.25),
        record("7B", "humaneval", 12, 4.5, mode="estimate"),
        record("7B", "humaneval", 8, 1.5, method="ngram", mode="live"),
    ]
    assert read_acceptance(acceptance(tmp_path / "acceptance.json", *records), None, ELSEWHERE) == records[:1]


def test_a_measurement_of_several_drafts_must_name_the_one_that_is_meant(tmp_path: Path) -> None:
    records = [record("7B", "humaneval", 8, tau, draft=name) for name, tau in (("before", 2.0), ("after", 4.0))]
    path = acceptance(tmp_path / "acceptance.json", *records)
    assert read_acceptance(path, "after", ELSEWHERE) == records[1:]
    for name in (None, "mine"):
        with pytest.raises(UserError, match=f"acceptance_draft={name}: .* after, before"):
            read_acceptance(path, name, ELSEWHERE)
    (tmp_path / "old.json").write_text(json.dumps(records))
    with pytest.raises(UserError, match=r"old\.json .*schema_version"):
        read_acceptance(str(tmp_path / "old.json"), None, ELSEWHERE)


def test_what_a_run_says_of_itself_comes_with_the_counts_of_its_data(tmp_path: Path) -> None:
    run, answers, prompts = (tmp_path / name for name in ("run", "answers", "prompts"))
    for folder in (run, answers, prompts):
        folder.mkdir()
    (answers / "answers.jsonl").touch()
    settings = {
        "draft": {"num_draft_tokens": 8, "retention_ratio": 0.7, "min_retention": 0.2},
        "objective": {"ce": 1.0, "kd": 0.0, "depth_decay": 0.9, "cat": True, "dpace": False, "dpace_alpha": 0.5},
        "trainer": {
            "gradient_accumulation_steps": 2,
            "learning_rate": 3e-5,
            "lr_scheduler_type": "constant",
            "bf16": True,
        },
        "data": {"source": str(answers / "answers.jsonl"), "slot_budget": 16384, "max_length": 512},
        "world_size": 8,
    }
    (run / "config.json").write_text(json.dumps(settings))
    (run / "run.json").write_text(json.dumps({"versions": {"torch": "2.13.0", "wandb": None}}))
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 1250, "loss": 1.0}\n')
    sources = {"ultrachat": {"path": "HuggingFaceH4/ultrachat_200k", "license": "mit"}, "own": {"path": "own.jsonl"}}
    counts = {"ultrachat": {"read": 2000, "train": 1500}, "own": {"read": 3, "train": 1}}
    (prompts / "manifest.json").write_text(json.dumps({"identity": {"config": {"sources": sources}}, "counts": counts}))
    written_by = {"targets": {TARGET: "ab"}, "temperature": 0.0, "counts": {"rows": 1501, "tokens_per_second": 9.5}}
    (answers / "manifest.json").write_text(json.dumps(written_by))

    choice = f"{run / 'draft'}: no step of the run has a higher tau"
    training = read_training(Checkpoint(str(run / "draft"), str(run / "draft"), run, choice))
    card = written(Card("me/draft", config(), "bfloat16", training=training), tmp_path)
    for row in (
        "| steps | 1250 |",
        "| weights | draft: no step of the run has a higher tau |",
        "| slots per step | 262,144 (8 processes) |",
        "| objective | 1 ce, cat, decay 0.9 |",
        "| COD | retention ratio 0.7, at least 0.2 |",
        "| data | answers.jsonl |",
        f"| data: answers | written by {TARGET} at 0; 1,501 rows |",
        "| data: prompts | ultrachat (mit): 2,000 read, 1,500 train; own: 3 read, 1 train |",
        "| versions | torch 2.13.0 |",
    ):
        assert row in card.text
    assert card.data.datasets == ["HuggingFaceH4/ultrachat_200k"]
    assert str(tmp_path) not in card.content  # folders of this machine mean nothing to a reader


def test_the_best_draft_and_the_untrained_one_are_not_said_to_be_of_the_last_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n{"step": 1250, "loss": 1.0}\n')
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text('{"step": 750}')
    steps = {"draft": 1250, "best": 750, "init": 0, "checkpoint-500": 500, "export": None}
    for name, step in steps.items():
        assert Checkpoint(str(tmp_path / name), str(tmp_path / name), tmp_path).step == step, name


def test_the_license_is_that_given_or_of_the_bases_card_or_said_to_be_unknown(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    assert read_license(None, str(base)) == read_license(None, str(tmp_path / "gone")) == read_license(None, None) == {}
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: qwen-research\ntags: [chat]\n---\n# Base\n")
    assert read_license(None, str(base)) == {"license": "other", "license_name": "qwen-research"}
    assert read_license("apache-2.0", str(base)) == {"license": "apache-2.0"}
    card = written(Card("me/draft", config(), "bfloat16", base=str(base)), tmp_path)
    assert "license" not in card.data.to_dict()
    assert "## License\n\nUnknown." in card.text
    assert card.data.base_model is None
    assert "| base model | base |" in card.text


class NoSuchRepository(BaseHTTPRequestHandler):
    """A hub that has nothing."""

    def do_HEAD(self) -> None:
        """As the hub says it."""
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_base_whose_folder_is_gone_has_no_known_license_and_is_not_published_as_a_hub_name(tmp_path: Path) -> None:
    assert read_license(None, "models/a..b") == {}  # no name that a hub could have
    assert find_base("models/a..b") == "a..b"
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoSuchRepository)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    code = (
        "from pard_train.publishing.origin import find_base, read_license; "
        "print(find_base('models/gone'), read_license(None, 'models/gone'))"
    )
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
    assert done.stdout.endswith("gone {}\n"), done.stderr[-2000:]
    card = Card("me/draft", config(), "bfloat16", base=find_base("models/elsewhere"))  # offline nobody can tell
    assert written(card, tmp_path).data.base_model == "models/elsewhere"


def test_what_nobody_knows_is_said_to_be_unknown(tmp_path: Path) -> None:
    keys = config(pard_num_draft_tokens=None)
    del keys.pard_num_draft_tokens
    text = written(Card("me/draft", keys, "float32"), tmp_path).text
    assert "| base model | unknown |" in text
    assert "| K in training | unknown" in text
    assert "## Training\n\nUnknown." in text
    assert "## Acceptance\n\nNot measured." in text
    assert "vllm serve TARGET" in text


@pytest.mark.parametrize(
    "name, is_name, public",
    [
        ("Qwen/Qwen2.5-7B-Instruct", True, "Qwen/Qwen2.5-7B-Instruct"),
        ("/models/Qwen2.5-7B", False, "Qwen2.5-7B"),
        ("a/b/c", False, "c"),
        ("pypi:SmolLM2-135M-Instruct", False, "pypi:SmolLM2-135M-Instruct"),
        ("tests/tiny.py", False, "tiny.py"),  # it exists
    ],
)
def test_names_on_the_hub_are_told_from_folders(
    name: str, is_name: bool, public: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    assert (is_hub_name(name), public_name(name)) == (is_name, public)
