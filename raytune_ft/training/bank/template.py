"""The base without its weights: upon it PEFT itself makes each trial's first adapter, and writes the last one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytune_ft.core.errors import ModelError
from raytune_ft.models.adapters import add_lora, save_adapter
from raytune_ft.training.bank.slot import State, Target
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.dropout import linear_numbers


class AdapterTemplate:
    """Makes and saves adapters as PEFT does, at the cost of the adapter alone: no base weight is copied."""

    def __init__(self, base: Any, base_name: str) -> None:
        self._base_name = base_name
        self._hollow = _hollow(base)
        self._index = linear_numbers(self._hollow)

    def initial(self, config: FineTuningConfig) -> tuple[list[Target], State]:
        """The layers that a trial adapts, and the factors that `get_peft_model` gives them after seeding with its seed.

        Raises:
            ModelError: if no layer has one of the names, or one of them is no linear layer of the decoder.
        """
        adapted = self._adapted(config)
        other = self._other_layer(adapted)
        if other is not None:
            raise ModelError(other)
        return self._targets(adapted), {
            name: parameter.detach().float()
            for name, parameter in adapted.named_parameters()
            if parameter.requires_grad
        }

    def misfit(self, config: FineTuningConfig) -> str | None:
        """Why no bank can adapt the layers that a trial adapts, though a run of its own can; None if one can.

        Raises:
            ModelError: if no layer has one of the names.
        """
        return self._other_layer(self._adapted(config))

    def save(self, config: FineTuningConfig, weights: State, tokenizer: Any, folder: Path) -> None:
        """Writes `weights` as an ordinary PEFT folder with the tokenizer."""
        adapted = self._adapted(config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        save_adapter(adapted, tokenizer, folder)

    def _adapted(self, config: FineTuningConfig) -> Any:
        with torch.random.fork_rng(devices=[]):
            return add_lora(
                _hollow(self._hollow),
                rank=config.lora_r,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                target_modules=config.lora_target_modules,
                seed=config.seed,
                base=self._base_name,
                use_rslora=config.use_rslora,
            )

    def _targets(self, adapted: Any) -> list[Target]:
        return [
            Target(name, self._index[name], module.in_features, module.out_features)
            for name, module in _adapted_layers(adapted)
        ]

    def _other_layer(self, adapted: Any) -> str | None:
        """An adapted layer that is no linear one of the decoder, in words; None if there is none."""
        head = adapted.get_base_model().get_output_embeddings()
        for name, module in _adapted_layers(adapted):
            if name not in self._index or module is head:
                return (
                    f"lora_target_modules: {name} is no linear layer inside the decoder; packed trials adapt only those"
                )
        return None


def _adapted_layers(adapted: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")]


def _hollow(model: Any) -> Any:
    """A copy whose tensors have their shapes, but share one number each; quantized layers become plain ones."""
    stand_ins: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            stand_ins[id(module)] = _stand_in(module)
    for parameter in model.parameters():
        one = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        stand_ins[id(parameter)] = nn.Parameter(one, requires_grad=False)
    for buffer in model.buffers():
        stand_ins[id(buffer)] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return copy.deepcopy(model, stand_ins)


def _stand_in(quantized: nn.Linear) -> nn.Linear:
    # PEFT leaves adapters of quantized layers in fp32, as it does those of fp32 layers.
    plain = nn.Linear(quantized.in_features, quantized.out_features, bias=quantized.bias is not None, device="meta")
    plain.weight = nn.Parameter(torch.zeros(()).expand(plain.weight.shape), requires_grad=False)
    if plain.bias is not None:
        plain.bias = nn.Parameter(torch.zeros(()).expand(plain.bias.shape), requires_grad=False)
    return plain
