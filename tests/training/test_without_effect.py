"""Settings that decide nothing are told where a run begins."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.recommend import recommend_method
from raytune_ft.training.without_effect import without_effect

WHERE = {"model_path": "model", "dataset_path": "rows.jsonl", "output_dir": "out"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "full", "lora_r": 64, "lora_alpha": 128}, r"lora_r belongs .*lora_alpha belongs .*\(got full\)"),
        (
            {"method": "prefix_tuning", "lora_target_modules": "all-linear"},
            "lora_target_modules belongs",
        ),
        ({"num_virtual_tokens": 5}, r"num_virtual_tokens belongs to method prefix_tuning or .*\(got lora\)"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type belongs to a base of 4 bits"),
        ({"eval_strategy": "no", "eval_generation_rows": 3}, "eval_generation_rows needs evaluations"),
        (
            {"eval_strategy": "no", "metric_for_best_model": "eval_perplexity"},
            "metric_for_best_model needs eval",
        ),
    ],
)
def test_a_setting_that_decides_nothing_is_found(given: dict[str, Any], words: str) -> None:
    idle = without_effect(FineTuningConfig(**WHERE, **given))
    assert re.search(words, "; ".join(f"{name} {why}" for name, why in idle.items()))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "full"},
        {"lora_r": 64, "lora_target_modules": "all-linear"},
        {"method": "qlora", "bnb_4bit_quant_type": "fp4", "lora_r": 4},
        {"method": "qlora", "bits": 4, "bnb_4bit_use_double_quant": False},
        {"method": "prompt_tuning", "num_virtual_tokens": 5},
        {"eval_generation_rows": 3},
    ],
)
def test_settings_that_decide_something_pass_and_stay(given: dict[str, Any]) -> None:
    assert not without_effect(FineTuningConfig(**WHERE, **given))


@pytest.mark.parametrize("memory_gib", [8, 16, 80])
def test_what_is_recommended_passes(memory_gib: float) -> None:
    found = recommend_method(memory_gib=memory_gib, model="1B").settings
    assert not without_effect(FineTuningConfig(**WHERE, **found))


@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs", "lora_alpha", "max_grad_norm", "weight_decay"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_numbers_are_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: must be a finite number"):
        FineTuningConfig(**WHERE, **{name: value})


def test_an_adapter_of_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="lora_target_modules: must name at least one linear layer"):
        FineTuningConfig(**WHERE, lora_target_modules=[])
