"""Settings that decide nothing beside others, or do not go with them, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.config import SweepConfig


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
    assert sweep({"num_train_epochs": [1, 2], "max_steps": [None, 4]}).trials == 4
    assert sweep({"lora_r": [4, 8], "method": ["lora", "full"]}).trials == 4
    assert sweep({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {"method": "qlora"}).trials == 2
    assert sweep({"eval_steps": [1, 2]}, {"eval_strategy": "steps"}).trials == 2


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
