"""The scheduler and the searcher that settings name."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune import register_trainable
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter

from raytune_ft.core.storage import Location
from raytune_ft.tuning.schedulers.choice import domain, scheduler, searcher
from raytune_ft.tuning.space import Choice, LogUniform, QUniform, TimesRank, Uniform

from .stand_in import Tune, sweep


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_trials_go_on_to_the_last_step_that_is_searched(name: str, tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler=name, space={"max_steps": [16, 32, 8]}), Location.at(tmp_path))
    assert (made._max_t if name == "asha" else made._max_t_attr) == 32
    assert scheduler(sweep(scheduler="asha"), Location.at(tmp_path))._max_t == 8


def test_asha_compares_from_the_grace_steps_on_and_keeps_one_in_as_many_as_the_reduction_factor(tmp_path: Path) -> None:
    made = scheduler(sweep(scheduler="asha", grace_steps=2, reduction_factor=2), Location.at(tmp_path) / "rungs.json")
    made.set_search_properties("eval_loss", "min")
    tune = Tune(made, [Trial("nothing", trial_id=name, stub=True) for name in "abcdefg"])
    assert {tune.hear(trial, 1, 9.0 - place) for place, trial in enumerate(tune.trials)} == {TrialScheduler.CONTINUE}
    assert tune.hear(tune.trials[0], 1, 99.0) == TrialScheduler.CONTINUE  # nothing is compared before step 2
    at_two = [5.0, 4.0, 3.0, 2.0, 1.0, 2.5, 3.5]  # the first five: each the best so far; their median is 3
    said = [tune.hear(trial, 2, loss) for trial, loss in zip(tune.trials, at_two, strict=True)]
    assert said == [*[TrialScheduler.CONTINUE] * 6, TrialScheduler.STOP]
    assert [milestone for milestone, _ in made._brackets[0]._rungs] == [8, 4, 2]


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


def test_settings_are_drawn_as_the_space_says() -> None:
    def drawn(choice: Any) -> list[float]:
        return domain(choice, grid=False).sample(size=400, random_state=np.random.RandomState(0))

    rates = drawn(LogUniform(loguniform=(1e-4, 1e-2)))
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2
    assert 0.4 < sum(rate < 1e-3 for rate in rates) / 400 < 0.6  # half of them below the geometric mean
    dropouts = drawn(Uniform(uniform=(0.0, 0.5)))
    assert min(dropouts) >= 0.0 and max(dropouts) <= 0.5
    assert 0.4 < sum(rate < 0.25 for rate in dropouts) / 400 < 0.6
    assert set(drawn(QUniform(quniform=(4, 16, 4)))) == {4.0, 8.0, 12.0, 16.0}
    assert set(drawn(Choice(choice=[1, 3]))) == set(drawn([1, 3])) == {1, 3}
    assert domain([1, 3], grid=True) == {"grid_search": [1, 3]}
    assert domain(TimesRank(times_rank=[1, 2]), grid=True) == {"grid_search": [1.0, 2.0]}


@pytest.mark.parametrize("how", ["random", "optuna"])
def test_the_seed_of_a_search_decides_which_points_are_tried(how: str, tmp_path: Path) -> None:
    register_trainable("nothing", lambda config: None)

    def drawn(seed: int) -> list[float]:
        rates = {"learning_rate": {"uniform": [0.1, 1.0]}}
        config = sweep(searcher=how, num_trials=3, seed=seed, space=rates)
        made, space = searcher(config, 3), {"learning_rate": domain(config.space["learning_rate"], grid=False)}
        if how == "optuna":
            made.set_search_properties("eval_loss", "min", space)
            return [made.suggest(name)["learning_rate"] for name in "abc"]
        common = {"run": "nothing", "config": space, "num_samples": 3, "storage_path": str(tmp_path)}
        made.add_configurations({"t": common})
        return [made.next_trial().config["learning_rate"] for _ in range(3)]

    first = drawn(1)
    assert first == drawn(1) and len(set(first)) == 3
    assert not set(first) & set(drawn(2))


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


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        ({"learning_rate": 5e-5, "lora_dropout": -0.1, "per_device_train_batch_size": 0.5}, (1e-4, 0.0, 4)),
        ({"learning_rate": 2e-2, "lora_dropout": 0.7, "per_device_train_batch_size": 21.0}, (1e-2, 0.5, 16)),
        ({"learning_rate": 3e-3, "lora_dropout": 0.2, "per_device_train_batch_size": 9.0}, (3e-3, 0.2, 8)),
    ],
)
def test_what_a_population_multiplies_is_put_back_into_its_range_at_both_ends(
    made: dict, kept: tuple, tmp_path: Path
) -> None:
    space = {
        "learning_rate": {"loguniform": [1e-4, 1e-2]},
        "lora_dropout": {"uniform": [0.0, 0.5]},
        "per_device_train_batch_size": {"quniform": [4, 16, 4]},
    }
    population = scheduler(sweep(scheduler="pbt", space=space, searcher="random", num_trials=4), Location.at(tmp_path))
    assert tuple(population._custom_explore_fn(dict(made)).values()) == kept
