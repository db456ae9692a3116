"""What one trial's adapter is made of, and how its factors lie in one flat vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from raytune_ft.models.adapter_slots import Factors
from raytune_ft.training.config import FineTuningConfig

State = dict[str, Tensor]
"""Tensors by PEFT's parameter names."""


@dataclass(frozen=True)
class Target:
    """A linear layer of the base; `index` is its place among all linear layers, whoever adapts them."""

    name: str
    index: int
    inputs: int
    outputs: int

    @property
    def factors(self) -> tuple[str, str]:
        """PEFT's names of the two factors: A [rank, inputs] and B [outputs, rank]."""
        stem = f"base_model.model.{self.name}"
        return f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight"


@dataclass(frozen=True)
class SlotSettings:
    """What the arithmetic of a trial's steps depends on, besides its learning rate."""

    targets: tuple[Target, ...]
    rank: int
    scale: float
    dropout: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    max_grad_norm: float

    @cached_property
    def size(self) -> int:
        """Numbers in the factors of all targets."""
        return sum(self.rank * (target.inputs + target.outputs) for target in self.targets)

    def factors(self, weights: State) -> Factors:
        """A and scaled B of every target, of a slot with these weights."""
        found = {}
        for target in self.targets:
            a, b = target.factors
            found[target.name] = weights[a], weights[b] * self.scale
        return found

    @classmethod
    def of(cls, config: FineTuningConfig, targets: Sequence[Target]) -> SlotSettings:
        """The settings of a trial that adapts `targets`."""
        return cls(
            targets=tuple(targets),
            rank=config.lora_r,
            scale=config.lora_alpha / (math.sqrt(config.lora_r) if config.use_rslora else config.lora_r),
            dropout=config.lora_dropout,
            betas=(config.adam_beta1, config.adam_beta2),
            epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )


@dataclass(frozen=True)
class SlotState:
    """Copies of a slot's numbers on the CPU: weights, Adam's moments (none before the first step), and steps made."""

    weights: State
    exp_avg: State
    exp_avg_sq: State
    step: int

    @classmethod
    def initial(cls, weights: State) -> SlotState:
        """A slot that has made no step."""
        return cls(weights, {}, {}, 0)


def factor_views(flat: Tensor, targets: Sequence[Target], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of each target as views: [size] to A [rank, inputs] and B [outputs, rank].

    B lies with its longer side inside, as products do that add to its gradient (`low_rank.narrow_product`).
    """
    views = {}
    start = 0
    for target in targets:
        middle = start + rank * target.inputs
        stop = middle + rank * target.outputs
        a = flat[start:middle].view(rank, target.inputs)
        b = flat[middle:stop].view(rank, target.outputs).t()
        views[target.name] = (a, b)
        start = stop
    return views
