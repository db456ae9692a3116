"""A graceful stop: SIGTERM to any worker, or a request from outside, ends a run after the current step, saved.

A signal handler only notes; the loop asks after each step, and all ranks agree before they leave.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from types import FrameType

_noted = threading.Event()


def note_sigterm() -> None:
    """Makes SIGTERM a wish to stop; has to be called in the process's main thread."""
    _noted.clear()
    signal.signal(signal.SIGTERM, _note)


def _note(signum: int, frame: FrameType | None) -> None:
    _noted.set()


def is_noted() -> bool:
    """Whether SIGTERM came."""
    return _noted.is_set()


def agreed(wanted: Callable[[], bool], device: str, world_size: int) -> bool:
    """Whether any rank wants to stop; under several ranks all have to call it, after the same step."""
    mine = wanted()
    if world_size == 1:
        return mine
    import torch

    flag = torch.tensor([int(mine)], device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


class StopBoard:
    """What a driver and its run's workers tell each other about the end: an actor, whose process should load nothing
    heavy."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._asking = 0
        self._at_end: set[int] = set()
        self._not_stored: Exception | None = None

    async def request(self) -> bool:
        """Asks the run to stop; returns whether a worker is there that heeds it."""
        self._event.set()
        return self._asking > 0

    async def requested(self) -> bool:
        """True, as soon as the run shall stop."""
        self._asking += 1
        try:
            return await self._event.wait()
        finally:
            self._asking -= 1

    async def begins(self, rank: int) -> Exception | None:
        """Notes that a rank is at work (again); what storage did not take of an earlier attempt, None if nothing."""
        self._at_end.discard(rank)
        return self._not_stored

    async def ends(self, rank: int) -> None:
        """Notes that a rank has done its part."""
        self._at_end.add(rank)

    async def all_end(self, rank: int, world_size: int, timeout_s: float = 10.0) -> bool:
        """Whether within `timeout_s` every rank has done its part, or says that the run cannot be carried out; all that
        ask learn the same."""
        self._at_end.add(rank)
        deadline = asyncio.get_running_loop().time() + timeout_s
        while len(self._at_end) < world_size:
            if asyncio.get_running_loop().time() > deadline:
                self._at_end.discard(rank)
                return False
            await asyncio.sleep(0.05)
        return True

    async def note_not_stored(self, error: Exception) -> None:
        """Notes what storage did not take; a disk that is full has no room for the word either."""
        self._not_stored = error

    async def not_stored(self) -> Exception | None:
        """What was noted; None if nothing was."""
        return self._not_stored
