"""Memory that runs out: how it is told, given back, and asked for less of."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch's CPU allocator, or in Python."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release_memory() -> None:
    """Gives back what a failed step held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class TokenBudget:
    """Most tokens that are computed at the same time; halved whenever memory runs out, and kept so."""

    tokens: int = 8192

    def halve(self, shortest: int) -> bool:
        """Makes it smaller; false where that changes nothing: not even two rows of the `shortest` length fit in it."""
        if self.tokens < 2 * shortest:
            return False
        self.tokens //= 2
        return True
