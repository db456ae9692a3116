"""A sweep's settings in Ray Tune's terms."""

from __future__ import annotations

import json
import logging
import math
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint, register_trainable
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import BasicVariantGenerator, ConcurrencyLimiter

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.schedulers import LockstepPopulation, TokenBudget, _random_by, limits, scheduler, searcher
from raytune_ft.tuning.space import Uniform


def sweep(**changes: Any) -> SweepConfig:
    training = {"model_path": "m", "dataset_path": "d", "max_steps": 8}
    return SweepConfig(**{"output_dir": "o", "training": training, "space": {"learning_rate": [1e-4, 1e-3]}, **changes})


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_trials_go_on_to_the_last_step_that_is_searched(name: str, tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler=name, space={"max_steps": [16, 32, 8]}), Location.at(tmp_path))
    assert (made._max_t if name == "asha" else made._max_t_attr) == 32
    assert scheduler(sweep(scheduler="asha"), Location.at(tmp_path))._max_t == 8


def test_a_hyperband_that_stops_no_trial_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # round(log2(8)) + 1 = 4 trials in the first bracket
    rates = [1e-4, 2e-4, 3e-4, 4e-4, 5e-4]
    with caplog.at_level(logging.WARNING, logger="raytune_ft"):
        scheduler(sweep(scheduler="hyperband", space={"learning_rate": rates}), Location.at(tmp_path))
        assert caplog.text == ""
        scheduler(sweep(scheduler="hyperband", space={"learning_rate": rates[:4]}), Location.at(tmp_path))
    assert "hyperband stops none of 4 trials: the first 4 run to step 8; search more" in caplog.text


@pytest.mark.parametrize("how", ["grid", "random", "optuna"])
def test_no_more_trials_are_begun_than_may_run_together(how: str, tmp_path: Path) -> None:
    made = searcher(sweep(searcher=how, num_trials=None if how == "grid" else 5), 2)
    if how == "optuna":
        assert isinstance(made, ConcurrencyLimiter) and made.max_concurrent == 2
        return
    register_trainable("nothing", lambda config: None)
    common = {"run": "nothing", "config": {"a": 1}, "num_samples": 5, "storage_path": str(tmp_path)}
    made.add_configurations({"t": common})
    begun = [made.next_trial() for _ in range(3)]
    assert [trial is None for trial in begun] == [False, False, True]
    made.on_trial_complete(begun[0].trial_id)
    assert made.next_trial() is not None and made.next_trial() is None


def test_what_a_population_changes_stays_in_its_range(tmp_path: Path) -> None:
    space = {
        "lora_dropout": {"uniform": [0.0, 0.5]},
        "per_device_train_batch_size": {"quniform": [2, 8, 2]},
        "weight_decay": {"choice": [0.1, 0.01]},
        "lora_alpha": {"times_rank": [1, 2]},
    }
    config = sweep(scheduler="pbt", space=space, searcher="random", num_trials=4)
    made = pickle.loads(pickle.dumps(scheduler(config, Location.at(tmp_path))))
    changed = made._custom_explore_fn({"lora_dropout": 0.6, "per_device_train_batch_size": 7.2, "weight_decay": 0.1})
    assert changed == {"lora_dropout": 0.5, "per_device_train_batch_size": 8.0, "weight_decay": 0.1}
    assert made._hyperparam_mutations["weight_decay"] == [0.1, 0.01]  # one of these, never a product
    assert made._hyperparam_mutations["lora_alpha.times_rank"] == [1.0, 2.0]
    assert isinstance(config.space["lora_dropout"], Uniform)


def reported(trial: Trial, step: int, loss: float) -> dict[str, Any]:
    return {"global_step": step, "eval_loss": loss, "trial_id": trial.trial_id}


