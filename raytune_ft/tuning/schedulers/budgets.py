"""What ends a search before its trials do."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.stopper import CombinedStopper, Stopper

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.schedulers.memory import recalled, remember


class TokenBudget(Stopper):  # type: ignore[misc]  # Ray's classes count as Any
    """Stops all trials once they have trained on `most` tokens together; what they did is kept in the file `memory`.

    About `first` of these are kept for each of the `trials` that was not evaluated yet: every one is, once.
    """

    def __init__(self, memory: Location, most: int, first: int = 0, trials: int = 0) -> None:
        self._memory, self._most, self._first, self._trials = memory, most, first, trials
        self._known: dict[str, float] | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Ray Tune's hook: whether the trial that reported `result` stops."""
        self._spent[trial_id] = float(result.get("tokens", 0.0))
        remember(self._memory, self._spent)
        waiting = self._trials - len(self._spent)
        next_ones = self._first * (waiting + 1) if waiting > 0 else 0  # its own next evaluation, and their first ones
        return sum(self._spent.values()) + next_ones >= self._most

    def stop_all(self) -> bool:
        """Ray Tune's hook: whether the budget is spent, and every trial was evaluated."""
        return len(self._spent) >= self._trials and sum(self._spent.values()) >= self._most

    @property
    def _spent(self) -> dict[str, float]:
        """Tokens by the trial's id, those of trials that ended before this driver began among them."""
        if self._known is None:
            self._known = recalled(self._memory) or {}
        return self._known


class HourBudget(Stopper):  # type: ignore[misc]  # Ray's classes count as Any
    """Stops all trials after so many hours of search, those of earlier drivers among them (Ray's own forgets these)."""

    def __init__(self, memory: Location, hours: float) -> None:
        self._memory, self._hours = memory, hours
        self._began: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Ray Tune's hook: a trial by itself has no limit; how long the search has taken is kept in the file."""
        remember(self._memory, self._seconds())
        return False

    def stop_all(self) -> bool:
        """Ray Tune's hook: whether the time is over."""
        return self._seconds() >= 3600 * self._hours

    def _seconds(self) -> float:
        if self._began is None:
            self._began = time.monotonic() - (recalled(self._memory) or 0.0)
        return time.monotonic() - self._began


def limits(config: SweepConfig, memory: Location, first: int) -> Stopper | None:
    """What ends the search before its trials do, as far as the settings limit it.

    Args:
        config: the sweep's.
        memory: folder of files in which it is kept what was spent.
        first: about how many tokens take a trial to its first evaluation.
    """
    found = list[Stopper]()
    if config.max_tokens:
        found.append(TokenBudget(memory / "tokens.json", config.max_tokens, first, config.trials))
    if config.max_hours:
        found.append(HourBudget(memory / "seconds.json", config.max_hours))
    return CombinedStopper(*found) if found else None
