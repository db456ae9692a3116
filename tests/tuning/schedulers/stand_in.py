"""What of Ray Tune schedulers ask for, and settings for them."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from raytune_ft.tuning.config import SweepConfig


def sweep(**changes: Any) -> SweepConfig:
    training = {"model_path": "m", "dataset_path": "d", "max_steps": 8}
    return SweepConfig(**{"output_dir": "o", "training": training, "space": {"learning_rate": [1e-4, 1e-3]}, **changes})


def reported(trial: Trial, step: int, loss: float) -> dict[str, Any]:
    return {"global_step": step, "eval_loss": loss, "trial_id": trial.trial_id}


class Tune:
    """What of Ray Tune's controller schedulers ask for."""

    search_alg = None

    def __init__(self, made: Any, trials: list[Trial]) -> None:
        self.made, self.trials, self._tune_controller = made, trials, self
        self.goes_on = list[Trial]()
        for trial in trials:
            made.on_trial_add(self, trial)

    def get_trials(self) -> list[Trial]:
        return self.trials

    def get_live_trials(self) -> list[Trial]:
        return []

    def _schedule_trial_train(self, trial: Trial) -> None:
        self.goes_on.append(trial)

    def stop_trial(self, trial: Trial) -> None:
        self.made.on_trial_remove(self, trial)
        trial.set_status(Trial.TERMINATED)

    def hear(self, trial: Trial, step: int, loss: float) -> str:
        trial.set_status(Trial.RUNNING)
        said = self.made.on_trial_result(self, trial, reported(trial, step, loss))
        trial.update_last_result(reported(trial, step, loss))
        ends = {TrialScheduler.PAUSE: Trial.PAUSED, TrialScheduler.STOP: Trial.TERMINATED}
        trial.set_status(ends.get(said, Trial.RUNNING))
        return said


def restored(trials: list[Trial]) -> list[Trial]:
    """As Ray Tune has them after a restart: what did not end is pending, and the newest comes first."""
    for trial in trials:
        trial.set_status(trial.status if trial.is_finished() else Trial.PENDING)
    return trials[::-1]
