"""An exported folder says what its checkpoint says, in the form that engines read, for every target it is meant for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_model, build_tokenizer, experiment, exporting
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerBase,
)

from pard_train.config import Config, DraftConfig, ModelConfig
from pard_train.errors import UserError
from pard_train.fingerprints import model_fingerprint
from pard_train.model import inspect_base, load_config, write_initial_draft
from pard_train.publishing.export import export, family_end_ids, older_keys, pad_vocabulary, plan_export, write_folder
from pard_train.reports.records import REQUIRED
from pard_train.training.trainer import train
from pard_train.validation import validate_export
from pard_train.vocabulary import add_mask_token

MASK = 300  # the first spare row of the tiny tokenizer


@pytest.fixture(scope="module")
def run(base_folder: Path, chats_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short training run with a checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(experiment(base_folder, chats_file, folder, max_steps=4, learning_rate=3e-3, save_steps=4))
    return folder


@pytest.fixture(scope="module")
def targets(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Targets of the family by their vocabulary rows; one has fewer than the draft."""
    root = tmp_path_factory.mktemp("targets")
    folders = {num_rows: root / f"target-{num_rows}" for num_rows in (304, 320, 352)}
    for num_rows, folder in folders.items():
        build_model("qwen2", seed=num_rows, num_rows=num_rows).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def keys_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a folder."""
    return json.loads((folder / name).read_text())


def logits_of(folder: Path) -> torch.Tensor:
    """What a model says of a few tokens, the mask token among them."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(
            torch.tensor([[5, 9, 250, MASK, MASK]])
        ).logits


def test_an_export_pads_to_the_target_reloads_and_drafts_the_same(
    run: Path, targets: dict[int, Path], base_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    settings = exporting(str(run / "draft"), str(folder), targets=[str(targets[352])], dtype="float32")
    assert export(settings) == [folder]
    padded, own = logits_of(folder), logits_of(run / "draft")
    assert padded.shape[-1] == keys_of(folder)["vocab_size"] == 352
    torch.testing.assert_close(padded[..., :320], own, atol=0, rtol=0)
    assert (padded[..., 320:] == own[..., MASK, None]).all()
    config = keys_of(folder)
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["pard_token"] == config["mask_token_id"] == MASK
    assert config["spd_type"] == "pard"
    assert config["pard_num_draft_tokens"] == 4
    assert config["use_cache"] is True
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base_folder / name).read_bytes(), name
    assert len({path.stat().st_mode for path in folder.rglob("*") if path.is_file()}) == 1  # who reads one reads all
    assert (folder / "custom_generate" / "generate.py").is_file()  # whole from the moment it has its name
    assert not list(tmp_path.glob("*.partial*"))


def test_targets_of_equal_size_share_a_folder_and_others_have_their_own(
    run: Path, targets: dict[int, Path], tmp_path: Path
) -> None:
    names = [str(targets[rows]) for rows in (352, 320, 352)]
    folders = export(exporting(str(run / "draft"), str(tmp_path / "export"), targets=names, dtype="float32"))
    assert folders == [tmp_path / "export" / "vocab-320", tmp_path / "export" / "vocab-352"]
    small, large = map(logits_of, folders)
    assert (small.shape[-1], large.shape[-1]) == (320, 352)
    torch.testing.assert_close(large[..., :320], small, atol=0, rtol=0)
    shared = tmp_path / "shared"
    assert export(exporting(str(run / "draft"), str(shared), targets=[names[0], names[2]])) == [shared]


