"""The trials of a running sweep, to look at: a table that stays in place on a terminal, a line for each in a log."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table

from raytune_ft.training.goal import Goal

logger = logging.getLogger("raytune_ft")

_SHOWN = 24


@dataclass
class Row:
    """What a trial said last; `best` is its best value of the metric, `last_step` where it ends if nothing stops it."""

    label: str
    state: str = "waiting"
    step: int = 0
    last_step: int = 0
    value: float = math.nan
    best: float = math.nan


class SweepView:
    """Hears of trials and shows them."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._goal = Goal.of(metric)
        self.rows: dict[str, Row] = {}
        self._live: Live | None = None

    def hear(
        self, name: str, label: str, *, state: str, step: int = 0, last_step: int = 0, value: float = math.nan
    ) -> None:
        """Takes note of a trial; without a terminal its news is a line of the log."""
        row = self.rows.setdefault(name, Row(label))
        row.state = state
        if step:
            row.step, row.last_step, row.value = step, last_step, value
            better = not self._goal.cost(row.best) <= self._goal.cost(value)
            if math.isfinite(value) and (better or self.metric == "loss"):  # of batches, the newest tells most
                row.best = value
        if self._shown():
            return
        if state == "failed":
            logger.warning("trial %s: failed", label)
        elif step and state == "running":
            logger.info("trial %s: step %d, %s", label, step, self._told("", value))
        elif state not in {"running", "waiting"}:
            logger.info("trial %s: %s at step %d, %s", label, state, row.step, self._told("best ", row.best))

    def _told(self, which: str, value: float) -> str:
        return f"{which}{self.metric} {value:.4f}" if math.isfinite(value) else f"without {self.metric}"

    def table(self) -> Table:
        """The trials, the best first; those beyond the first 24 are counted."""
        table = Table("trial", "state", "step", self.metric, "best", box=None, pad_edge=False)
        ranked = sorted(self.rows.values(), key=self._place)
        for row in ranked[:_SHOWN]:
            step = f"{row.step}/{row.last_step}" if row.last_step else str(row.step)
            table.add_row(row.label, row.state, step, _number(row.value), _number(row.best))
        if len(ranked) > _SHOWN:
            table.add_row(f"and {len(ranked) - _SHOWN} more")
        return table

    def _place(self, row: Row) -> tuple[float, str]:
        return (self._goal.cost(row.best) if math.isfinite(row.best) else math.inf), row.label

    def close(self) -> None:
        """Leaves the last table on the terminal."""
        if self._live is not None:
            self._live.update(self.table(), refresh=True)
            self._live.stop()
            self._live = None

    def _shown(self) -> bool:
        if self._live is None:
            console = _terminal()
            if console is None:
                return False
            self._live = Live(console=console, auto_refresh=False)
            self._live.start()
        self._live.update(self.table(), refresh=True)
        return True


def _terminal() -> Console | None:
    """The console that our lines go to, if it is a terminal."""
    for handler in logger.handlers:
        if isinstance(handler, RichHandler) and handler.console.is_terminal:
            return handler.console
    return None


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"
