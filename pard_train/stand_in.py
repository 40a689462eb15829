"""A stand-in for a larger target: the same text at N times the cost.

A layer whose output projections are zero adds exactly zero to the residual stream. So a model followed by N - 1 such
copies of its layers computes the same logits, bit for bit. It shows what a tau is worth when the target is larger than
the draft, on a machine that cannot hold a larger target.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pard_train.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LAYER = re.compile(r"(model\.layers\.)(\d+)\.(.+)")  # prefix, index of the layer, tensor
OUTPUTS = ("self_attn.o_proj", "mlp.down_proj")  # of a layer: what it adds to the residual stream
COPIED = (".json", ".jinja", ".model", ".txt")  # config, tokenizer and chat template


def write_stand_in(source: Path, times: int, folder: Path) -> None:
    """Write a model with all its layers N times, which engines load as any other.

    Args:
        source: a model's folder with safetensors. Llama, Qwen2, Qwen3 and Gemma 3 style layers.
        times: N.
        folder: exists and is empty.

    Raises:
        UserError: if a layer has no output projections that could be zero.
    """
    from safetensors.torch import save_file

    from pard_train.architectures import per_layer_lists

    config = json.loads((source / CONFIG).read_text())
    num_layers = config["num_hidden_layers"]
    files = sorted(source.glob("*.safetensors"))
    _check_outputs(source, files, num_layers)
    for path in source.iterdir():
        if path.suffix in COPIED and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, folder / path.name)
    names: dict[str, str] = {}  # file by tensor
    num_bytes = 0
    for number, (path, copy) in enumerate(((path, copy) for path in files for copy in range(times)), start=1):
        name = f"model-{number:05}-of-{len(files) * times:05}.safetensors"
        tensors = _copied(path, copy * num_layers)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": num_bytes}, "weight_map": names}))
    config["num_hidden_layers"] = times * num_layers
    for name in per_layer_lists(config, num_layers):
        config[name] *= times
    if config.get("max_window_layers"):
        config["max_window_layers"] *= times
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _copied(path: Path, first_layer: int) -> dict[str, Tensor]:
    """The tensors of a file. If `first_layer` is above 0, its layers only, from there on, with outputs of zero."""
    import torch
    from safetensors.torch import load_file

    tensors = {}
    for name, tensor in load_file(path).items():
        if not first_layer:
            tensors[name] = tensor
        elif layer := LAYER.fullmatch(name):
            prefix, number, rest = layer.groups()
            copied = torch.zeros_like(tensor) if rest.rpartition(".")[0] in OUTPUTS else tensor
            tensors[f"{prefix}{first_layer + int(number)}.{rest}"] = copied
    return tensors


def _check_outputs(source: Path, files: list[Path], num_layers: int) -> None:
    from safetensors import safe_open

    names: set[str] = set()
    for path in files:
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    for layer in range(num_layers):
        for output in OUTPUTS:
            if f"model.layers.{layer}.{output}.weight" not in names:
                raise UserError(
                    f"{source}: layer {layer} has no {output}, so its copy cannot be made to add zero; a stand-in "
                    "(MODEL*N) needs Llama, Qwen2, Qwen3 or Gemma 3 layers in safetensors"
                )
