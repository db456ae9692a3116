"""A space is read as it is meant, and what is no domain is told in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import GUIDE, LogUniform


def sweep(space: object, **changes: object) -> SweepConfig:
    return SweepConfig(output_dir="o", training={"model_path": "m", "dataset_path": "d"}, space=space, **changes)


def test_guide_alone_is_all_that_the_guide_gives() -> None:
    assert list(sweep("guide").space) == list(GUIDE)
    with pytest.raises(ConfigError, match=r"space: must be a mapping \(got 'giude'\)"):
        sweep("giude")


def test_numbers_of_numpy_are_numbers() -> None:
    space = {"lora_r": np.array([4, 8]), "learning_rate": (np.float64(1e-3), 1e-2), "seed": range(2)}
    config = sweep(space)
    assert config.space == {"lora_r": [4, 8], "learning_rate": [1e-3, 1e-2], "seed": [0, 1]}
    assert json.dumps(config.resolved())


def test_a_domain_may_be_given_as_an_object() -> None:
    space = {"learning_rate": LogUniform(loguniform=(1e-4, 1e-3))}
    assert sweep(space, searcher="random", num_trials=2).space == space


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"logunifrom": [1e-4, 1e-3]}, r"got {'logunifrom': .*; did you mean loguniform\?"),
        (1e-3, r"wanted a list of values, guide, or one of choice, .*; got 0.001; did you mean \[0.001\]\?"),
        ({"uniform": [1e-4]}, r"uniform.1: is required"),
        ({"choice": []}, "choice: must have at least 1"),
        ({"uniform": [0, 1], "choice": [1]}, "wanted a list of values"),
        (None, "wanted a list of values"),
    ],
)
def test_what_is_no_domain_is_told_in_one_line(choice: object, message: str) -> None:
    with pytest.raises(ConfigError, match=r"space\.learning_rate: .*" + message) as refused:
        sweep({"learning_rate": choice})
    assert "\n" not in str(refused.value)
