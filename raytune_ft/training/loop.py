"""The training loop: plain Python that drives a learner through batches, and knows neither Ray nor DeepSpeed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from raytune_ft.core.errors import InfeasibleError
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.stopping import Patience

Metrics = dict[str, float]


class Decision(StrEnum):
    """What whoever watches the run wants next."""

    CONTINUE = "continue"
    STOP = "stop"
    LEAVE = "leave"
    """Save a checkpoint and end, to go on later."""


class NotFiniteError(InfeasibleError):
    """A loss or gradient norm that is no finite number: the weights are lost from this step on."""

    def __init__(self, step: int, metrics: Metrics, last_good: str = "") -> None:
        self.step, self.metrics, self.last_good = step, metrics, last_good
        what = f"the loss of step {step} is {metrics['loss']}"
        if math.isfinite(metrics["loss"]):
            what = f"the gradient norm of step {step} is {metrics['grad_norm']}"
        words = f"{what}: lower learning_rate, set a smaller max_grad_norm, or look at the data. {last_good}"
        super().__init__(words.strip())

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[int, Metrics, str]]:
        return type(self), (self.step, self.metrics, self.last_good)


class Learner(Protocol):
    """Takes a batch and makes an optimizer step."""

    def step(self, batch: Any, step: int) -> Metrics:
        """Makes optimizer step `step` (from 1) and returns its loss (mean over supervised tokens) and more."""

    def evaluate(self) -> Metrics:
        """``eval_loss`` over the validation split, and what else is measured on it."""


def with_perplexity(evaluated: Metrics) -> Metrics:
    """An evaluation with ``eval_perplexity``, the exponential of its loss; infinite where that is beyond all floats."""
    try:
        return {**evaluated, "eval_perplexity": math.exp(evaluated["eval_loss"])}
    except OverflowError:
        return {**evaluated, "eval_perplexity": math.inf}


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended: its last step, why there, and the best evaluation."""

    steps: int
    reason: str
    best_step: int | None
    best: float | None
    metric: str
    """What the best evaluation is the best by."""
    metrics: Metrics
    left: bool = False
    """Whether it was left before its end, with a checkpoint to go on from."""


def fit(
    learner: Learner,
    batches: Iterable[Any],
    timetable: Timetable,
    *,
    start: int = 0,
    last: Metrics | None = None,
    stopping: Patience | None = None,
    on_best: Callable[[int], None] = lambda step: None,
    on_save: Callable[[int], None] = lambda step: None,
    note: Callable[[int, Metrics], None] = lambda step, metrics: None,
    report: Callable[[int, Metrics], Decision] = lambda step, metrics: Decision.CONTINUE,
) -> TrainingSummary:
    """Makes the steps of a run that are left; of a run that was at its end, none.

    Args:
        learner: makes the steps.
        batches: one item a step, from the step after `start`.
        timetable: when to evaluate and save.
        start: steps that were made before.
        last: the metrics of step `start`; they are reported again, since the run may have broken off before they were.
        stopping: early stopping; its state is kept by the caller across restarts.
        on_best: called after an evaluation that is the best so far.
        on_save: called when a checkpoint is due, after evaluation and note.
        note: told the metrics of each step, so that a checkpoint of it holds them.
        report: told the metrics of each step, after the save that was due; may ask to stop.

    Raises:
        NotFiniteError: if the loss or the gradient norm is not a finite number.
    """
    stopping = stopping or Patience()
    step, metrics = start, dict(last or {})
    over = _why_over(report(start, metrics), start, timetable, stopping) if start else None
    for step, batch in enumerate(batches, start=start + 1) if over is None else ():
        began = time.perf_counter()
        metrics = learner.step(batch, step)
        metrics["step_s"] = time.perf_counter() - began
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics.get("grad_norm", 0.0)):
            raise NotFiniteError(step, metrics)
        if timetable.evaluates(step):
            metrics |= learner.evaluate()
            if stopping.improved(metrics[stopping.goal.metric], step):
                on_best(step)
        note(step, metrics)
        if timetable.saves(step):
            on_save(step)
        over = _why_over(report(step, metrics), step, timetable, stopping)
        if over is _LEFT and not timetable.saves(step):
            on_save(step)
        if over is not None:
            break
    best = stopping.best_step or None, stopping.best, stopping.goal.metric
    return TrainingSummary(step, over or _ALL_MADE, *best, metrics, over is _LEFT)


_LEFT, _ALL_MADE = "asked to leave", "all steps made"


def _why_over(decision: Decision, step: int, timetable: Timetable, stopping: Patience) -> str | None:
    """Why a run ends after `step`, in words; None if it does not."""
    if decision is Decision.LEAVE and step < timetable.total and not stopping.spent:
        return _LEFT
    if decision is Decision.STOP:
        return "asked to stop"
    if stopping.spent:
        return stopping.reason
    return _ALL_MADE if step >= timetable.total else None
