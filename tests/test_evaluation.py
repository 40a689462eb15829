"""An evaluation from models and prompts to records and pages, on tiny models."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, scripted
from tiny import CHATML, build_model, config_for, conversations, experiment, with_settings
from transformers import PreTrainedTokenizerBase

from pard_train.config import Config
from pard_train.device import device_name
from pard_train.errors import UserError
from pard_train.evaluation.evaluate import evaluate
from pard_train.fingerprints import model_fingerprint
from pard_train.training.trainer import train
from pard_train.validation import validate_evaluate

ROOT = Path(__file__).parents[1]
FIELDS = """draft target benchmark mode method temperature top_p num_draft_tokens batch_size max_new_tokens dtype
system_prompt template_kwargs prompt_template draft_fingerprint target_fingerprint benchmark_fingerprint num_prompts
num_turns num_tokens num_steps tau tau_low tau_high mean_prompt_tau prompt_counts histogram survival conditional groups
speed provenance"""
Drafts = tuple[Path, Path]


@pytest.fixture(scope="module")
def drafts(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    """An untrained and a trained draft of the base model."""
    run = tmp_path_factory.mktemp("drafts") / "run"
    trained = train(experiment(base_folder, chats_file, run, num_train_epochs=4, learning_rate=3e-3))
    return run / "init", trained


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight prompts: single questions, conversations that are asked again, and one of two turns."""
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    chats = conversations(9, seed=4)
    rows: list[dict[str, Any]] = [{"prompt": chat[0]["content"], "category": "plain"} for chat in chats[:4]]
    rows += [{"messages": chat, "category": "asked again"} for chat in chats[4:7]]
    rows += [{"turns": [chat[0]["content"] for chat in chats[7:9]], "category": "two turns"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(drafts: Drafts, base: Path, prompts: Path, output_dir: Path, **changes: Any) -> Config:
    """An evaluation of both drafts."""
    config = config_for(
        "evaluate",
        drafts={"before": str(drafts[0]), "after": str(drafts[1])},
        targets=[str(base)],
        benchmarks=[str(prompts)],
        num_draft_tokens=[1, 4],
        max_new_tokens=24,
        live_num_draft_tokens=4,
        output_dir=str(output_dir),
    )
    return with_settings(config, "evaluate", **changes)


def test_an_evaluation_writes_records_and_pages_and_replay_agrees_with_live(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    methods = {"live_prompts": 9, "live_methods": ["pard", "draft", "ngram"], "live_rounds": 1}
    document = evaluate(settings(drafts, base_folder, prompts_file, tmp_path / "out", **methods))
    assert document == json.loads((tmp_path / "out" / "acceptance.json").read_text())
    assert document["failures"] == []
    records = document["records"]
    assert len(records) == 2 * (2 + 2) + 1  # drafts x (two K by replay, two methods live), and prompt look-up
    for record in records:
        assert set(FIELDS.split()) <= record.keys()
        assert record["tau_low"] <= record["tau"] <= record["tau_high"]
        assert sum(record["histogram"]) == record["num_steps"]
        assert (record["num_prompts"], record["num_turns"]) == (8, 9)
    (lookup,) = (record for record in records if record["method"] == "ngram")
    assert (lookup["draft"], lookup["speed"]["num_identical_answers"]) == ("-", 9)
    for name in ("before", "after"):
        mine = [r for r in records if r["draft"] == name and r["num_draft_tokens"] == 4]
        replayed = next(r for r in mine if r["mode"] == "replay")
        live = {r["method"]: r for r in mine if r["mode"] == "live"}
        assert live["pard"]["histogram"] == replayed["histogram"]
        assert all(r["speed"]["num_identical_answers"] == 9 for r in live.values())
        for kind in ("category", "turn", "prompt_length", "position", "context"):
            groups = [group for group in replayed["groups"] if group["by"] == kind]
            assert sum(group["num_steps"] for group in groups) == replayed["num_steps"], kind
            assert sum(group["num_tokens"] for group in groups) == replayed["num_tokens"], kind
    (prediction,) = json.loads((tmp_path / "out" / "predictions.json").read_text())[:1]
    assert [row["num_draft_tokens"] for row in prediction["rows"]] == [1, 4]
    with (tmp_path / "out" / "acceptance.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(records)
    for name in ("report.md", "report.html", "acceptance.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_the_samples_put_together_are_the_answers(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    evaluate(settings(drafts, base_folder, prompts_file, tmp_path / "out"))
    (cache,) = (tmp_path / "out" / "target_text").iterdir()
    texts = {tokenizer.decode(json.loads(line)["ids"]).rstrip("\ufffd") for line in cache.read_text().splitlines()}
    samples = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert len(samples) == 2 * 3
    for sample in samples:
        assert "".join(step["accepted"] + step["target_token"] for step in sample["steps"]) in texts


def test_a_repeated_evaluation_computes_nothing_again_and_a_changed_one_is_refused(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out")
    first = evaluate(config)
    (cache,) = (tmp_path / "out" / "target_text").iterdir()
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    whole = cache.read_bytes()
    assert evaluate(config) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == cells

    cache.write_bytes(whole[: whole.rindex(b"{") + 7])  # killed in the middle of the last line
    next(iter(cells)).unlink()
    assert without_origin(evaluate(config)) == without_origin(first)
    assert sorted(cache.read_bytes().splitlines()) == sorted(whole.splitlines())
    with pytest.raises(UserError, match=r"holds a run with other settings .*max_new_tokens: 24 -> 12"):
        evaluate(with_settings(config, "evaluate", max_new_tokens=12))


def test_drafts_may_join_an_evaluation_and_none_may_leave_it(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    both = settings(drafts, base_folder, prompts_file, tmp_path / "out")
    config = with_settings(both, "evaluate", drafts={"before": str(drafts[0])})
    alone = evaluate(config)["records"]
    assert [r for r in evaluate(both)["records"] if r["draft"] == "before"] == alone
    for others in ({"before": str(drafts[0])}, {"before": str(drafts[1]), "after": str(drafts[1])}):
        with pytest.raises(UserError, match=r"holds a run with other settings \(drafts"):
            evaluate(with_settings(config, "evaluate", drafts=others))


def fingerprints(document: dict[str, Any]) -> set[str]:
    """Of all drafts, targets and benchmarks."""
    return {r[f"{kind}_fingerprint"] for r in document["records"] for kind in ("draft", "target", "benchmark")}


def test_a_result_of_other_weights_or_prompts_in_the_same_places_is_not_taken_for_this_one(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    folders = tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in drafts)
    target, prompts = tmp_path / "target", tmp_path / "mine.jsonl"
    shutil.copytree(base_folder, target)
    shutil.copyfile(prompts_file, prompts)
    live = {"live_prompts": 1, "live_rounds": 1, "live_methods": ["ngram"]}
    config = settings(folders, target, prompts, tmp_path / "out", num_draft_tokens=[4], **live)
    document = evaluate(config)

    changed = {
        folders[0] / "model.safetensors": (drafts[1] / "model.safetensors").read_bytes(),
        target / "config.json": (target / "config.json").read_bytes() + b"\n",
        prompts: prompts.read_bytes().replace(b"the", b"The"),
    }
    for path, content in changed.items():
        whole = path.read_bytes()
        path.write_bytes(content)
        assert fingerprints(evaluate(config)) != fingerprints(document)
        path.write_bytes(whole)
    assert evaluate(config) == document


def test_a_run_folder_stands_for_the_better_of_its_drafts(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for name, folder in (("draft", drafts[0]), ("best", drafts[1])):
        shutil.copytree(folder, run / name)
    for name in ("config.json", "run.json"):
        shutil.copyfile(drafts[1].parent / name, run / name)
    rows = [{"step": step, "eval/tau/mean": tau} for step, tau in ((2, 2.5), (4, 2.4))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "best" / "best.json").write_text('{"chosen_by": "mean", "tau": 2.5, "step": 2}')
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out", num_draft_tokens=[4])
    config.evaluate.drafts, config.draft.path = {}, str(run)
    (record,) = evaluate(config)["records"]
    assert record["draft"] == "run"
    assert record["draft_fingerprint"] == model_fingerprint(str(run / "best"))


def without_origin(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Records without the command and time that made them."""
    return [{name: value for name, value in record.items() if name != "provenance"} for record in document["records"]]


def test_draft_and_target_with_different_tokenizers_are_refused_before_anything_is_written(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(UserError, match="different tokenizers: 2 entries differ"):
        evaluate(settings(drafts, base_folder, prompts_file, tmp_path / "out", targets=[str(base_folder), str(other)]))
    assert not (tmp_path / "out").exists()


def test_a_template_that_refuses_the_system_prompt_or_has_no_room_for_it_is_found_before_anything_is_written(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(base_folder, tmp_path / "other")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (other / "chat_template.jinja").write_text(refusal + CHATML)
    targets = [str(base_folder), str(other)]
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out", targets=targets, system_prompt="Be brief.")
    with pytest.raises(UserError, match="no system role"):
        evaluate(config)
    with pytest.raises(UserError, match=r"context of .* 2048 positions"):
        evaluate(with_settings(config, "evaluate", targets=targets[:1], system_prompt="the cat " * 1000))
    assert not (tmp_path / "out").exists()


def test_a_target_that_fails_is_reported_and_the_rest_still_run(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(base_folder, tmp_path / "broken")
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    targets = [str(broken), str(base_folder)]
    document = evaluate(settings(drafts, base_folder, prompts_file, tmp_path / "out", targets=targets))
    (failure,) = document["failures"]
    assert failure["target"] == "broken"
    assert "cannot be loaded" in failure["reason"]
    assert {record["target"] for record in document["records"]} == {base_folder.name}
    assert "FAILED: target" in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "out" / "failures.log").read_text()


def test_a_draft_that_cannot_be_loaded_is_named_and_the_others_are_timed_all_the_same(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    torn = shutil.copytree(drafts[0], tmp_path / "torn")
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[:1000])
    live = {"live_prompts": 2, "live_rounds": 1, "live_methods": ["pard", "draft", "ngram"]}
    config = settings((torn, drafts[1]), base_folder, prompts_file, tmp_path / "out", num_draft_tokens=[4], **live)

    def timed() -> list[tuple[str, str]]:
        return [(r["draft"], r["method"]) for r in document["records"] if r["mode"] == "live"]

    document = evaluate(config)
    assert {failure["draft"] for failure in document["failures"]} == {"before"}
    assert timed() == [("after", "pard"), ("after", "draft"), ("-", "ngram")]
    (torn / "model.safetensors").write_bytes(whole)
    document = evaluate(config)
    assert document["failures"] == []
    assert len(timed()) == 5


def test_the_same_command_mends_what_failed(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    build_model("qwen2", seed=5).save_pretrained(target)
    tokenizer.save_pretrained(target)
    whole = (target / "model.safetensors").read_bytes()
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out", targets=[str(base_folder), str(target)])
    (target / "model.safetensors").write_bytes(whole[:1000])
    assert len(evaluate(config)["failures"]) == 1
    (target / "model.safetensors").write_bytes(whole)
    document = evaluate(config)
    assert document["failures"] == []
    assert len(document["records"]) == 2 * 2 * 2


def test_above_temperature_0_acceptance_is_estimated_from_drawn_texts_and_sampled_live(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    changes = {"temperatures": [0.0, 0.8], "top_p": 0.9, "live_prompts": 3, "live_rounds": 1}
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out", **changes)
    document = evaluate(config)
    warm = [record for record in document["records"] if record["temperature"] == 0.8]
    assert [record["mode"] for record in warm].count("live") == 2
    estimates = [record for record in warm if record["mode"] == "estimate"]
    assert [(r["draft"], r["num_draft_tokens"]) for r in estimates] == [
        (draft, k) for draft in ("before", "after") for k in (1, 4)
    ]
    for record in warm:
        assert record["top_p"] == 0.9
        assert 1 <= record["tau"] <= record["num_draft_tokens"] + 1
        assert record["mode"] != "live" or record["speed"]["num_identical_answers"] is None
    before, after = ([r["tau"] for r in estimates if r["draft"] == draft] for draft in ("before", "after"))
    assert before[0] != after[0] and before[1] != after[1]  # though the texts are the same
    assert without_origin(evaluate(config)) == without_origin(document)


def test_servers_draw_the_texts_of_an_estimate(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with FakeServer(scripted(tokenizer), models=({"id": base_folder.name},)) as server:
        changes = {"temperatures": [0.0, 0.8], "top_p": 0.9, "servers": [server.url]}
        config = settings(drafts, base_folder, prompts_file, tmp_path / "out", **changes)
        validate_evaluate(config)
        document = evaluate(config)
    warm = [request for request in server.requests if request["temperature"] == 0.8]
    assert len(warm) == len(server.requests) / 2
    assert {request["top_p"] for request in warm} == {0.9}
    replayed, estimated = ([r for r in document["records"] if r["mode"] == mode] for mode in ("replay", "estimate"))
    assert [r["histogram"] for r in replayed] == [r["histogram"] for r in estimated]  # the server's text is the same
    assert {r["temperature"] for r in estimated} == {0.8}


def test_every_way_to_decode_live_is_a_measurement_of_its_own_and_of_this_machine(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    changes = {"temperatures": [0.0, 0.8], "live_batch_sizes": [1, 2, 9], "live_prompts": 2, "live_rounds": 1}
    config = settings(drafts, base_folder, prompts_file, tmp_path / "out", num_draft_tokens=[1], **changes)
    document = evaluate(config)
    cells = [json.loads(path.read_text())["identity"] for path in (tmp_path / "out" / "cells").glob("live-*.json")]
    assert sorted((cell["sampling"]["temperature"], cell["batch_size"]) for cell in cells) == [
        (0.0, 1), (0.0, 2), (0.8, 1), (0.8, 2)
    ]  # fmt: skip
    assert {(cell["device"], len(cell["prompts"])) for cell in cells} == {(device_name(), 2)}
    (failure,) = document["failures"]
    assert "batch size 9, but only 2 answers" in failure["reason"]
    assert {r["provenance"]["device"] for r in document["records"]} == {device_name()}


def test_a_threshold_of_no_benchmark_or_of_no_number_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = settings((tmp_path, tmp_path), tmp_path, tmp_path / "mine.jsonl.gz", tmp_path / "out")
    with pytest.raises(UserError, match=r"evaluate\.fail_below\.humaneval .*mine, all"):
        evaluate(with_settings(config, "evaluate", fail_below={"mine": 2.0, "all": 2.0, "humaneval": 2.0}))
    config = with_settings(config, "evaluate", fail_below={"mine": float("nan")})
    with pytest.raises(UserError, match=r"fail_below\.mine=nan: must be at least 1"):
        validate_evaluate(config)


def test_a_missed_threshold_ends_the_command_with_status_3_after_everything_is_written(
    drafts: Drafts, base_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    arguments = [f"draft.path={drafts[1]}", f"targets=[{base_folder}]", f"benchmarks=[{prompts_file}]"]
    arguments += [f"output_dir={tmp_path / 'out'}", "num_draft_tokens=[4]", "max_new_tokens=16", "fail_below.all=4.9"]
    program = [sys.executable, "recipes/evaluate.py", *arguments]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 3, result.stderr
    assert "is below 4.9" in result.stderr
    assert (tmp_path / "out" / "report.html").exists()
