"""When a run ends before its last step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Patience:
    """Early stopping: remembers the lowest validation loss and counts the evaluations since.

    `patience` None never stops.
    """

    patience: int | None = None
    best: float = math.inf
    best_step: int = 0
    waited: int = 0

    def improved(self, loss: float, step: int) -> bool:
        """Takes in an evaluation; whether it is the best so far."""
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def spent(self) -> bool:
        """Whether there were `patience` evaluations without improvement."""
        return self.patience is not None and self.waited >= self.patience
