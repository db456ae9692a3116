"""Many LoRA adapters upon one model, mixed in one batch: a slot each, and a slot per row.

A layer's factors are stacked over slots and padded to the largest rank; slot 0 is zero, which is the bare model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import adapter_weights
from raytune_ft.models.attention import OWN, attention

_PREFIX = "base_model.model."
_FACTORS = {".lora_A.weight": 0, ".lora_B.weight": 1}


Factors = Mapping[str, tuple[Tensor, Tensor]]
"""By the names of linear layers: down [rank, in], and up [out, rank] with the scale in it."""


class _Layer:
    """Factors of one linear layer: down [slots, rank, in] and up [slots, out, rank], the scale in the latter."""

    def __init__(self, like: Tensor, slots: int, inputs: int, outputs: int) -> None:
        self.down, self.up = like.new_zeros(slots, 0, inputs), like.new_zeros(slots, outputs, 0)
        self._gathered: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def put(self, slot: int, down: Tensor | None, up: Tensor | None) -> None:
        """Sets a slot's factors, or empties it."""
        self._gathered = None
        self.down[slot], self.up[slot] = 0, 0
        if down is None or up is None:
            return
        rank = down.shape[0]
        if rank > self.down.shape[1]:
            more = rank - self.down.shape[1]
            self.down = torch.nn.functional.pad(self.down, (0, 0, 0, more))
            self.up = torch.nn.functional.pad(self.up, (0, more))
        self.down[slot, :rank], self.up[slot, :, :rank] = down, up

    def of(self, slots: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """[rows, in, rank] and [rows, rank, out], kept while the rows stay the same."""
        if self._gathered is None or self._gathered[0] != slots:
            places = torch.tensor(slots, device=self.down.device)
            down, up = self.down.index_select(0, places), self.up.index_select(0, places)
            self._gathered = (slots, down.transpose(1, 2), up.transpose(1, 2))
        return self._gathered[1], self._gathered[2]


class AdapterSlots:
    """LoRA adapters in numbered slots (from 1) upon a model, whose linear layers add them to what they compute."""

    def __init__(self, model: Any, *, slots: int, max_rank: int | None = None) -> None:
        self._model, self._slots, self._max_rank = model, slots + 1, max_rank
        self._layers: dict[str, _Layer] = {}
        self._hooks: list[Any] = []
        self._rows: tuple[int, ...] | None = None

    def load(self, slot: int, folder: Path) -> None:
        """Puts the LoRA adapter of a PEFT folder into `slot`.

        Raises:
            ModelError: if it is no plain LoRA, its rank is above the limit, or it does not fit the model.
        """
        factors = _factors(folder)
        largest = max(down.shape[0] for down, _ in factors.values())
        if self._max_rank is not None and largest > self._max_rank:
            raise ModelError(
                f"{folder}: its rank {largest} is above the limit of {self._max_rank}; raise max_lora_rank, or train "
                "with a smaller lora_r"
            )
        modules = dict(self._model.named_modules())
        for name, (down, up) in factors.items():
            self._check(folder, name, modules.get(name), down, up)
        self.put(slot, factors)

    def put(self, slot: int, factors: Factors) -> None:
        """Puts these factors into `slot`, in the place of what is there."""
        self.clear(slot)
        for name, (down, up) in factors.items():
            self._layer(name, self._model.get_submodule(name), down, up).put(slot, down, up)

    def close(self) -> None:
        """Leaves the model as it was before."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._layers.clear()

    def clear(self, slot: int) -> None:
        """Empties a slot; rows that still name it get the bare model."""
        for layer in self._layers.values():
            layer.put(slot, None, None)

    @contextmanager
    def rows(self, slots: Sequence[int]) -> Iterator[None]:
        """Within the block, row n of every batch is computed with the adapter in ``slots[n]``."""
        self._rows = tuple(slots) if any(slots) else None
        try:
            yield
        finally:
            self._rows = None

    def _layer(self, name: str, module: Any, down: Tensor, up: Tensor) -> _Layer:
        if name not in self._layers:
            like = self._model.get_input_embeddings().weight
            layer = _Layer(like.detach(), self._slots, down.shape[1], up.shape[0])
            self._layers[name] = layer
            self._hooks.append(module.register_forward_hook(self._hook(name, layer)))
        return self._layers[name]

    def _hook(self, name: str, layer: _Layer) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._rows is None:
                return None
            x = inputs[0]
            if x.dim() != 3 or len(x) != len(self._rows):
                raise ModelError(f"{name}: this layer does not see rows apart, so adapters cannot be mixed upon it")
            down, up = layer.of(self._rows)
            return output + torch.bmm(torch.bmm(x.to(down.dtype), down), up).to(output.dtype)

        return add

    @staticmethod
    def _check(folder: Path, name: str, module: Any, down: Tensor, up: Tensor) -> None:
        if module is None:
            raise ModelError(f"{folder}: the served model has no layer {name}: the adapter belongs to another base")
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if inputs is not None and (down.shape[1], up.shape[0]) != (inputs, outputs):
            raise ModelError(
                f"{folder}: {name} is {inputs} x {outputs} in the served model and {down.shape[1]} x {up.shape[0]} in "
                "the adapter, which belongs to another base"
            )


@torch.no_grad()
def layer_without_rows(model: Any) -> str | None:
    """The name of a linear layer that is given tokens without saying whose row they are of; None if there is none.

    Upon such a layer adapters cannot be mixed.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: Any, inputs: tuple[Tensor, ...]) -> None:
            if inputs[0].dim() != 3:
                found.append(name)

        return look

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linear]
    try:
        with attention(model, OWN):
            model(input_ids=torch.zeros((2, 2), dtype=torch.long, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _factors(folder: Path) -> Factors:
    """Those of a PEFT folder."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(folder))
    if str(config.peft_type.value) != "LORA" or config.use_dora:
        kind = "DoRA" if getattr(config, "use_dora", False) else config.peft_type.value
        raise ModelError(
            f"{folder}: {kind} cannot be mixed with other adapters; serve it alone (model_path={folder}), or merge it"
        )
    found: dict[str, dict[int, Tensor]] = {}
    for key, tensor in load_file(adapter_weights(folder)).items():
        ending = next((ending for ending in _FACTORS if key.endswith(ending)), None)
        if ending is None or not key.startswith(_PREFIX):
            raise ModelError(
                f"{folder}: holds {key}, which is no factor of a linear layer and cannot be mixed with other adapters; "
                f"serve it alone (model_path={folder}), or merge it"
            )
        found.setdefault(key.removeprefix(_PREFIX).removesuffix(ending), {})[_FACTORS[ending]] = tensor
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise ModelError(f"{folder}: its LoRA factors are incomplete")
    return {name: (pair[0], pair[1] * _scale(config, name, pair[0].shape[0])) for name, pair in found.items()}


def _scale(config: Any, name: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    alphas: Mapping[str, float] = config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
