"""The loop with a learner that only plays back losses."""

from __future__ import annotations

import itertools

import pytest

from raytune_ft.core.errors import RunError
from raytune_ft.training.loop import Decision, Metrics, fit
from raytune_ft.training.schedule import Timetable
from raytune_ft.training.stopping import Patience


class Playback:
    """Gives the losses of a list, and validation losses of another."""

    def __init__(self, losses: list[float], validation: list[float] | None = None) -> None:
        self.losses, self.validation = losses, iter(validation or [])
        self.seen: list[object] = []

    def step(self, batch: object, step: int) -> Metrics:
        self.seen.append(batch)
        return {"loss": self.losses[step - 1]}

    def evaluate(self) -> Metrics:
        return {"eval_loss": next(self.validation)}


def table(total: int, *, evaluate: int | None = None, save: int | None = None) -> Timetable:
    return Timetable(total, total, 0, evaluate, save, 1)


def test_all_steps_are_made_and_no_more() -> None:
    learner = Playback([3, 2, 1])
    summary = fit(learner, itertools.count(), table(3))
    assert (summary.steps, summary.reason, summary.best_step) == (3, "all steps made", None)
    assert learner.seen == [0, 1, 2]


def test_a_run_that_starts_later_numbers_its_steps_from_there() -> None:
    learner = Playback([3, 2, 1, 0.5])
    steps = []
    fit(learner, itertools.count(), table(4), start=2, report=lambda s, m: steps.append(s) or Decision.CONTINUE)
    assert steps == [3, 4]


def test_patience_stops_after_so_many_worse_evaluations_and_keeps_the_best() -> None:
    best = []
    summary = fit(
        Playback([1] * 9, [5, 4, 4.5, 4.2]),
        itertools.count(),
        table(9, evaluate=1),
        stopping=Patience(2),
        on_best=best.append,
    )
    assert best == [1, 2]
    assert (summary.steps, summary.best_step, summary.best_eval_loss) == (4, 2, 4)
    assert "2 evaluations" in summary.reason


def test_whoever_watches_may_stop_the_run() -> None:
    summary = fit(Playback([1] * 5), itertools.count(), table(5), report=lambda s, m: Decision.STOP)
    assert (summary.steps, summary.reason) == (1, "asked to stop")


def test_a_loss_that_is_no_number_ends_the_run_with_its_step() -> None:
    with pytest.raises(RunError, match="loss of step 2 is nan"):
        fit(Playback([1, float("nan"), 1]), itertools.count(), table(3))


def test_checkpoints_come_after_the_evaluation_of_their_step() -> None:
    order = []
    fit(
        Playback([1] * 2, [1.0]),
        itertools.count(),
        table(2, evaluate=2, save=2),
        on_best=lambda step: order.append("best"),
        on_save=lambda step: order.append("save"),
    )
    assert order == ["best", "save"]
