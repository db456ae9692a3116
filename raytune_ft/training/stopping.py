"""When a run ends before its last step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.grammar import number_of
from raytune_ft.training.goal import LOSS, Goal


@dataclass
class Patience:
    """Early stopping: remembers the best evaluation and counts those since.

    `patience` None never stops; `goal` says what makes an evaluation the best.
    """

    patience: int | None = None
    goal: Goal = LOSS
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def improved(self, value: float, step: int) -> bool:
        """Takes in the goal's value in an evaluation; whether it is the best so far, which no infinite one is."""
        best = self.goal.worst if self.best is None else self.best
        if math.isfinite(value) and self.goal.cost(value) < self.goal.cost(best):
            self.best, self.best_step, self.waited = value, step, 0
            return True
        self.waited += 1
        return False

    @property
    def spent(self) -> bool:
        """Whether there were `patience` evaluations without improvement."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def reason(self) -> str:
        """Why it ends the run, once it is spent."""
        return (
            f"no {'higher' if self.goal.higher else 'lower'} {self.goal.title} in "
            f"{number_of(self.patience or 0, 'evaluation')}"
        )

    def remembered(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON-ready."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}
