"""A smaller base from a larger model: some of its layers, left as they are. For families without a small member.

Block influence is 1 - cos(input, output) of a layer, averaged over tokens (ShortGPT, arXiv 2403.03853). The layer with
the least is left out, and the influence of the others is measured again, because each reads what the one before wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pard_train.architectures import per_layer_lists
from pard_train.errors import UserError

# Legend: N layers of the model, L tokens of a text.

AUTO_SHARE = 2 / 3  # of the layers that `auto` keeps
NUM_TEXTS, MAX_TOKENS = 8, 256  # that influence is measured on


def resolve_keep_layers(keep: Any, num_layers: int) -> int | list[int] | None:
    """What `model.keep_layers` means for a model of N layers: a count, the layers themselves, or None for all.

    Raises:
        UserError: for an empty, repeated or unordered list, or for layers or counts out of range.
    """
    if keep is None:
        return None
    name, fix = f"model.keep_layers={keep}", f"give a count from 1 to {num_layers}, a list of layers, or auto"
    if keep == "auto":
        return max(1, round(AUTO_SHARE * num_layers))
    if isinstance(keep, bool) or not isinstance(keep, int | list):
        raise UserError(f"{name} is not understood: {fix}")
    if isinstance(keep, int):
        if not 1 <= keep <= num_layers:
            raise UserError(f"{name}: the model has {num_layers} layers: {fix}")
        return keep
    if not keep or not all(isinstance(layer, int) and 0 <= layer < num_layers for layer in keep):
        raise UserError(f"{name}: a list names layers from 0 to {num_layers - 1}, at least one: {fix}")
    if keep != sorted(set(keep)):
        raise UserError(f"{name}: layers must be named once, in increasing order, such as {sorted(set(keep))}")
    return list(keep)


def keep_layers(model: PreTrainedModel, keep: int | list[int], by: str, texts: Iterable[np.ndarray]) -> list[int]:
    """Leave layers out of a model, in place; its config describes what is left.

    Args:
        model: causal LM of N layers.
        keep: from `resolve_keep_layers`.
        by: influence | even | first, how a count of layers is chosen.
        texts: token ids of documents; the first ones serve.

    Returns:
        The layers kept, in order.

    Raises:
        UserError: if a config of fewer layers describes another model.
        ValueError: without texts.
    """
    texts = list(islice(texts, NUM_TEXTS))
    if not texts:
        raise ValueError("the layers to keep are chosen and checked on texts")
    layers = _Layers(model)
    kept = keep if isinstance(keep, list) else _choose(layers, keep, by, texts)
    layers.keep(kept)
    for number, layer in enumerate(layers.present()):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    _check_described(model, kept, texts)
    return kept


class _Layers:
    """The N layers of a model, of which some are present."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model, model.config
        self.number = self.config.num_hidden_layers
        self._parent, self._name = self._find()
        self._all = self.present()
        self._lists = per_layer_lists(vars(self.config), self.number)

    def _find(self) -> tuple[nn.Module, str]:
        for parent in self.model.base_model.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == self.number:
                    return parent, name
        raise UserError(f"{self.config.name_or_path}: a {self.config.model_type} model has no list of layers to keep")

    def present(self) -> nn.ModuleList:
        """The layers that the model has now."""
        return getattr(self._parent, self._name)

    def keep(self, kept: Sequence[int]) -> None:
        """Have the model consist of these layers, and its config say so."""
        setattr(self._parent, self._name, nn.ModuleList([self._all[layer] for layer in kept]))
        for name, value in self._lists.items():
            setattr(self.config, name, [value[layer] for layer in kept])
        self.config.num_hidden_layers = len(kept)


def _choose(layers: _Layers, number: int, by: str, texts: Sequence[np.ndarray]) -> list[int]:
    """Layers to keep: the first, evenly spaced ones with both ends, or those of the most influence."""
    if by == "first":
        return list(range(number))
    if by == "even":
        return [round(i * (layers.number - 1) / max(1, number - 1)) for i in range(number)]
    kept = list(range(layers.number))
    while len(kept) > number:
        layers.keep(kept)
        del kept[int(measure_influence(layers.model, layers.present(), texts).argmin())]
    return kept


@torch.inference_mode()
def measure_influence(model: PreTrainedModel, layers: nn.ModuleList, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Block influence of each layer of a model, float64 [number of layers]."""
    total, seen = np.zeros(len(layers)), []

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        after = output[0] if isinstance(output, tuple) else output  # [1, L, hidden]
        seen.append(float(nn.functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1).mean()))

    hooks = [layer.register_forward_hook(see) for layer in layers]
    for text in texts:
        ids = torch.from_numpy(np.asarray(text[:MAX_TOKENS], dtype=np.int64))[None].to(model.device)
        model.base_model(input_ids=ids, use_cache=False)
        total += 1 - np.array(seen)
        seen.clear()
    for hook in hooks:
        hook.remove()
    return total / len(texts)


@torch.inference_mode()
def _check_described(model: PreTrainedModel, kept: list[int], texts: Sequence[np.ndarray]) -> None:
    """Check that a model built from the config alone computes the same."""
    try:
        plain = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).to(model.device).eval()
        plain.load_state_dict(model.state_dict())
        ids = torch.from_numpy(np.asarray(texts[0][:MAX_TOKENS], dtype=np.int64))[None].to(model.device)
        ours, theirs = (each(input_ids=ids, use_cache=False).logits.float() for each in (model.eval(), plain))
        is_same = torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(ours.std()))
    except (RuntimeError, ValueError, IndexError, KeyError):
        is_same = False
    if not is_same:
        raise UserError(
            f"model.keep_layers={kept}: the config of a {model.config.model_type} model cannot describe these layers "
            "alone; keep its first layers (model.keep_layers_by=first), or choose another base"
        )
