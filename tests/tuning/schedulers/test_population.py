"""Population-based training that compares at the same step."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.choice import scheduler
from raytune_ft.tuning.schedulers.population import LockstepPopulation, random_by

from .stand_in import Tune, reported, sweep


def test_a_resumed_population_exchanges_states_where_it_would_have(tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler="pbt", grace_steps=3), Location.at(tmp_path))
    made.set_search_properties("eval_loss", "min")
    trial = Trial("nothing", trial_id="a", stub=True)
    trial.update_last_result(reported(trial, 7, 1.0))
    made.on_trial_add(SimpleNamespace(search_alg=BasicVariantGenerator()), trial)
    assert made._trial_state[trial].last_perturbation_time == 6


class Population(LockstepPopulation):
    """Notes who is compared, and lets the worst go on from the best."""

    compared: list[list[str]]

    def _checkpoint_or_exploit(
        self, trial: Trial, tune_controller: Any, better: list[Trial], worse: list[Trial]
    ) -> None:
        self.compared[-1].append(trial.trial_id)
        if trial in worse:
            self._donors[trial] = better[0]
            trial.set_status(Trial.PAUSED)

    def _exchange(self, tune_controller: Any, due: list[Trial]) -> None:
        self.compared.append([])
        super()._exchange(tune_controller, due)


def test_a_population_is_compared_once_all_have_come_to_the_same_step(tmp_path: Path) -> None:
    made = Population(seed=0, time_attr="global_step", perturbation_interval=4, hyperparam_mutations={"a": [1, 2]})
    made.compared = []
    made.set_search_properties("eval_loss", "min")
    tune = Tune(made, [Trial("nothing", config={"a": 1}, trial_id=name, stub=True) for name in "abc"])
    first, second, third = tune.trials
    assert tune.hear(first, 2, 3.0) == TrialScheduler.CONTINUE
    assert tune.hear(first, 4, 2.0) == tune.hear(second, 4, 1.0) == TrialScheduler.NOOP
    made.choose_trial_to_run(tune)
    assert (made.compared, tune.goes_on) == ([], [])  # the third may not even have begun
    assert tune.hear(third, 2, 3.0) == TrialScheduler.CONTINUE
    assert tune.hear(third, 4, 3.0) == TrialScheduler.NOOP
    made.choose_trial_to_run(tune)
    assert made.compared == [["b", "a", "c"]]  # the best first: its state is saved before the third reads it
    assert tune.goes_on == [first]
    third.set_status(Trial.RUNNING)  # it has read the second's state
    made.choose_trial_to_run(tune)
    assert tune.goes_on == [first, second]
    assert tune.hear(third, 8, 1.0) == tune.hear(second, 8, 0.5) == TrialScheduler.NOOP
    first.set_status(Trial.TERMINATED)  # nobody waits for those that have ended
    made.choose_trial_to_run(tune)
    assert made.compared[1:] == [["b", "c"]]


def test_a_trial_whose_state_is_being_saved_is_waited_for_before_an_exchange_and_before_it_goes_on() -> None:
    made = Population(seed=0, time_attr="global_step", perturbation_interval=4, hyperparam_mutations={"a": [1, 2]})
    made.compared = []
    made.set_search_properties("eval_loss", "min")
    tune = Tune(made, [Trial("nothing", config={"a": 1}, trial_id=name, stub=True) for name in "abc"])
    first, second, third = tune.trials
    saving: Any = object()
    for trial, loss in ((first, 2.0), (second, 1.0), (third, 3.0)):
        tune.hear(trial, 4, loss)
    second.temporary_state.saving_to = saving  # the state of its last evaluation
    made.choose_trial_to_run(tune)
    assert made.compared == []
    second.temporary_state.saving_to, first.temporary_state.saving_to = None, None
    made.choose_trial_to_run(tune)
    assert (made.compared, tune.goes_on) == ([["b", "a", "c"]], [first])
    third.set_status(Trial.RUNNING)
    third.temporary_state.restoring_from = saving  # it reads the second's state
    made.choose_trial_to_run(tune)
    assert tune.goes_on == [first]
    third.temporary_state.restoring_from, second.temporary_state.saving_to = None, saving
    made.choose_trial_to_run(tune)
    assert tune.goes_on == [first]
    second.temporary_state.saving_to = None
    made.choose_trial_to_run(tune)
    assert tune.goes_on == [first, second]
    assert tune.hear(first, 6, 2.0) == TrialScheduler.CONTINUE  # the next exchange is at step 8
    assert tune.hear(first, 8, 2.0) == TrialScheduler.NOOP


def test_what_a_population_draws_is_decided_by_the_seed_and_leaves_other_draws_as_they_were() -> None:
    def drawn(seed: str) -> tuple[float, float]:
        with random_by(seed):
            return random.random(), float(np.random.random())

    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    assert drawn("0 4") == drawn("0 4")
    assert not set(drawn("0 4")) & {*drawn("0 8"), *drawn("1 4")}
    assert (random.random(), np.random.random()) == expected


@pytest.mark.parametrize(("kept", "exchanged", "found"), [(3, 2, 2), (3, 1, 3), (3, 0, 3)])
def test_a_trial_goes_on_from_the_newest_state_of_another_whose_exchanged_one_is_deleted_or_soon_will_be(
    kept: int, exchanged: int, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of states 1 to `kept` the last two will stay; 0 is deleted."""
    monkeypatch.setattr(PopulationBasedTraining, "_exploit", lambda *given: None)
    made = scheduler(sweep(scheduler="pbt", grace_steps=8), Location.at(tmp_path))
    made.set_search_properties("eval_loss", "min")
    trial, donor = (Trial("nothing", trial_id=name, stub=True) for name in "ab")
    tune = Tune(made, [trial, donor])
    states = [_TrainingResult(Checkpoint(str(tmp_path / str(step))), {"global_step": step}) for step in range(kept + 1)]
    for state in states[1:]:
        Path(state.checkpoint.path).mkdir()
        donor.run_metadata.checkpoint_manager.register_checkpoint(state)
    known = made._trial_state[donor]
    known.last_checkpoint, known.last_result = states[exchanged].checkpoint, states[exchanged].metrics
    made._exploit(tune, trial, donor)
    assert (Path(known.last_checkpoint.path).name, known.last_result) == (str(found), {"global_step": found})
    assert made._donors == {trial: donor}
