"""What the replicas of an endpoint have to agree on: which adapters there are, and what each replica counts."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Protocol

from raytune_ft.serving.metrics import Series

_FORGOTTEN_AFTER_S = 15.0


@dataclass(frozen=True)
class Posted:
    """The state of the board: the adapters that every replica should have, and the other replicas' series."""

    epoch: str
    adapters: dict[str, str]
    others: list[Series]


class Bulletin(Protocol):
    """A board as a replica reaches it."""

    async def report(self, replica: str, epoch: str | None, adapters: dict[str, str], series: Series) -> Posted:
        """See `Board.report`."""

    async def post(self, name: str, reference: str) -> None:
        """See `Board.post`."""

    async def take_down(self, name: str) -> None:
        """See `Board.take_down`."""


class Board:
    """One for all replicas. It forgets nothing by dying: replicas tell a successor (another epoch) what they have
    loaded beside their settings' adapters."""

    def __init__(self, adapters: dict[str, str]) -> None:
        self.epoch = secrets.token_hex(8)
        self._adapters = dict(adapters)
        self._taken_down: set[str] = set()
        self._series: dict[str, tuple[float, Series]] = {}

    async def report(self, replica: str, epoch: str | None, adapters: dict[str, str], series: Series) -> Posted:
        """Takes a replica's figures, and tells it what there is."""
        if epoch is not None and epoch != self.epoch:
            new = {name: where for name, where in adapters.items() if name not in self._taken_down}
            self._adapters = {**new, **self._adapters}
        now = time.monotonic()
        self._series[replica] = (now, series)
        self._series = {name: entry for name, entry in self._series.items() if now - entry[0] < _FORGOTTEN_AFTER_S}
        others = [entry[1] for name, entry in self._series.items() if name != replica]
        return Posted(self.epoch, dict(self._adapters), others)

    async def post(self, name: str, reference: str) -> None:
        """Adds an adapter that every replica should have."""
        self._taken_down.discard(name)
        self._adapters[name] = reference

    async def take_down(self, name: str) -> None:
        """Takes an adapter away from every replica."""
        self._taken_down.add(name)
        self._adapters.pop(name, None)
