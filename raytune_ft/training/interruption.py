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
    """Where a driver says that its run shall stop: an actor, whose process should load nothing heavy."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def request(self) -> None:
        """Asks the run to stop."""
        self._event.set()

    async def requested(self) -> bool:
        """True, as soon as the run shall stop."""
        return await self._event.wait()