def test_a_target_that_could_not_draft_can_have_a_draft(
    run: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    window = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    build_model("qwen2", seed=1, num_rows=352, **window).save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    plan = plan_export(
        exporting(
            str(run / "draft"),
            str(tmp_path / "export"),
            targets=[str(tmp_path / "target")],
        )
    )
    assert list(plan.sizes) == [352]


def test_a_checkpoint_of_the_same_step_gives_the_export_of_the_draft_byte_for_byte(run: Path, tmp_path: Path) -> None:
    export(exporting(str(run / "draft"), str(tmp_path / "draft")))
    export(exporting(str(run / "checkpoint-4"), str(tmp_path / "checkpoint")))
    files = {str(p.relative_to(tmp_path / "draft")) for p in (tmp_path / "draft").rglob("*") if p.is_file()}
    checkpoint = tmp_path / "checkpoint"
    assert files == {str(p.relative_to(checkpoint)) for p in checkpoint.rglob("*") if p.is_file()}
    for name in files - {"README.md", "config.json"}:
        assert (tmp_path / "draft" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes(), name
    assert keys_of(tmp_path / "draft") == keys_of(tmp_path / "checkpoint")
    assert {weight.dtype for weight in load_file(tmp_path / "draft" / "model.safetensors").values()} == {torch.bfloat16}


def run_with_best(run: Path, folder: Path, *, tau: float, last_tau: float | None) -> Path:
    """A copy of the run with the untrained draft as best/, of step 0, and the tau of the last measured step."""
    for name in ("draft", "init"):
        shutil.copytree(run / name, folder / name)
    for name in ("config.json", "run.json", "metrics.jsonl"):
        shutil.copyfile(run / name, folder / name)
    shutil.copytree(run / "init", folder / "best")
    record = {"chosen_by": "worst", "tau": tau, "step": 2, "rows": {"target/bench": tau}}
    (folder / "best" / "best.json").write_text(json.dumps(record))
    if last_tau is not None:
        rows = [{"step": 2, "eval/tau/worst": tau}, {"step": 4, "eval/tau/worst": last_tau, "eval/tau/mean": 9.0}]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.mark.parametrize(
    "tau, last_tau, chosen",
    [(2.5, 2.4, "best"), (2.5, 2.5, "draft"), (2.5, None, "best"), (None, None, "draft")],
    ids=["a better step", "the last step is as good", "the last step was not measured", "no monitor"],
)
def test_a_run_gives_the_better_of_draft_and_best_and_says_which(
    tau: float | None, last_tau: float | None, chosen: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = run if tau is None else run_with_best(run, tmp_path / "run", tau=tau, last_tau=last_tau)
    config = Config(draft=DraftConfig(path=str(source)), output_dir=str(tmp_path / "export"))
    config.export.dtype = "float32"
    (folder,) = export(config)
    expected = load_file(run / ("init" if chosen == "best" else "draft") / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in load_file(folder / "model.safetensors").items())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("weights: "))
    assert line.startswith(f"weights: {source / chosen}: ")
    card = (folder / "README.md").read_text()
    assert f"| weights | {line.removeprefix(f'weights: {source}/')} |" in card
    assert f"| steps | {2 if chosen == 'best' else 4} |" in card


def test_a_run_that_has_not_finished_is_not_exported(run: Path, tmp_path: Path) -> None:
    unfinished = run_with_best(run, tmp_path / "run", tau=2.5, last_tau=2.4)
    shutil.rmtree(unfinished / "draft")
    with pytest.raises(UserError, match=rf"{unfinished} has no draft/"):
        plan_export(exporting(str(unfinished), str(tmp_path / "export")))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_cut_into_files_of_the_size_asked_for_and_stay_tied(
    tied: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    build_model("llama", seed=1, tied=tied).save_pretrained(base)
    tokenizer.save_pretrained(base)
    write_initial_draft(inspect_base(ModelConfig(path=str(base)), DraftConfig()), 8, tmp_path / "init")
    target = tmp_path / "target"
    build_model("llama", seed=2, num_rows=400).save_pretrained(target)
    tokenizer.save_pretrained(target)
    settings = exporting(str(tmp_path / "init"), str(tmp_path / "export"), targets=[str(target)])
    settings.export.max_shard_size, settings.export.dtype = "100KB", "float32"
    export(settings)
    files = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(files) > 3
    names = [name for file in files for name in load_file(file)]
    assert ("lm_head.weight" in names) == (not tied)  # a tied weight is written once
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert len(model.lm_head.weight) == len(model.model.embed_tokens.weight) == 400
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["random", "all logits negative", "nearly equal rows"])
def test_padding_never_changes_what_is_drafted(kind: str, dtype: torch.dtype) -> None:
    model = build_model("llama", seed=3, tied=False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 64, generator=generator)
    with torch.no_grad():
        head = model.lm_head.weight
        if kind == "all logits negative":  # a zero row would win
            hidden = hidden.abs()
            head.copy_(-head.abs() - 0.01)
        if kind == "nearly equal rows":  # their mean would win: rounding lifts each of its entries to the upper value
            hidden = hidden.abs()
            is_upper = torch.rand(320, 64, generator=generator) < 0.6
            head.copy_(1 + torch.finfo(dtype).eps * is_upper)
    model, hidden = model.to(dtype), hidden.to(dtype)
    with torch.no_grad():
        before = model.lm_head(hidden)
        pad_vocabulary(model, 352, MASK)
        after = model.lm_head(hidden)
    assert torch.equal(after[:, :320], before)
    assert (after[:, 320:].amax(dim=-1) <= before.amax(dim=-1)).all()
    assert torch.equal(after.argmax(dim=-1), before.argmax(dim=-1))
    if kind != "nearly equal rows":  # no ties, so the winner does not hang on who comes first among equals
        is_other = before.argmax(dim=-1) != MASK
        assert (after[is_other, 320:].amax(dim=-1) < before[is_other].amax(dim=-1)).all()


def test_padding_never_wins_where_the_output_head_has_a_bias() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(PhiConfig(vocab_size=320, **shape, tie_word_embeddings=False)).eval()
    head, ids = model.lm_head, torch.randint(0, 300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.bias.copy_(torch.arange(320) / 100 - 8)  # all below 0
        add_mask_token(model, MASK)
        others = torch.arange(320) != MASK
        torch.testing.assert_close(head.bias[MASK], head.bias[others].mean())
        head.bias[MASK] -= 1  # as training does
        before = model(ids).logits.argmax(dim=-1)
        pad_vocabulary(model, 352, MASK)
        assert (model.lm_head.bias[320:] == model.lm_head.bias[MASK]).all()
        assert torch.equal(model(ids).logits.argmax(dim=-1), before)


def test_no_end_of_turn_of_the_family_is_lost() -> None:
    tokenizer = build_tokenizer()  # ends turns with <|im_end|>, id 2
    tokenizer.eos_token = "<|endoftext|>"
    config = AutoConfig.for_model("qwen2", vocab_size=320, eos_token_id=7)
    assert family_end_ids({"eos_token_id": [9, 8]}, config, tokenizer) == [9, 8, 7, 0, 2]
    assert family_end_ids({"eos_token_id": 2}, config, tokenizer) == [2, 7, 0]
    tokenizer.chat_template = None
    config.eos_token_id = None
    assert family_end_ids({}, config, tokenizer) == [0]


def test_the_generation_config_is_that_of_the_base_with_every_end(
    base_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 8, tmp_path / "init")
    file = tmp_path / "init" / "generation_config.json"
    file.write_text('{"eos_token_id": [7, 2], "temperature": 0.7, "top_p": 0.8}')  # sampling values, do_sample left out
    export(exporting(str(tmp_path / "init"), str(tmp_path / "export")))
    assert keys_of(tmp_path / "export", file.name) == {"eos_token_id": [7, 2], "temperature": 0.7, "top_p": 0.8}
    file.unlink()
    export(exporting(str(tmp_path / "init"), str(tmp_path / "without")))
    assert GenerationConfig.from_pretrained(tmp_path / "without").eos_token_id == [2]


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "default", "rope_theta": 1000000.0},
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=["plain", "llama3"],
)
def test_the_keys_of_older_engines_say_what_the_newer_keys_say(rotary: dict[str, Any], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=320, rope_parameters=dict(rotary), dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    written = keys_of(tmp_path)
    both = written | older_keys(written)
    assert both["rope_theta"] == rotary["rope_theta"]
    only_older = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    for keys in (both, only_older):
        (tmp_path / "config.json").write_text(json.dumps(keys))
        again = load_config(str(tmp_path))
        assert again.rope_parameters == rotary
        assert again.dtype == torch.bfloat16


@pytest.mark.parametrize(("model_type", "key"), [("phi", "partial_rotary_factor"), ("gpt_neox", "rotary_pct")])
def test_the_keys_of_older_engines_hold_the_share_of_rotated_dimensions(model_type: str, key: str) -> None:
    config = {"model_type": model_type, "dtype": "float32", "rope_parameters": {"partial_rotary_factor": 0.4}}
    assert older_keys(config)[key] == 0.4


def test_what_cannot_work_is_said_before_weights_are_read_and_leaves_nothing(
    run: Path, targets: dict[int, Path], base_folder: Path, tmp_path: Path
) -> None:
    draft, output = tmp_path / "draft", tmp_path / "export"
    draft.mkdir()
    for path in (run / "draft").iterdir():
        (draft / path.name).write_bytes(path.read_bytes())
    (draft / "model.safetensors").write_bytes(b"torn")
    other = tmp_path / "other"
    build_model("qwen2", seed=8).save_pretrained(other)
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    mistakes = {
        "has 304 vocabulary rows, the draft 320": exporting(str(draft), str(output), targets=[str(targets[304])]),
        "different tokenizers: 1 entries differ": exporting(str(draft), str(output), targets=[str(other)]),
        "is not a parallel draft model": exporting(str(base_folder), str(output)),
        r"none\.json does not exist": exporting(str(draft), str(output), acceptance=str(tmp_path / "none.json")),
        "the model cannot be loaded": exporting(str(draft), str(output)),  # all else is fine: now the weights
    }
    for reason, settings in mistakes.items():
        with pytest.raises(UserError, match=reason):
            export(settings)
        assert not list(tmp_path.glob("export*"))


def test_a_folder_that_is_taken_is_left_alone_and_an_empty_one_is_used(run: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    assert export(exporting(str(run / "draft"), str(taken))) == [taken]
    before = {path.name: path.stat().st_mtime_ns for path in taken.iterdir()}
    with pytest.raises(UserError, match="already exists"):
        export(exporting(str(run / "draft"), str(taken)))
    assert {path.name: path.stat().st_mtime_ns for path in taken.iterdir()} == before


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    for path in (run / "draft").iterdir():
        (draft / path.name).write_bytes(path.read_bytes())
    huge = keys_of(draft) | {"intermediate_size": 10**12}
    (draft / "config.json").write_text(json.dumps(huge))
    with pytest.raises(UserError, match=r"GB are free and .* GB needed"):
        plan_export(exporting(str(draft), str(tmp_path / "deep" / "export")))
    assert not (tmp_path / "deep").exists()


def test_figures_of_another_draft_are_refused_and_of_other_files_noted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "acceptance.json"

    def plan(measured: Path, **others: Path) -> None:
        """Plan the export of the trained draft with figures of the folder."""
        records = [
            dict.fromkeys(REQUIRED, 0)
            | {"draft": name, "mode": "replay", "method": "pard", "draft_fingerprint": model_fingerprint(str(folder))}
            for name, folder in {"mine": measured, **others}.items()
        ]
        file.write_text(json.dumps({"schema_version": 3, "records": records, "failures": []}))
        plan_export(
            exporting(
                str(run / "draft"),
                str(tmp_path / "export"),
                acceptance=str(file),
                acceptance_draft="mine",
            )
        )

    for same in (run / "draft", run / "checkpoint-4"):
        plan(same)
        assert "other files" not in capsys.readouterr().out
    plan(run / "init")
    assert f"note: mine in {file} has other files than {run / 'draft'}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"export.acceptance_draft=mine: .* as after"):
        plan(run / "init", after=run / "draft")


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"max_shard_size": "5 gigabytes"}, "max_shard_size=5 gigabytes: must be a size such as 5GB"),
        ({"repository": "draft"}, "repository=draft: must be NAMESPACE/NAME"),
        ({"dtype": "int8"}, r"export\.dtype=int8: .*bfloat16"),
        ({"acceptance_draft": "after"}, r"export\.acceptance_draft=after .*export\.acceptance"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate_export(exporting("draft", "export", **settings))


def test_each_vocabulary_size_has_a_repository_of_its_own(run: Path, targets: dict[int, Path], tmp_path: Path) -> None:
    names = [str(targets[rows]) for rows in (320, 352)]
    one, both = (
        export(exporting(str(run / "draft"), str(tmp_path / name), targets=chosen, repository="me/draft"))
        for name, chosen in (("one", names[:1]), ("both", names))
    )
    for folder, name in ((one[0], "me/draft"), (both[1], "me/draft-vocab-352")):
        assert f'"model": "{name}"' in (folder / "README.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files asks for. It keeps what it was asked."""

    asked: ClassVar[list[tuple[str, bytes]]] = []

    def do_GET(self) -> None:
        """Who the token belongs to."""
        self.asked.append((self.path, b""))
        self.answer({"name": "me", "orgs": [{"name": "us"}], "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        """A new repository, how each file is to be sent, and the commit."""
        body = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append((self.path, body))
        address = f"http://{self.headers['host']}/us/draft"
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        else:
            self.answer({"url": address, "commitUrl": f"{address}/commit/1", "commitOid": "1" * 40, "success": True})

    def answer(self, content: dict[str, Any]) -> None:
        """Send JSON."""
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_the_command_of_the_guide_uploads_the_whole_folder(run: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    folder = tmp_path / "export"
    export(exporting(str(run / "draft"), str(folder), repository="us/draft"))
    command = [str(Path(sys.executable).with_name("hf")), "upload", "us/draft", str(folder), "--private"]
    guide = Path(__file__).parent.parent / "docs" / "guides" / "export.md"
    assert "\nhf upload NAMESPACE/NAME outputs/my-draft/export --private\n" in guide.read_text()
    try:
        done = subprocess.run(command, env={**os.environ, **hub}, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
    assert done.returncode == 0, done.stderr[-3000:]
    created = json.loads(next(body for path, body in Hub.asked if path == "/api/repos/create"))
    assert (created["organization"], created["name"]) == ("us", "draft")
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = [body for path, body in Hub.asked if "/commit/" in path]
    sent = {row["value"]["path"]: row["value"] for row in map(json.loads, commit.splitlines()) if row["key"] == "file"}
    assert sent.keys() == {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert {"README.md", "model.safetensors", "custom_generate/generate.py"} <= sent.keys()
    for name, file in sent.items():
        assert base64.b64decode(file["content"]) == (folder / name).read_bytes()


def test_an_export_that_does_not_reload_to_its_checkpoint_leaves_nothing(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_initial_draft(inspect_base(ModelConfig(path=str(base_folder)), DraftConfig()), 8, tmp_path / "init")

    def damaged(model: Any, plan: Any, folder: Path, **settings: Any) -> None:
        write_folder(model, plan, folder, **settings)
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-2:] = bytes(2)  # of the last norm
        (folder / "model.safetensors").write_bytes(weights)

    monkeypatch.setattr("pard_train.publishing.export.write_folder", damaged)
    with pytest.raises(RuntimeError, match="does not reload to the model it was written from"):
        export(exporting(str(tmp_path / "init"), str(tmp_path / "export")))
    assert not list(tmp_path.glob("export*"))
