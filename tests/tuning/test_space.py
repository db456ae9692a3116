"""A search space is checked whole before anything starts."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import grid_size

COMMON = {"output_dir": "sweep", "training": {"model_path": "m", "dataset_path": "d", "max_steps": 4}}


def sweep(**changes: object) -> SweepConfig:
    return SweepConfig(**{**COMMON, "space": {"lora_r": [4, 8]}, **changes})


def test_a_grid_has_as_many_trials_as_combinations() -> None:
    config = sweep(space={"lora_r": [4, 8], "learning_rate": [1e-4, 1e-3, 1e-2]})
    assert grid_size(config.space) == 6


def test_trials_write_below_the_sweeps_folder() -> None:
    assert sweep().training.output_dir == "sweep/trials"


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space"),
        ({"lora_rank": [4]}, "did you mean lora_r"),
        ({"model_path": ["a", "b"]}, "cannot be searched"),
        ({"lora_r": []}, "has no values"),
        ({"lora_r": [4, 0]}, "lora_r: must be at least 1 .got 0"),
    ],
)
def test_a_space_that_cannot_be_searched_says_why(space: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(space=space)


def test_a_range_whose_ends_are_turned_round_is_refused() -> None:
    with pytest.raises(ConfigError, match="is not below"):
        sweep(space={"learning_rate": {"loguniform": [1e-2, 1e-4]}}, searcher="random", num_trials=2)


def test_sampling_needs_a_random_search_and_a_number_of_trials() -> None:
    space = {"learning_rate": {"loguniform": [1e-4, 1e-2]}}
    with pytest.raises(ConfigError, match="searcher: random"):
        sweep(space=space)
    with pytest.raises(ConfigError, match="num_trials"):
        sweep(space=space, searcher="random")
    assert sweep(space=space, searcher="random", num_trials=3).num_trials == 3


def test_a_metric_that_no_trial_would_report_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs evaluations"):
        sweep(training={**COMMON["training"], "eval_strategy": "no"})
