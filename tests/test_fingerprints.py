"""Two models have one name if, and only if, they are the same: a moved branch or a trained layer is another model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import build_model

from pard_train.fingerprints import model_fingerprint


def test_a_model_has_the_same_fingerprint_in_every_folder_and_other_weights_have_another(tmp_path: Path) -> None:
    names = set()
    for seed in (0, 1):
        build_model("llama", seed=seed).save_pretrained(tmp_path / str(seed))
        shutil.copytree(tmp_path / str(seed), tmp_path / f"{seed} again")
        names |= {model_fingerprint(str(tmp_path / name)) for name in (str(seed), f"{seed} again")}
    assert len(names) == 2


def test_every_single_tensor_and_the_config_count(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}  # 14 MB: most is far from the ends
    build_model("qwen2", seed=0, **shape).save_pretrained(tmp_path)
    path, names = tmp_path / "model.safetensors", {model_fingerprint(str(tmp_path))}
    whole = path.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    tensors = json.loads(whole[8:first])
    del tensors["__metadata__"]
    for tensor in tensors.values():
        place = first + tensor["data_offsets"][1] - 1
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        names.add(model_fingerprint(str(tmp_path)))
    assert len(names) == 1 + len(tensors) > 40
    path.write_bytes(whole)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("silu", "gelu"))
    assert model_fingerprint(str(tmp_path)) not in names


def test_weights_that_were_cut_off_have_a_fingerprint_too(tmp_path: Path) -> None:
    build_model("llama", seed=0).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole, names = path.read_bytes(), set()
    for size in (0, 5, 100, len(whole) // 2, len(whole)):
        path.write_bytes(whole[:size])
        names.add(model_fingerprint(str(tmp_path)))
    assert len(names) == 5


def test_a_hub_name_is_the_commit_that_its_branch_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(module, str(tmp_path))
    repo, names = tmp_path / "models--me--target", []
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "config.json").write_text("{}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        names += [model_fingerprint("me/target") for _ in range(2)]
    assert names[0] == names[1] != names[2] == names[3]


def test_a_model_of_eighty_gigabytes_is_read_in_no_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    num_tensors, size = 800, 100 << 20
    tensors = {
        str(n): {"dtype": "U8", "shape": [size], "data_offsets": [n * size, (n + 1) * size]} for n in range(num_tensors)
    }
    header = json.dumps(tensors).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + num_tensors * size)  # a hole, which takes no room on the disk
    assert path.stat().st_size > 80e9
    model_fingerprint(str(tmp_path))