def test_what_is_no_finite_number_is_kept_out_of_the_rungs(tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler="asha"), Location.at(tmp_path) / "rungs.json")
    made.set_search_properties("eval_loss", "min")
    trials = [Trial("nothing", trial_id=name, stub=True) for name in "abcd"]
    for trial in trials:
        made.on_trial_add(None, trial)
    diverged, second, good, bad = trials
    for trial, loss in ((diverged, math.inf), (second, math.nan)):
        assert made.on_trial_result(None, trial, reported(trial, 1, loss)) == TrialScheduler.CONTINUE
        made.on_trial_complete(None, trial, reported(trial, 1, loss))
    assert made.on_trial_result(None, good, reported(good, 1, 1.0)) == TrialScheduler.CONTINUE
    assert made.on_trial_result(None, bad, reported(bad, 1, 2.0)) == TrialScheduler.STOP


def test_median_stopping_knows_what_trials_had_told_that_ended_before_it_was_resumed(tmp_path: Path) -> None:
    def made() -> Any:
        median = scheduler(sweep(scheduler="median"), Location.at(tmp_path) / "rungs.json")
        median.set_search_properties("eval_loss", "min")
        return median

    trials = [Trial("nothing", trial_id=name, stub=True) for name in "abcd"]
    tune = Tune(made(), trials[:3])
    for trial, losses in zip(trials[:3], [(3.0, 1.0), (4.0, 2.0), (2.0, 5.0)], strict=True):
        for step, loss in enumerate(losses, start=1):
            tune.hear(trial, step, loss)
    for trial in trials[:2]:
        trial.set_status(Trial.TERMINATED)
    trials[2].update_last_result(reported(trials[2], 1, 2.0))  # Ray Tune's state is older
    tune = Tune(made(), restored(trials[:3]) + trials[3:])
    assert [len(tune.made._results[trial]) for trial in trials[:3]] == [2, 2, 1]
    assert tune.hear(trials[3], 2, 2.6) == TrialScheduler.STOP  # of running means 2 and 3, the median is 2.5


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


def test_what_a_population_draws_is_decided_by_the_seed_and_leaves_other_draws_as_they_were() -> None:
    def drawn(seed: str) -> tuple[float, float]:
        with _random_by(seed):
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


def hyperband(memory: Path) -> Any:
    """Of eight trials: the first four run to step 8, the others are halved at step 4."""
    rates = [n * 1e-4 for n in range(1, 9)]
    made = scheduler(sweep(scheduler="hyperband", space={"learning_rate": rates}), Location.at(memory))
    made.set_search_properties("eval_loss", "min")
    return made


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


