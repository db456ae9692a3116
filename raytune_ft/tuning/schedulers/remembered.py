"""Median stopping, HyperBand and ASHA that know what earlier drivers decided by."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, HyperBandScheduler, MedianStoppingRule, TrialScheduler

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.memory import TIME, reached_step, recalled, remember

_RUNG = ("_halves", "_n", "_r", "_cumul_r")
"""What Ray's bracket knows of where it is."""


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
            self._known = recalled(self._memory) or {}
        told = [row for row in self._known.get(trial.trial_id, ()) if row[TIME] <= reached_step(trial)]
        if told and trial not in self._results:
            self._results[trial] = told

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: decides as median stopping does, and writes the results before that takes effect."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        known = {
            other.trial_id: [{name: row[name] for name in (TIME, self._metric)} for row in rows]
            for other, rows in self._results.items()
        }
        remember(self._memory, known)
        return decision


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
        reached = reached_step(trial)
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
            again = result[TIME] < self._dropped[trial.trial_id]
            return str(TrialScheduler.CONTINUE if again else TrialScheduler.STOP)
        self._reached[trial.trial_id] = result[TIME]
        decision: str = super().on_trial_result(tune_controller, trial, result)
        self._remember()
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray Tune's hook: a trial's last result comes here alone; to that step it goes again, if it has to."""
        self._reached[trial.trial_id] = result.get(TIME, self._reached.get(trial.trial_id, 0))
        super().on_trial_complete(tune_controller, trial, result)

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
        remember(self._memory, kept)

    def _recall(self) -> None:
        kept = None if self._recalled else recalled(self._memory)
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
        remember(self._memory, rungs)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ray Tune's hook: as ASHA does, for a result that counts."""
        if self._counts(result):
            super().on_trial_complete(tune_controller, trial, result)

    def _counts(self, result: dict[str, Any]) -> bool:
        return math.isfinite(result.get(self._metric, math.nan))

    def _recall(self) -> None:
        kept = None if self._recalled else recalled(self._memory)
        self._recalled = True
        if kept is None:
            return
        for bracket, rungs in zip(self._brackets, kept, strict=True):
            for (_, recorded), (_, remembered) in zip(bracket._rungs, rungs, strict=True):
                recorded.update(remembered)
