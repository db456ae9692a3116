"""What the replicas of an endpoint have to agree on: which adapters there are, and what each replica counts."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Protocol

from raytune_ft.serving.metrics import Series

_FORGOTTEN_AFTER_S = 15.0


@dataclass(frozen=True)
class Posting:
    """What was last said of an adapter's name: where it is to be loaded from, or (None) that it is dropped."""

    reference: str | None
    version: int = 0
    """Grows with everything that is said; 0 is what the settings say."""


@dataclass(frozen=True)
class Posted:
    """The state of the board: what was last said of each adapter's name, and the other replicas' series."""

    epoch: str
    postings: dict[str, Posting]
    others: list[Series]

    @property
    def adapters(self) -> dict[str, str]:
        """The adapters that every replica should have, and where they are."""
        return {name: said.reference for name, said in self.postings.items() if said.reference is not None}


class Bulletin(Protocol):
    """A board as a replica reaches it."""

    async def report(self, replica: str, epoch: str | None, known: dict[str, Posting], series: Series) -> Posted:
        """See `Board.report`."""

    async def post(self, name: str, reference: str) -> Posting:
        """See `Board.post`."""

    async def take_down(self, name: str) -> Posting:
        """See `Board.take_down`."""


class Board:
    """One for all replicas. It forgets nothing by dying: replicas tell a successor (another epoch) what they know, and
    of what was said of one name the last counts.

    `settings` names the settings that it was made from. Under other ones than the replicas' own, what was said before
    of an adapter that they name does not count.
    """

    def __init__(self, adapters: dict[str, str], settings: str = "") -> None:
        self.epoch = f"{settings}:{secrets.token_hex(8)}"
        self._own = set(adapters)
        self._postings = {name: Posting(reference) for name, reference in adapters.items()}
        self._series: dict[str, tuple[float, Series]] = {}

    async def report(self, replica: str, epoch: str | None, known: dict[str, Posting], series: Series) -> Posted:
        """Takes a replica's figures, and tells it what there is."""
        if epoch is not None and epoch != self.epoch:
            same = epoch.rpartition(":")[0] == self.epoch.rpartition(":")[0]
            for name, said in known.items():
                newer = said.version > self._postings.get(name, Posting(None)).version
                if newer and (same or name not in self._own):
                    self._postings[name] = said
        now = time.monotonic()
        self._series[replica] = (now, series)
        self._series = {name: entry for name, entry in self._series.items() if now - entry[0] < _FORGOTTEN_AFTER_S}
        others = [entry[1] for name, entry in self._series.items() if name != replica]
        return Posted(self.epoch, dict(self._postings), others)

    async def post(self, name: str, reference: str) -> Posting:
        """Adds an adapter that every replica should have, also in the place of another one of this name."""
        return self._said(name, reference)

    async def take_down(self, name: str) -> Posting:
        """Takes an adapter away from every replica."""
        return self._said(name, None)

    def _said(self, name: str, reference: str | None) -> Posting:
        latest = max((said.version for said in self._postings.values()), default=0)
        # By the clock, so that a successor that knows little yet does not count from the beginning again.
        self._postings[name] = Posting(reference, max(latest + 1, time.time_ns()))
        return self._postings[name]