def test_a_resumed_hyperband_has_its_brackets_as_they_were(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    assert [tune.hear(trial, 8, 1.0) for trial in trials[:3]] == [TrialScheduler.PAUSE] * 3
    assert [tune.hear(trial, 4, loss) for trial, loss in zip(trials[4:6], (1.0, 4.0), strict=True)] == ["PAUSE"] * 2

    tune = Tune(hyperband(tmp_path / "rungs.json"), restored(trials))  # the driver was killed
    assert {trial.trial_id for trial in trials if trial.status == Trial.PAUSED} == {"t0", "t1", "t2", "t4", "t5"}
    assert tune.made.choose_trial_to_run(tune) in [*trials[6:], trials[3]]  # nobody that waits for others goes on
    assert tune.hear(trials[6], 4, 2.0) == TrialScheduler.PAUSE
    assert tune.hear(trials[7], 4, 3.0) == TrialScheduler.STOP
    assert [trial.status for trial in trials[4:]] == ["PAUSED", "TERMINATED", "PAUSED", "TERMINATED"]
    assert tune.made.choose_trial_to_run(tune) in {trials[3], trials[4], trials[6]}

    trials[7].set_status(Trial.RUNNING)  # killed again: Ray Tune's own state is older
    trials[7].update_last_result(reported(trials[7], 2, 3.0))
    tune = Tune(hyperband(tmp_path / "rungs.json"), restored(trials))
    assert {trial.trial_id for trial in trials if trial.status == Trial.PENDING} == {"t3", "t4", "t6", "t7"}
    for trial in (trials[3], trials[4], trials[6]):
        tune.hear(trial, 8, 1.0)
    assert tune.made.choose_trial_to_run(tune) is trials[7]
    assert [tune.hear(trials[7], step, 3.0) for step in (3, 4)] == [TrialScheduler.CONTINUE, TrialScheduler.STOP]

    trials[7].set_status(Trial.RUNNING)  # and once more, when that was all that Ray Tune's state had not heard of
    Tune(hyperband(tmp_path / "rungs.json"), restored(trials))
    assert trials[7].status == Trial.TERMINATED


def test_a_trial_that_is_tried_again_stays_in_its_bracket(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    tune.hear(trials[0], 2, 1.0)
    for again in (True, False):
        trials[0].set_status(Trial.ERROR if again else Trial.RUNNING)
        tune.made.on_trial_error(tune, trials[0])
        if again:
            trials[0].set_status(Trial.PENDING)
            tune.made.on_trial_add(tune, trials[0])
        assert (trials[0] in tune.made._hyperbands[0][0].current_trials()) == again
    assert len(tune.made._hyperbands[0][1].current_trials()) == 4


def test_no_trial_waits_in_hyperband_for_one_that_has_ended_by_itself(tmp_path: Path) -> None:
    trials = [Trial("nothing", trial_id=f"t{number}", stub=True) for number in range(8)]
    tune = Tune(hyperband(tmp_path / "rungs.json"), trials)
    for trial, loss in zip(trials[4:], (1.0, 2.0, 3.0, 4.0), strict=True):
        tune.hear(trial, 4, loss)
    assert tune.hear(trials[4], 8, 1.0) == TrialScheduler.PAUSE
    trials[5].set_status(Trial.RUNNING)
    tune.made.on_trial_complete(tune, trials[5], reported(trials[5], 6, math.inf))  # it diverged
    assert trials[4].status == Trial.TERMINATED, "its bracket is done"


def test_a_budget_keeps_for_each_trial_what_takes_it_to_its_first_evaluation(tmp_path: Path) -> None:
    # Of 100 tokens, 10 are kept for b and 10 for c, and a would spend 10 more: it stops at 70.
    budget = TokenBudget(Location.at(tmp_path) / "tokens.json", 100, first=10, trials=3)
    assert [budget("a", {"tokens": spent}) for spent in (10, 60, 70)] == [False, False, True]
    assert (budget("b", {"tokens": 10}), budget("c", {"tokens": 10})) == (True, False)
    assert not budget.stop_all()
    assert budget("c", {"tokens": 20}) and budget.stop_all()


def test_a_budget_that_is_spent_stops_nothing_before_every_trial_was_evaluated(tmp_path: Path) -> None:
    budget = TokenBudget(Location.at(tmp_path) / "tokens.json", 100, first=10, trials=2)
    assert budget("a", {"tokens": 120}) and not budget.stop_all()
    assert budget("b", {"tokens": 10}) and budget.stop_all()


def test_a_budget_remembers_what_trials_spent_that_ended_before_the_driver_did(tmp_path: Path) -> None:
    stopper = limits(sweep(max_tokens=100, max_hours=1), Location.at(tmp_path), 10)
    assert stopper is not None
    first, again = (pickle.loads(pickle.dumps(stopper)) for _ in range(2))  # as Ray Tune keeps it from the start
    assert not first("a", {"tokens": 70}) and not first("b", {"tokens": 10})
    assert not again("b", {"tokens": 20}) and not again.stop_all()
    assert again("b", {"tokens": 30}) and again.stop_all()


def test_hours_are_those_of_all_drivers(tmp_path: Path) -> None:
    def restarted(before: int) -> Any:
        (tmp_path / "seconds.json").write_text(json.dumps(before))
        return limits(sweep(max_hours=1), Location.at(tmp_path), 10)

    assert restarted(3600).stop_all()
    again = restarted(2000)
    assert not again.stop_all() and not again("a", {})
    assert json.loads((tmp_path / "seconds.json").read_text()) > 2000
