"""The loop with a learner that only plays back losses."""

from __future__ import annotations

import itertools
import math

import pytest

from raytune_ft.core.errors import RunError
from raytune_ft.training.goal import Goal
from raytune_ft.training.loop import Decision, Metrics, fit, with_perplexity
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


def test_a_run_that_goes_on_tells_again_of_the_step_it_goes_on_from() -> None:
    told = []

    def report(step: int, metrics: Metrics) -> Decision:
        told.append((step, metrics["loss"]))
        return Decision.CONTINUE

    fit(Playback([3, 2, 1]), itertools.count(), table(3), start=2, last={"loss": 2.5}, report=report)
    assert told == [(2, 2.5), (3, 1)]


@pytest.mark.parametrize(
    ("start", "stopping", "reason"),
    [(3, None, "all steps made"), (2, Patience(1, waited=1), "no lower validation loss in 1 evaluation")],
)
def test_a_run_that_broke_off_at_its_end_makes_no_step_more(start: int, stopping: Patience, reason: str) -> None:
    learner, noted = Playback([3, 2, 1, 0]), []
    summary = fit(
        learner,
        itertools.count(),
        table(3),
        start=start,
        last={"loss": 1.5},
        stopping=stopping,
        note=lambda step, metrics: noted.append(step),
    )
    assert (learner.seen, noted) == ([], [])
    assert (summary.steps, summary.reason, summary.metrics, summary.left) == (start, reason, {"loss": 1.5}, False)


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
    assert (summary.steps, summary.best_step, summary.best, summary.metric) == (4, 2, 4, "eval_loss")
    assert summary.reason == "no lower validation loss in 2 evaluations"


def test_an_evaluation_tells_perplexity_also_where_no_float_holds_it() -> None:
    told = [with_perplexity({"eval_loss": loss})["eval_perplexity"] for loss in (math.log(8), 800.0)]
    assert told == [pytest.approx(8), math.inf]


def test_with_a_goal_that_is_better_when_higher_the_loss_decides_nothing() -> None:
    class Answering(Playback):
        """Its loss falls on, while its answers are best at the second evaluation."""

        def evaluate(self) -> Metrics:
            return {**super().evaluate(), "eval_exact_match": next(self.answers)}

    learner, best = Answering([1] * 9, [5, 4, 3, 2, 1]), []
    learner.answers = iter([0.0, 0.5, 0.25, 0.5, 1.0])
    stopping = Patience(2, Goal.of("eval_exact_match"))
    summary = fit(learner, itertools.count(), table(9, evaluate=1), stopping=stopping, on_best=best.append)
    assert best == [1, 2]
    assert (summary.steps, summary.best_step, summary.best, summary.metric) == (4, 2, 0.5, "eval_exact_match")
    assert summary.reason == "no higher Exact match of answers in 2 evaluations"


@pytest.mark.parametrize("metric", ["eval_loss", "eval_rouge"])
def test_an_evaluation_that_is_no_number_is_never_the_best(metric: str) -> None:
    patience = Patience(2, Goal.of(metric))
    assert not patience.improved(math.nan, 1) and not patience.improved(math.inf, 2)
    assert patience.spent and patience.best is None
    assert patience.improved(0.5, 3) and not patience.improved(math.nan, 4)


def test_what_a_checkpoint_keeps_of_patience_goes_on_where_it_was() -> None:
    before = Patience(3, Goal.of("eval_rouge"))
    assert [before.improved(value, step) for step, value in enumerate([0.25, 0.5, 0.125], start=1)] == [
        True,
        True,
        False,
    ]
    again = Patience(3, Goal.of("eval_rouge"), **before.remembered())
    assert not again.improved(0.5, 4) and not again.improved(0.375, 5)
    assert again.spent and (again.best, again.best_step) == (0.5, 2)


def test_whoever_watches_may_stop_the_run() -> None:
    summary = fit(Playback([1] * 5), itertools.count(), table(5), report=lambda s, m: Decision.STOP)
    assert (summary.steps, summary.reason) == (1, "asked to stop")


def test_a_loss_that_is_no_number_ends_the_run_with_its_step() -> None:
    with pytest.raises(RunError, match="loss of step 2 is nan"):
        fit(Playback([1, float("nan"), 1]), itertools.count(), table(3))


def test_a_gradient_norm_that_is_no_number_ends_the_run_with_its_step() -> None:
    class Steep(Playback):
        def step(self, batch: object, step: int) -> Metrics:
            return {**super().step(batch, step), "grad_norm": math.inf if step == 2 else 1.0}

    with pytest.raises(RunError, match="gradient norm of step 2 is inf"):
        fit(Steep([1, 1, 1]), itertools.count(), table(3))


def test_a_step_is_evaluated_then_noted_then_saved_then_told() -> None:
    order = []
    fit(
        Playback([1] * 2, [1.0]),
        itertools.count(),
        table(2, evaluate=2, save=2),
        on_best=lambda step: order.append(("best", step)),
        note=lambda step, metrics: order.append(("note", step)),
        on_save=lambda step: order.append(("save", step)),
        report=lambda step, metrics: order.append(("report", step)) or Decision.CONTINUE,
    )
    assert order == [("note", 1), ("report", 1), ("best", 2), ("note", 2), ("save", 2), ("report", 2)]


@pytest.mark.parametrize("save", [None, 2])
def test_who_leaves_saves_once(save: int | None) -> None:
    saved: list[int] = []
    leave = {2: Decision.LEAVE}
    summary = fit(
        Playback([1] * 4),
        itertools.count(),
        table(4, save=save),
        on_save=saved.append,
        report=lambda step, metrics: leave.get(step, Decision.CONTINUE),
    )
    assert (saved, summary.steps, summary.left) == ([2], 2, True)
