"""A sweep's settings in Ray Tune's terms."""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.tune import register_trainable
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter

from raytune_ft.core.storage import Location
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.schedulers import TokenBudget, scheduler, searcher
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


def test_a_resumed_hyperband_waits_for_no_trial_that_has_ended(tmp_path: Path) -> None:
    rates = [n * 1e-4 for n in range(1, 7)]
    made = scheduler(sweep(scheduler="hyperband", space={"learning_rate": rates}), Location.at(tmp_path))
    made.set_search_properties("eval_loss", "min")
    trials = [Trial("nothing", trial_id=str(number), stub=True) for number in range(6)]
    for trial in trials[:2]:
        trial.set_status(Trial.TERMINATED)
    trials[2].set_status(Trial.PAUSED)
    for trial in trials:
        made.on_trial_add(None, trial)
    waited_for = {trial for hyperband in made._hyperbands for bracket in hyperband for trial in bracket._live_trials}
    assert waited_for == set(trials[2:])
    assert made.choose_trial_to_run(None) is trials[2]


def test_a_budget_keeps_for_each_trial_what_takes_it_to_its_first_evaluation() -> None:
    # Of 100 tokens, 10 are kept for b and 10 for c, and a would spend 10 more: it stops at 70.
    budget = TokenBudget(100, first=10, trials=3)
    assert [budget("a", {"tokens": spent}) for spent in (10, 60, 70)] == [False, False, True]
    assert (budget("b", {"tokens": 10}), budget("c", {"tokens": 10})) == (True, False)
    assert not budget.stop_all()
    assert budget("c", {"tokens": 20}) and budget.stop_all()


def test_a_budget_that_is_spent_stops_nothing_before_every_trial_was_evaluated() -> None:
    budget = TokenBudget(100, first=10, trials=2)
    assert budget("a", {"tokens": 120}) and not budget.stop_all()
    assert budget("b", {"tokens": 10}) and budget.stop_all()
