"""The training loop: plain Python that drives a learner through batches, and knows neither Ray nor DeepSpeed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from raytune_ft.core.errors import RunError
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.stopping import Patience

Metrics = dict[str, float]


class Decision(StrEnum):
    """What whoever watches the run wants next."""

    CONTINUE = "continue"
    STOP = "stop"


class Learner(Protocol):
    """Takes a batch and makes an optimizer step."""

    def step(self, batch: Any, step: int) -> Metrics:
        """Makes optimizer step `step` (from 1) and returns its loss (mean over supervised tokens) and more."""

    def evaluate(self) -> Metrics:
        """``eval_loss`` over the validation split."""


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended: its last step, why there, and the best evaluation."""

    steps: int
    reason: str
    best_step: int | None
    best_eval_loss: float | None
    metrics: Metrics


def fit(
    learner: Learner,
    batches: Iterable[Any],
    timetable: Timetable,
    *,
    start: int = 0,
    stopping: Patience | None = None,
    on_best: Callable[[int], None] = lambda step: None,
    on_save: Callable[[int], None] = lambda step: None,
    report: Callable[[int, Metrics], Decision] = lambda step, metrics: Decision.CONTINUE,
) -> TrainingSummary:
    """Makes the steps of a run that are left.

    Args:
        learner: makes the steps.
        batches: one item a step, from the step after `start`.
        timetable: when to evaluate and save.
        start: steps that were made before.
        stopping: early stopping; its state is kept by the caller across restarts.
        on_best: called after an evaluation that is the best so far.
        on_save: called when a checkpoint is due, after evaluation and report.
        report: told the metrics of each step; may ask to stop.

    Raises:
        RunError: if the loss is not a finite number.
    """
    stopping = stopping or Patience()
    step, metrics, reason = start, {}, "all steps made"
    for step, batch in enumerate(batches, start=start + 1):
        began = time.perf_counter()
        metrics = learner.step(batch, step)
        metrics["step_s"] = time.perf_counter() - began
        if not math.isfinite(metrics["loss"]):
            raise RunError(f"the loss of step {step} is {metrics['loss']}: lower learning_rate, or look at the data")
        if timetable.evaluates(step):
            metrics |= learner.evaluate()
            if stopping.improved(metrics["eval_loss"], step):
                on_best(step)
        decision = report(step, metrics)
        if timetable.saves(step):
            on_save(step)
        if decision is Decision.STOP:
            reason = "asked to stop"
            break
        if stopping.spent:
            reason = f"no lower validation loss in {stopping.patience} evaluations"
            break
        if step >= timetable.total:
            break
    best = stopping.best_step or None
    return TrainingSummary(step, reason, best, stopping.best if best else None, metrics)
