"""The base's linear layers, taught to add each trial's product while a pass runs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from raytune_ft.training.bank.slot import Target

_SEAT = "_seat_of_passes"


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

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """The layer alone: no pass runs in a copy."""
        return copy.deepcopy(self.base, memo)

    def belongs_to(self, seat: PassSeat) -> bool:
        """Whether it is passes of `seat` that it computes."""
        return self._seat is seat


class PassSeat:
    """Where the layers of one base find the pass that runs in their thread; wraps the layers that some trial adapts.

    A base has one seat: a new one takes over, and passes of the former are refused from then on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._here = threading.local()
        self._key = model.__dict__[_SEAT] = object()

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
            if isinstance(layer, PackedLinear) and layer.belongs_to(self):
                continue
            bare = layer.base if isinstance(layer, PackedLinear) else layer
            setattr(parent, child, PackedLinear(bare, target, self))

    @contextmanager
    def runs(self, running: Pass) -> Iterator[None]:
        """Within the block the layers compute `running`.

        Raises:
            RuntimeError: if another bank took the base over.
        """
        if self._model.__dict__[_SEAT] is not self._key:
            raise RuntimeError("this bank's base was given to another bank; a base serves one at a time")
        self._here.running = running
        try:
            yield
        finally:
            self._here.running = None
