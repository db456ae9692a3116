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
        NotFiniteError: if the loss or the gradient norm is not a finite number.
    """
    stopping = stopping or Patience()
    step, metrics, reason, left = start, {}, "all steps made", False
    for step, batch in enumerate(batches, start=start + 1):
        began = time.perf_counter()
        metrics = learner.step(batch, step)
        metrics["step_s"] = time.perf_counter() - began
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics.get("grad_norm", 0.0)):
            raise NotFiniteError(step, metrics)
        if timetable.evaluates(step):
            metrics |= with_perplexity(learner.evaluate())
            if stopping.improved(metrics[stopping.goal.metric], step):
                on_best(step)
        decision = report(step, metrics)
        left = decision is Decision.LEAVE and step < timetable.total and not stopping.spent
        if timetable.saves(step) or left:
            on_save(step)
        if left:
            reason = "asked to leave"
            break
        if decision is Decision.STOP:
            reason = "asked to stop"
            break
        if stopping.spent:
            reason = stopping.reason
            break
        if step >= timetable.total:
            break
    return TrainingSummary(step, reason, stopping.best_step or None, stopping.best, stopping.goal.metric, metrics, left)
