"""Population-based training that compares at the same step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from pyarrow.fs import FileType
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from raytune_ft.tuning.schedulers.memory import TIME, reached_step


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
        self._come, self._leaving = set[Trial](), dict[Trial, None]()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune's hook: of a trial that was there before, the last exchange is where it must have been."""
        super().on_trial_add(tune_controller, trial)
        reached = reached_step(trial)
        self._trial_state[trial].last_perturbation_time = reached - reached % self._perturbation_interval

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ray Tune's hook: the trial goes on, unless it has come to an exchange."""
        state, step = self._trial_state[trial], result[TIME]
        if step - state.last_perturbation_time < self._perturbation_interval:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(state, step, result, trial)
        self._come.add(trial)
        return str(TrialScheduler.NOOP)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Ray Tune's hook, which it calls all the time: as PBT does; here states are exchanged, and trials go on."""
        there = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        self._come = {trial for trial in self._come if trial.status == Trial.RUNNING}
        least = min(map(reached_step, there), default=0)
        due = [trial for trial in there if trial in self._come and reached_step(trial) <= least]
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
        with random_by(f"{self._seed} {reached_step(due[0])}"):
            for trial in sorted(due, key=lambda trial: trial not in better):  # states are saved before they are read
                self._come.remove(trial)
                self._trial_state[trial].last_perturbation_time = reached_step(trial)
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
def random_by(seed: str) -> Iterator[None]:
    """What Ray draws from the process's generators is decided by `seed` meanwhile; then they are as they were."""
    plain, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
