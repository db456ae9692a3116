"""One trial of a bank: where it stands, and what comes next; all of it a function of its settings and its step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from raytune_ft.models.chat import Encoded
from raytune_ft.training.bank.slot import State
from raytune_ft.training.batches import Rows, step_rows
from raytune_ft.training.checkpoint import Checkpoint
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.loop import Metrics
from raytune_ft.training.schedule import Timetable, learning_rate_at
from raytune_ft.training.stopping import Patience


class Status(StrEnum):
    """Whether a trial goes on."""

    RUNNING = "running"
    FINISHED = "finished"
    INFEASIBLE = "infeasible"


@dataclass(frozen=True)
class Progress:
    """A trial's optimizer step: its metrics (with those of an evaluation where due), and whether it goes on."""

    name: str
    step: int
    metrics: Metrics
    status: Status
    reason: str


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, and their numbers."""

    numbers: list[int]
    rows: list[Encoded]


@dataclass
class Trial:
    """A trial's settings and state, except its tensors."""

    name: str
    config: FineTuningConfig
    timetable: Timetable
    train: Rows
    rows_per_item: int = 1
    step: int = 0
    status: Status = Status.RUNNING
    reason: str = ""
    patience: Patience = field(init=False)
    history: list[dict[str, float]] = field(default_factory=list)
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """What was trained with before, by it or by those whose states it went on from: `config`, and the step `until`."""
    best: State | None = None
    _order: Iterator[list[int]] | None = None
    _upcoming: StepRows | None = None
    _ahead: StepRows | None = None

    def __post_init__(self) -> None:
        self.patience = Patience(self.config.early_stopping_patience, self.config.goal)

    def upcoming(self) -> StepRows:
        """The rows of the next step."""
        if self._upcoming is None:
            self._upcoming = self._next_rows()
        return self._upcoming

    def look_ahead(self) -> None:
        """Reads the rows of the step after the next one, for when the device is at work on the next one."""
        self.upcoming()
        if self._ahead is None and self.step + 1 < self.timetable.total:
            self._ahead = self._next_rows()

    def _next_rows(self) -> StepRows:
        each = self.rows_per_item
        if self._order is None:
            items = len(self.train) // each
            self._order = step_rows(items, self.config.global_batch_size, self.config.seed, start=self.step)
        numbers = [each * item + place for item in next(self._order) for place in range(each)]
        return StepRows(numbers, [self.train[number] for number in numbers])

    @property
    def tokens(self) -> int:
        """Tokens of the next step."""
        return sum(len(row.input_ids) for row in self.upcoming().rows)

    def rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate_at(
            self.step + 1,
            self.timetable.total,
            peak=self.config.learning_rate,
            warmup=self.timetable.warmup,
            kind=self.config.lr_scheduler_type,
        )

    def advance(self, metrics: Metrics) -> None:
        """Takes in the metrics of the step that was made; a loss that is no finite number makes it infeasible."""
        self.step += 1
        self._upcoming, self._ahead = self._ahead, None
        self.history.append({"step": self.step, **metrics})
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            what = "loss" if not math.isfinite(metrics["loss"]) else "gradient norm"
            value = metrics["loss" if what == "loss" else "grad_norm"]
            self.fail(f"the {what} of step {self.step} is {value}")
        elif self.step >= self.timetable.total:
            self.finish("all steps made")

    @property
    def owes_evaluation(self) -> bool:
        """Whether an evaluation is due after the last step and was not made yet."""
        if self.status is Status.INFEASIBLE or not self.history or not self.timetable.evaluates(self.step):
            return False
        return "eval_loss" not in self.history[-1]

    def evaluated(self, metrics: Metrics) -> bool:
        """Takes in an evaluation after the last step; whether it is the best so far."""
        self.history[-1] |= metrics
        if not math.isfinite(metrics["eval_loss"]):
            self.fail(f"the validation loss of step {self.step} is {metrics['eval_loss']}")
            return False
        improved = self.patience.improved(metrics[self.patience.goal.metric], self.step)
        if self.patience.spent and self.status is Status.RUNNING:
            self.finish(self.patience.reason)
        return improved

    def finish(self, reason: str) -> None:
        """The trial made its last step."""
        self.status, self.reason = Status.FINISHED, reason

    def fail(self, reason: str) -> None:
        """The trial can't go on; its curve stays."""
        self.status, self.reason = Status.INFEASIBLE, reason

    def progress(self) -> Progress:
        """The last step as a report; step 0 without metrics, if there was none."""
        row = dict(self.history[-1]) if self.history else {"step": 0.0}
        return Progress(self.name, int(row.pop("step")), row, self.status, self.reason)

    def remembered(self) -> dict[str, Any]:
        """What a snapshot keeps besides tensors; JSON-ready but for numbers that are not finite."""
        history = [dict(row) for row in self.history]  # the trial steps on while its snapshot is written
        status = {"status": self.status, "reason": self.reason}
        return {"history": history, "earlier": self.earlier, "patience": self.patience.remembered(), **status}

    def recall(self, snapshot: Checkpoint) -> None:
        """Stands where a snapshot says, its own or a donor's.

        With settings of more steps, a finished trial goes on; one whose last step is not beyond the snapshot is over.
        """
        kept = snapshot.progress
        self.step = snapshot.step
        self.history = [dict(row) for row in kept["history"]]
        self.earlier = list(kept.get("earlier", []))
        if kept["config"] != self.config.resolved():
            self.earlier.append({"until": snapshot.step, "config": kept["config"]})
        self.patience = Patience(self.config.early_stopping_patience, self.config.goal, **kept["patience"])
        self.best = {
            key.removeprefix("best."): tensor for key, tensor in snapshot.moments.items() if key.startswith("best.")
        } or None
        self.status, self.reason = Status(kept["status"]), kept["reason"]
        if self.status is Status.FINISHED and self.step < self.timetable.total and not self.patience.spent:
            self.status, self.reason = Status.RUNNING, ""
        elif self.status is Status.RUNNING and self.step >= self.timetable.total:
            self.finish(f"goes on from step {self.step}, and its last is {self.timetable.total}")


def longest_of(rows: Rows, together: int) -> int:
    """Tokens of the longest of these rows, of which so many neighbours belong together."""
    lengths = [len(rows[number].input_ids) for number in range(len(rows))]
    return max(sum(lengths[start : start + together]) for start in range(0, len(lengths), together))
