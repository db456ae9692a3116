"""The base's linear layers, taught to add each trial's product while a pass runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from raytune_ft.training.bank.slot import Target


class Pass(Protocol):
    """What the adapted layers compute while one batch goes through the base."""

    def linear(self, base: Any, target: Target, x: Tensor) -> Tensor:
        """`base` of x, plus each trial's low-rank product for its own tokens."""


class PackedLinear(nn.Module):
    """A frozen linear layer; while a pass runs, the pass computes it."""

    def __init__(self, base: nn.Module, target: Target, seat: PassSeat) -> None:
        super().__init__()
        self.base = base
        self._target, self._seat = target, seat

    @property
    def weight(self) -> Tensor:
        """The frozen weight: some models look at its number format."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        if self._seat.running is None:
            return self.base(x)  # type: ignore[no-any-return]
        return self._seat.running.linear(self.base, self._target, x)


class PassSeat:
    """Where the layers of one base find the pass that runs in their thread; wraps the layers that some trial adapts."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._here = threading.local()

    @property
    def running(self) -> Pass | None:
        """The pass that runs in this thread."""
        return getattr(self._here, "running", None)

    def wrap(self, targets: Iterable[Target]) -> None:
        """Makes the layers of `targets` packed; those that are already stay as they are."""
        for target in targets:
            parent_name, _, child = target.name.rpartition(".")
            parent = self._model.get_submodule(parent_name)
            layer = parent.get_submodule(child)
            if not isinstance(layer, PackedLinear):
                setattr(parent, child, PackedLinear(layer, target, self))

    @contextmanager
    def runs(self, running: Pass) -> Iterator[None]:
        """Within the block the layers compute `running`."""
        self._here.running = running
        try:
            yield
        finally:
            self._here.running = None
