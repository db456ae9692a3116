"""A trial's numbers in a bank of stacked adapters: where its factors lie, and what it holds at its own rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytune_ft.training.bank.slot import SlotSettings, SlotState, State, Target

_BLOCK = 1 << 17
"""Most numbers of one rank in a block, unless one layer has more."""
_ALIGNED = 8  # grouped products want rows of whole 16 bytes, also in bf16

Blocks = list[Tensor]
Factors = dict[str, tuple[Tensor, Tensor]]
"""By layer: A [..., rank, inputs] and B transposed [..., rank, outputs], as views."""


class FactorPlan:
    """Where the factors of each target lie: in blocks, at places in the numbers of one rank.

    A block of all trials is small enough for 32-bit indices, beyond which kernels are launched in pieces.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.targets = tuple(targets)
        self.widths: list[int] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        for target in self.targets:
            inputs, outputs = aligned(target.inputs), aligned(target.outputs)
            if not self.widths or self.widths[-1] + inputs + outputs > _BLOCK:
                self.widths.append(0)
            start = self.widths[-1]
            self._places[target.name] = len(self.widths) - 1, start, start + inputs
            self.widths[-1] += inputs + outputs

    def zeros(self, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Blocks:
        """Blocks [*shape, width]."""
        return [torch.zeros(*shape, width, device=device, dtype=dtype) for width in self.widths]

    def views(self, blocks: Blocks) -> Factors:
        """The factors in `blocks` [..., rank, width]."""
        found = {}
        for target in self.targets:
            block, a, b = self._places[target.name]
            numbers = blocks[block]
            found[target.name] = numbers.narrow(-1, a, target.inputs), numbers.narrow(-1, b, target.outputs)
        return found


def aligned(size: int) -> int:
    """`size`, or a little more: what grouped products take."""
    return -(-size // _ALIGNED) * _ALIGNED


class StackedSlot:
    """A trial's factors and moments, in blocks [rank, width], and the number of steps made."""

    def __init__(self, settings: SlotSettings, plan: FactorPlan, state: SlotState, device: torch.device) -> None:
        self.settings, self._plan = settings, plan
        self.weights, self.exp_avg, self.exp_avg_sq = (plan.zeros(settings.rank, device=device) for _ in range(3))
        self.steps = torch.tensor(float(state.step), device=device)
        for blocks, tensors in (
            (self.weights, state.weights),
            (self.exp_avg, state.exp_avg),
            (self.exp_avg_sq, state.exp_avg_sq),
        ):
            views = plan.views(blocks)
            for target in settings.targets if tensors else ():
                a, b = (tensors[name] for name in target.factors)
                views[target.name][0].copy_(a)
                views[target.name][1].copy_(b.t())

    def read(self, device: torch.device | str) -> SlotState:
        """A copy on `device`."""
        step = int(self.steps)
        weights = self.named(self.weights, device)
        if not step:
            return SlotState.initial(weights)
        return SlotState(weights, self.named(self.exp_avg, device), self.named(self.exp_avg_sq, device), step)

    def named(self, blocks: Blocks, device: torch.device | str) -> State:
        """Copies on `device`, by PEFT's names."""
        views = self._plan.views([numbers.to(device, copy=True) for numbers in blocks])
        state: State = {}
        for target in self.settings.targets:
            a, b = views[target.name]
            state |= zip(target.factors, (a, b.t()), strict=True)
        return state
