"""Settings that decide nothing beside others, or do not go with them, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.combinations import Grid
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import settings_at


def sweep(space: dict, training: dict | None = None, **changes: object) -> SweepConfig:
    given = {"model_path": "m", "dataset_path": "d", **(training or {})}
    return SweepConfig(output_dir="o", training=given, space=space, **changes)


@pytest.mark.parametrize(
    ("space", "training", "why"),
    [
        ({"num_train_epochs": [1, 2]}, {"max_steps": 4}, "max_steps overrides it"),
        ({"num_train_epochs": [1, 2], "max_steps": [4, 8]}, {}, "max_steps overrides it"),
        ({"warmup_ratio": [0.1, 0.2]}, {"warmup_steps": 2}, "warmup_steps overrides it"),
        ({"eval_steps": [1, 2]}, {"eval_strategy": "epoch"}, "belongs to eval_strategy: steps"),
        ({"lora_r": [4, 8]}, {"method": "full"}, r"belongs to method lora or qlora \(method: full\)"),
        ({"lora_alpha": {"times_rank": [1, 2]}}, {"method": "prefix_tuning"}, "belongs to method lora or qlora"),
        ({"num_virtual_tokens": [8, 16]}, {}, "belongs to method prefix_tuning or prompt_tuning"),
        ({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {}, "belongs to a base of 4 bits"),
        ({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {"method": "qlora", "bits": 8}, "belongs to a base of 4 bits"),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(space: dict, training: dict, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"space\.{next(iter(space))}: would change nothing: .*{why}"):
        sweep(space, training)


def test_a_key_that_changes_some_trials_is_searched() -> None:
    assert sweep({"num_train_epochs": [1, 2], "max_steps": [None, 4]}).trials == 3
    assert sweep({"lora_r": [4, 8], "method": ["lora", "full"]}).trials == 3
    assert sweep({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {"method": "qlora"}).trials == 2
    assert sweep({"eval_steps": [1, 2]}, {"eval_strategy": "steps"}).trials == 2


@pytest.mark.parametrize(
    ("space", "left_out", "why"),
    [
        ({"lora_r": [4, 8], "method": ["lora", "full"]}, 1, ["lora_r belongs to method lora or qlora (got full)"]),
        (
            {"lora_alpha": {"times_rank": [1, 2]}, "lora_r": [4, 8], "method": ["prefix_tuning", "lora"]},
            3,
            [f"{name} belongs to method lora or qlora (got prefix_tuning)" for name in ("lora_r", "lora_alpha")],
        ),
        ({"num_train_epochs": [1, 2], "max_steps": [None, 4]}, 1, ["num_train_epochs is overridden by max_steps"]),
        (
            {"per_device_train_batch_size": [1, 2, 4], "gradient_accumulation_steps": [1, 2]},
            2,
            ["of per_device_train_batch_size and gradient_accumulation_steps the product counts"],
        ),
        ({"lora_r": [4, 8, 4]}, 1, ["a value is given twice"]),
        ({"lora_r": [4, 8], "learning_rate": [1e-4, 1e-3]}, 0, []),
    ],
)
def test_combinations_that_come_to_the_same_run_are_tried_once(space: dict, left_out: int, why: list[str]) -> None:
    grid = sweep(space).grid
    assert (grid.left_out, list(grid.reasons)) == (left_out, why)
    assert len(grid.points) == len(Grid.whole(sweep(space).space).points) - left_out == sweep(space).trials
    trials = [settings_at(point, sweep(space).training.model_dump(mode="json")) for point in grid.points]
    assert all(trials[:place].count(trial) == 0 for place, trial in enumerate(trials))


def test_a_population_begins_with_all_combinations() -> None:
    space = {"learning_rate": [1e-4, 1e-4, 1e-3]}
    assert sweep(space, {"max_steps": 8}, scheduler="pbt").trials == 3 == sweep(space).trials + 1


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        ({"use_dora": [True, False], "use_rslora": [False, True]}, {}, "use_dora True, use_rslora True do not go"),
        (
            {"early_stopping_patience": [None, 2], "eval_strategy": ["epoch", "no"]},
            {"metric": "loss"},
            "early_stopping_patience 2, eval_strategy no do not go together: early_stopping_patience needs",
        ),
        ({"eval_strategy": ["no", "epoch"]}, {}, "metric: eval_loss needs evaluations of every trial"),
    ],
)
def test_values_of_two_keys_that_do_not_go_together_are_refused(space: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(space, **changes)


def test_the_sweep_that_is_shipped_is_valid() -> None:
    config = Path(__file__).parents[2] / "jobs/configs/tune.yaml"
    assert load_config(SweepConfig, config).trials == 6
