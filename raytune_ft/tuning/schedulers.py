"""What a sweep's settings are in Ray Tune's terms: schedulers, searchers, domains and budgets.

Meets Ray, beside `run.py`, because schedulers and stoppers are classes of Ray Tune's.
"""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from pyarrow.fs import FileType
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
from ray.tune.stopper import CombinedStopper, Stopper

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import Choice, Domain, LogUniform, QUniform, TimesRank, Uniform, dimension

logger = logging.getLogger("raytune_ft")

_TIME = "global_step"
_RUNG = ("_halves", "_n", "_r", "_cumul_r")
"""What Ray's bracket knows of where it is."""


def scheduler(config: SweepConfig, memory: Location) -> Any:
    """The scheduler; what it has decided by, it keeps in the file `memory`."""
    most = config.last_step or 10**9
    match config.scheduler:
        case "none":
            return FIFOScheduler()
        case "median":
            return RememberedMedian(memory, time_attr=_TIME, grace_period=config.grace_steps, min_samples_required=2)
        case "hyperband":
            made = RememberedHyperBand(memory, time_attr=_TIME, max_t=most, reduction_factor=config.reduction_factor)
            _warn_if_all_run_to_the_end(made, config.trials, most)
            return made
        case "pbt":
            return LockstepPopulation(
                seed=config.seed,
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


def _kept(memory: Location) -> Any:
    """What an earlier driver, or this one, left in a file; None if there is none yet."""
    return json.loads(memory.read()) if memory.exists() else None


def _keep(memory: Location, value: Any) -> None:
    memory.write(json.dumps(value).encode())


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
        _keep(self._memory, self._spent)
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
            self._known = _kept(self._memory) or {}
        return self._known


class HourBudget(Stopper):  # type: ignore[misc]  # Ray's classes count as Any
    """Stops all trials after so many hours of search, those of earlier drivers among them (Ray's own forgets these)."""

    def __init__(self, memory: Location, hours: float) -> None:
        self._memory, self._hours = memory, hours
        self._began: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Ray Tune's hook: a trial by itself has no limit; how long the search has taken is kept in the file."""
        _keep(self._memory, self._seconds())
        return False

    def stop_all(self) -> bool:
        """Ray Tune's hook: whether the time is over."""
        return self._seconds() >= 3600 * self._hours

    def _seconds(self) -> float:
        if self._began is None:
            self._began = time.monotonic() - (_kept(self._memory) or 0.0)
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


class LockstepPopulation(PopulationBasedTraining):  # type: ignore[misc]  # Ray's classes count as Any
    """Population-based training whose trials are compared at the same step, and that can be resumed.

    A trial that has come to an exchange waits, in its seat, until all have come so far; so all need room at the same
    time. One whose state another goes on from waits until that is read, since old states are deleted. What is drawn is
    decided by `seed` and the step. Ray's own compares the first to report with what the others told an exchange ago,
    and pauses a trial whenever any other does not run: from the first exchange on, all of them after each evaluation,
    each for as long as a process takes to start.
    """

    def __init__(self, *, seed: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._seed = seed
        self._donors = dict[Trial, Trial]()
        self._come, self._leaving = dict[Trial, int](), dict[Trial, None]()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: of a trial that was there before, the last exchange is where it must have been."""
        super().on_trial_add(tune_controller, trial)
        reached = _reached(trial)
        self._trial_state[trial].last_perturbation_time = reached - reached % self._perturbation_interval

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: the trial goes on, unless it has come to an exchange."""
        state, step = self._trial_state[trial], result[_TIME]
        if step - state.last_perturbation_time < self._perturbation_interval:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(state, step, result, trial)
        self._come[trial] = step
        return str(TrialScheduler.NOOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Ray Tune's hook, which it calls all the time: as PBT does; here states are exchanged, and trials go on."""
        there = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        self._come = {trial: step for trial, step in self._come.items() if trial.status == Trial.RUNNING}
        due = [
            trial
            for trial in there
            if trial in self._come and all(_reached(other) >= self._come[trial] for other in there)
        ]
        if due and not any(trial.is_saving for trial in due):
            self._exchange(tune_controller, due)
        for trial in list(self._leaving):
            if trial.status != Trial.RUNNING:
                del self._leaving[trial]
            elif not (trial.is_saving or any(self._is_about_to_read(other, trial) for other in there)):
                del self._leaving[trial]
                tune_controller._tune_controller._schedule_trial_train(trial)  # its wrapper warns of this call
        return super().choose_trial_to_run(tune_controller)

    def _exchange(self, tune_controller: Any, due: list[Trial]) -> None:
        worse, better = self._quantiles()
        with _random_by(f"{self._seed} {max(self._come[trial] for trial in due)}"):
            for trial in sorted(due, key=lambda trial: trial not in better):  # states are saved before they are read
                self._trial_state[trial].last_perturbation_time = self._come.pop(trial)
                self._leaving[trial] = None
                self._checkpoint_or_exploit(trial, tune_controller, better, worse)

    def _is_about_to_read(self, other: Trial, trial: Trial) -> bool:
        return self._donors.get(other) is trial and (other.status != Trial.RUNNING or other.is_restoring)

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        """As PBT does; from the donor's newest state if that of its last exchange is deleted, or soon will be."""
        donor, manager = self._trial_state[trial_to_clone], trial_to_clone.run_metadata.checkpoint_manager
        wanted, newest = donor.last_checkpoint, manager.latest_checkpoint_result
        old = wanted.path in {kept.checkpoint.path for kept in manager.best_checkpoint_results[:-2]}
        if newest is not None and (old or wanted.filesystem.get_file_info(wanted.path).type == FileType.NotFound):
            donor.last_checkpoint, donor.last_result = newest.checkpoint, newest.metrics
        super()._exploit(tune_controller, trial, trial_to_clone)
        self._donors[trial] = trial_to_clone


@contextmanager
def _random_by(seed: str) -> Iterator[None]:
    """What Ray draws from the process's generators is decided by `seed` meanwhile; then they are as they were."""
    plain, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


class RememberedMedian(MedianStoppingRule):  # type: ignore[misc]  # Ray's classes count as Any
    """Median stopping whose results outlive the driver; Ray's own forgets those of the trials that have ended."""

    def __init__(self, memory: Location, **settings: Any) -> None:
        super().__init__(**settings)
        self._memory = memory
        self._known: dict[str, list[dict[str, float]]] | None = None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: a trial that was there before has its results, as far as it goes on from them."""
        super().on_trial_add(tune_controller, trial)
        if self._known is None:
            self._known = _kept(self._memory) or {}
        told = [row for row in self._known.get(trial.trial_id, ()) if row[_TIME] <= _reached(trial)]
        if told and trial not in self._results:
            self._results[trial] = told

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: decides as median stopping does, and writes the results before that takes effect."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        known = {
            other.trial_id: [{name: row[name] for name in (_TIME, self._metric)} for row in rows]
            for other, rows in self._results.items()
        }
        _keep(self._memory, known)
        return decision


def _reached(trial: Any) -> int:
    """The step that a trial has reported, as far as Ray Tune's state knows."""
    return int((trial.last_result or {}).get(_TIME, 0))


class RememberedHyperBand(HyperBandScheduler):  # type: ignore[misc]  # Ray's classes count as Any
    """HyperBand whose brackets outlive the driver; Ray's own fills new ones, which wait for trials that ended before.

    Ray Tune's state may be older than what was decided: a trial that a bracket had dropped by then makes its way to the
    same step again, and is dropped there.
    """

    def __init__(self, memory: Location, **settings: Any) -> None:
        super().__init__(**settings)
        self._memory, self._recalled = memory, False
        self._places = dict[str, tuple[int, int]]()
        self._reached, self._dropped = dict[str, float](), dict[str, float]()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: a trial that was there before comes to its bracket; it waits there, if it did so."""
        self._recall()
        if trial.is_finished() or trial in self._trial_info:
            return
        reached = _reached(trial)
        if trial.trial_id in self._dropped:
            if reached >= self._dropped[trial.trial_id]:
                trial.set_status(Trial.TERMINATED)
            return
        if trial.trial_id not in self._places:
            super().on_trial_add(tune_controller, trial)
            self._remember()
            return
        band, place = self._places[trial.trial_id]
        bracket = self._hyperbands[band][place]
        bracket._all_trials.append(trial)
        bracket._live_trials[trial] = trial.last_result if reached else None
        self._trial_info[trial] = bracket, band
        if not bracket.continue_trial(trial):
            trial.set_status(Trial.PAUSED)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: decides as HyperBand does, and writes the brackets before the decision takes effect."""
        if trial.trial_id in self._dropped:
            again = result[_TIME] < self._dropped[trial.trial_id]
            return str(TrialScheduler.CONTINUE if again else TrialScheduler.STOP)
        self._reached[trial.trial_id] = result[_TIME]
        decision: str = super().on_trial_result(tune_controller, trial, result)
        self._remember()
        return decision

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: a trial that is tried again at once stays in its bracket."""
        if trial.status != Trial.ERROR:  # Ray Tune sets that beforehand only where it recovers a trial
            super().on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: the others wait no longer for a trial that has ended; in Ray's own, they may for ever."""
        if trial not in self._trial_info:
            return
        bracket, _ = self._trial_info[trial]
        bracket.cleanup_trial(trial)
        if bracket.current_trials() and not bracket.is_being_processed:
            self._process_bracket(tune_controller, bracket)
        self._remember()

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Ray Tune's hook: as HyperBand does, and last of all those that go to where they were dropped."""
        chosen = super().choose_trial_to_run(tune_controller)
        if chosen is not None:
            return chosen
        again = (trial for trial in tune_controller.get_trials() if trial.trial_id in self._dropped)
        return next((trial for trial in again if trial.status == Trial.PENDING), None)

    def _process_bracket(self, tune_controller: Any, bracket: Any) -> str:
        """As HyperBand does; Ray's own never takes the mark away again."""
        bracket.is_being_processed = True
        try:
            return str(super()._process_bracket(tune_controller, bracket))
        finally:
            bracket.is_being_processed = False

    def _bracket_at(self, place: int, rung: list[float] | None) -> Any:
        """A bracket as it was; None where Ray has none, since its first rung would be before the first step."""
        if rung is None:
            return None
        bracket = self._create_bracket(place)
        for name, value in zip(_RUNG, rung, strict=True):
            setattr(bracket, name, value)
        return bracket

    def _remember(self) -> None:
        rungs, places = [], dict[str, tuple[int, int]]()
        for number, band in enumerate(self._hyperbands):
            rungs.append([bracket and [getattr(bracket, name) for name in _RUNG] for bracket in band])
            for place, bracket in enumerate(band):
                places |= {trial.trial_id: (number, place) for trial in (bracket._live_trials if bracket else ())}
        self._dropped |= {name: self._reached.get(name, 0) for name in self._places if name not in places}
        self._places = places
        kept = {"rungs": rungs, "places": places, "reached": self._reached, "dropped": self._dropped}
        _keep(self._memory, kept)

    def _recall(self) -> None:
        kept = None if self._recalled else _kept(self._memory)
        self._recalled = True
        if kept is None:
            return
        self._places, self._reached, self._dropped = kept["places"], kept["reached"], kept["dropped"]
        self._hyperbands = [[self._bracket_at(*place) for place in enumerate(band)] for band in kept["rungs"]]
        self._state = {"bracket": self._hyperbands[-1][-1], "band_idx": len(self._hyperbands) - 1}


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
        _keep(self._memory, rungs)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray Tune's hook: as ASHA does, for a result that counts."""
        if self._counts(result):
            super().on_trial_complete(tune_controller, trial, result)

    def _counts(self, result: dict[str, Any]) -> bool:
        return math.isfinite(result.get(self._metric, math.nan))

    def _recall(self) -> None:
        kept = None if self._recalled else _kept(self._memory)
        self._recalled = True
        if kept is None:
            return
        for bracket, rungs in zip(self._brackets, kept, strict=True):
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
