"""What a sweep's settings are in Ray Tune's terms: schedulers, searchers, domains and budgets.

Meets Ray, beside `run.py`, because schedulers and stoppers are classes of Ray Tune's.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter
from ray.tune.stopper import Stopper

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import Choice, Domain, LogUniform, QUniform, TimesRank, Uniform, dimension

logger = logging.getLogger("raytune_ft")

_TIME = "global_step"


def scheduler(config: SweepConfig, memory: Location) -> Any:
    """The scheduler; ASHA keeps its rungs in the file `memory`."""
    most = config.last_step or 10**9
    match config.scheduler:
        case "none":
            return FIFOScheduler()
        case "median":
            return MedianStoppingRule(time_attr=_TIME, grace_period=config.grace_steps, min_samples_required=2)
        case "hyperband":
            made = ResumedHyperBand(time_attr=_TIME, max_t=most, reduction_factor=config.reduction_factor)
            _warn_if_all_run_to_the_end(made, config.trials, most)
            return made
        case "pbt":
            return PopulationBasedTraining(
                time_attr=_TIME,
                perturbation_interval=config.grace_steps,
                hyperparam_mutations={
                    dimension(key, choice): _mutation(choice) for key, choice in config.space.items()
                },
                custom_explore_fn=partial(_within, config.space),
                require_attrs=False,
            )
    return RememberedASHA(
        memory,
        time_attr=_TIME,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
        max_t=most,
    )


def _warn_if_all_run_to_the_end(hyperband: HyperBandScheduler, trials: int, last_step: int) -> None:
    """HyperBand's first bracket, which trials fall to first, has no rung before the last step."""
    first = hyperband._get_n0(0)
    if trials <= first:
        logger.warning(
            "tune: hyperband stops none of %d trials: the first %d run to step %d; search more, or set scheduler: asha",
            trials,
            first,
            last_step,
        )


def searcher(config: SweepConfig, together: int) -> Any:
    """What chooses the points of the space, and lets `together` of them be tried at the same time.

    It sees to that itself: beside a searcher that one names, Ray Tune takes no heed of its own `max_concurrent_trials`.
    """
    if config.searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return ConcurrencyLimiter(OptunaSearch(seed=config.seed), max_concurrent=together)
    return BasicVariantGenerator(random_state=config.seed, max_concurrent=together)


def _mutation(choice: Domain) -> Any:
    """What population-based training draws a changed setting from; PBT's explicit lists are neighbours in order."""
    if isinstance(choice, list):
        return list(choice)
    if isinstance(choice, Choice):
        return list(choice.choice)
    if isinstance(choice, TimesRank):
        return list(choice.times_rank)
    return domain(choice, grid=False)


def _within(space: Mapping[str, Domain], point: dict[str, Any]) -> dict[str, Any]:
    """A point that population-based training made, with what it multiplied put back into its range."""
    for key, choice in space.items():
        match choice:
            case Uniform(uniform=(low, high)) | LogUniform(loguniform=(low, high)):
                point[key] = min(max(point[key], low), high)
            case QUniform(quniform=(low, high, step)):
                point[key] = min(max(step * round(point[key] / step), low), high)
    return point


class TokenBudget(Stopper):  # type: ignore[misc]  # Ray's classes count as Any
    """Stops all trials once they have trained on `most` tokens together.

    About `first` of these are kept for each of the `trials` that was not evaluated yet: every one is, once.
    """

    def __init__(self, most: int, first: int = 0, trials: int = 0) -> None:
        self._most, self._first, self._trials = most, first, trials
        self._spent = dict[str, float]()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Ray Tune's hook: whether the trial that reported `result` stops."""
        self._spent[trial_id] = float(result.get("tokens", 0.0))
        waiting = self._trials - len(self._spent)
        next_ones = self._first * (waiting + 1) if waiting > 0 else 0  # its own next evaluation, and their first ones
        return sum(self._spent.values()) + next_ones >= self._most

    def stop_all(self) -> bool:
        """Ray Tune's hook: whether the budget is spent, and every trial was evaluated."""
        return len(self._spent) >= self._trials and sum(self._spent.values()) >= self._most


class ResumedHyperBand(HyperBandScheduler):  # type: ignore[misc]  # Ray's classes count as Any
    """HyperBand that can be resumed; Ray's own waits for ever for restored trials that ended, or paused, before."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: as HyperBand does, for a trial that has not ended; one that is paused goes on."""
        if trial.is_finished():
            return
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.PAUSED:
            bracket, _ = self._trial_info[trial]
            bracket.trials_to_unpause.add(trial)


class RememberedASHA(ASHAScheduler):  # type: ignore[misc]  # Ray's classes count as Any
    """ASHA whose rungs outlive the driver; Ray's own forgets on restore which results its cutoffs were made of.

    A value that is no finite number, as of a trial that diverged, is kept out of them: no cutoff could be made of it.
    """

    def __init__(self, memory: Location, **settings: Any) -> None:
        super().__init__(**settings)
        self._memory, self._recalled = memory, False

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: decides as ASHA does, and writes the rungs before the decision takes effect."""
        self._recall()
        if not self._counts(result):
            return str(TrialScheduler.CONTINUE)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        rungs = [[[milestone, recorded] for milestone, recorded in bracket._rungs] for bracket in self._brackets]
        self._memory.write(json.dumps(rungs).encode())
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray Tune's hook: as ASHA does, for a result that counts."""
        if self._counts(result):
            super().on_trial_complete(tune_controller, trial, result)

    def _counts(self, result: dict[str, Any]) -> bool:
        return math.isfinite(result.get(self._metric, math.nan))

    def _recall(self) -> None:
        if self._recalled or not self._memory.exists():
            self._recalled = True
            return
        self._recalled = True
        for bracket, rungs in zip(self._brackets, json.loads(self._memory.read()), strict=True):
            for (_, recorded), (_, remembered) in zip(bracket._rungs, rungs, strict=True):
                recorded.update(remembered)


def domain(choice: Domain, *, grid: bool) -> Any:
    """What Ray Tune draws a setting from; a list is a grid, or values that are each as likely."""
    match choice:
        case TimesRank():
            return domain(list(choice.times_rank), grid=grid)
        case Choice():
            return ray_tune.choice(choice.choice)
        case Uniform():
            return ray_tune.uniform(*choice.uniform)
        case LogUniform():
            return ray_tune.loguniform(*choice.loguniform)
        case QUniform():
            return ray_tune.quniform(*choice.quniform)
    return ray_tune.grid_search(choice) if grid else ray_tune.choice(choice)
