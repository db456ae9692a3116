"""Settings that decide nothing beside others, or do not go with them, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.core.config import load_config
from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.combinations import Grid, idle_everywhere
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.space import settings_at


def sweep(space: dict, training: dict | None = None, **changes: object) -> SweepConfig:
    given = {"model_path": "m", "dataset_path": "d", **(training or {})}
    return SweepConfig(output_dir="o", training=given, space=space, **changes)


@pytest.mark.parametrize(
    ("space", "training", "why"),
    [
        ({"num_train_epochs": [1, 2]}, {"max_steps": 4}, "is overridden by max_steps"),
        ({"num_train_epochs": [1, 2], "max_steps": [4, 8]}, {}, "is overridden by max_steps"),
        ({"warmup_ratio": [0.1, 0.2]}, {"warmup_steps": 2}, "is overridden by warmup_steps"),
        ({"eval_steps": [1, 2]}, {"eval_strategy": "epoch"}, "belongs to eval_strategy steps"),
        ({"eval_steps": [1, 2], "eval_strategy": ["epoch", "no"]}, {}, "belongs to eval_strategy steps"),
        ({"lora_r": [4, 8]}, {"method": "full"}, r"belongs to method lora or qlora \(got full\)"),
        (
            {"lora_r": [4, 8], "method": ["full", "prefix_tuning"]},
            {},
            r"belongs to method lora or qlora \(got full\) and .*\(got prefix_tuning\)",
        ),
        ({"lora_alpha": {"times_rank": [1, 2]}}, {"method": "prefix_tuning"}, "belongs to method lora or qlora"),
        ({"num_virtual_tokens": [8, 16]}, {}, "belongs to method prefix_tuning or prompt_tuning"),
        ({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {}, "belongs to a base of 4 bits"),
        ({"bnb_4bit_quant_type": ["nf4", "fp4"]}, {"method": "qlora", "bits": 8}, "belongs to a base of 4 bits"),
        ({"per_device_eval_batch_size": [1, 2]}, {"eval_strategy": "no"}, "needs evaluations"),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(space: dict, training: dict, why: str) -> None:
    key = next(iter(space))
    with pytest.raises(ConfigError, match=rf"space\.{key}: would change nothing: it {why}.*; leave it out"):
        sweep(space, training)


def test_a_temperature_that_nothing_is_softened_by_is_refused() -> None:
    distilled = {"teacher_path": "t", "hard_loss_weight": 1.0}
    space = {"temperature": [1.0, 2.0]}
    with pytest.raises(ConfigError, match=r"space\.temperature: would change nothing: it softens what"):
        sweep(space, distilled, objective="distill")
    assert (
        sweep(
            {**space, "hard_loss_weight": {"uniform": [0.5, 1.0]}},
            {"teacher_path": "t"},
            objective="distill",
            searcher="random",
            num_trials=2,
        ).trials
        == 2
    )


def test_what_training_sets_and_no_trial_looks_at_is_found_whatever_the_space_searches() -> None:
    def found(space: dict, training: dict) -> list[str]:
        config = sweep(space, training)
        return [name for name in idle_everywhere(config.space, config.training) if config.training.differs(name)]

    assert found({"max_steps": [4, 8]}, {"num_train_epochs": 9}) == ["num_train_epochs"]
    assert found({"max_steps": [None, 8]}, {"num_train_epochs": 9}) == []
    assert found({"learning_rate": [1e-3]}, {"eval_generation_metric": "bleu"}) == ["eval_generation_metric"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheduler": "none", "grace_steps": 2}, r"grace_steps: belongs to scheduler asha or .* \(got none"),
        ({"scheduler": "median", "reduction_factor": 3}, "reduction_factor: belongs to scheduler asha or hyperband"),
        ({"repeat_seeds": 3}, r"repeat_seeds: nothing is repeated \(repeat_top is 0\)"),
        ({"seed": 1}, "seed: a grid draws nothing; what trials draw follows from training.seed"),
        ({"cpus_per_trial": 2}, "cpus_per_trial: the workers of a trial are given training.cpus_per_worker"),
    ],
)
def test_settings_of_another_kind_of_search_are_refused(changes: dict, words: str) -> None:
    training = {"num_workers": 2, "max_steps": 8}
    with pytest.raises(ConfigError, match=f"SweepConfig: {words}"):
        sweep({"learning_rate": [1e-4, 1e-3]}, training, **changes)
    mended = {"scheduler": "asha", "repeat_top": 1}
    if "seed" in changes:
        mended |= {"searcher": "random", "num_trials": 2}
    assert sweep({"learning_rate": [1e-4, 1e-3]}, {"max_steps": 8}, **{**changes, **mended})


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


def test_a_grid_is_worked_out_once_and_is_no_setting() -> None:
    one, other = sweep({"lora_r": [4, 8]}), sweep({"lora_r": [4, 8]})
    assert one.grid is one.grid
    assert (one, one.identity()) == (other, other.identity())
    assert set(one.model_dump()) == set(SweepConfig.model_fields)
    assert one.with_overrides(space={"lora_r": [4, 8, 16]}).trials == 3


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
