"""The scheduler and the searcher that settings name."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
from ray.tune import register_trainable
from ray.tune.search import ConcurrencyLimiter

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.choice import scheduler, searcher
from raytune_ft.tuning.space import Uniform

from .stand_in import sweep


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
