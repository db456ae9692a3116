"""Packs: a base for each combination of what a base decides, and a name for it."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.tuning.combinations import Grid
from raytune_ft.tuning.packs import Packs, name_of
from raytune_ft.tuning.space import settings_at

TRAINING = FineTuningConfig(model_path="m", dataset_path="d", output_dir="o")


def test_settings_that_adapters_may_differ_in_make_no_packs() -> None:
    packs = Packs.of({"lora_r": [4, 8], "learning_rate": [1e-4, 1e-3]}, TRAINING)
    assert (packs.keys, list(packs.settings)) == ((), ["all trials"])
    assert packs.apart() == {}
    assert name_of(packs.keys, {"lora_r": 4}) == "all trials"


def test_what_trials_adapt_is_known_to_every_pack() -> None:
    assert Packs.of({"lora_r": [4, 8]}, TRAINING).targets == (["q_proj", "v_proj"],)
    packs = Packs.of({"lora_target_modules": [["q_proj"], "all-linear"], "max_length": [64, 128]}, TRAINING)
    assert packs.without(["max_length 64"]).targets == packs.targets == (["q_proj"], "all-linear")


def test_every_combination_of_what_a_base_decides_is_a_pack() -> None:
    packs = Packs.of({"max_length": [64, 128], "lora_r": [4, 8], "precision": ["fp32", "bf16"]}, TRAINING)
    assert list(packs.settings) == [
        "precision fp32, max_length 64",
        "precision fp32, max_length 128",
        "precision bf16, max_length 64",
        "precision bf16, max_length 128",
    ]
    assert packs.settings["precision bf16, max_length 64"].max_length == 64
    assert packs.lengths() == [64, 128]
    assert (
        name_of(packs.keys, {"max_length": 128, "lora_r": 4, "precision": "fp32"}) == "precision fp32, max_length 128"
    )


def test_what_decides_nothing_beside_the_others_makes_no_pack() -> None:
    """Four bits have a number format, and a base in full precision has none: `settings_at` leaves it out."""
    space = {"method": ["lora", "qlora"], "bnb_4bit_quant_type": ["fp4", "nf4"]}
    packs = Packs.of(space, TRAINING)
    assert list(packs.settings) == [
        *("method lora, bnb_4bit_quant_type nf4", "method qlora, bnb_4bit_quant_type fp4"),
        "method qlora, bnb_4bit_quant_type nf4",
    ]
    shared = TRAINING.model_dump(mode="json")
    for point in Grid.whole(space).points:
        assert name_of(packs.keys, {**shared, **settings_at(point, shared)}) in packs.settings


def test_a_pack_that_cannot_share_a_base_is_named() -> None:
    packs = Packs.of({"method": ["lora", "full"]}, TRAINING)
    [(name, why)] = packs.apart().items()
    assert name == "method full" and why.startswith("a packed sweep shares one frozen base")
    assert list(packs.without(packs.apart()).settings) == ["method lora"]


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"space: method lora, bits 4 do not go together: .*qlora"):
        Packs.of({"method": ["lora", "qlora"], "bits": [4, 8]}, TRAINING)
