"""Which trials can share a bank."""

from __future__ import annotations

from raytune_ft.training.bank.trial import disagreement, pack_key

from .conftest import Settings


def test_trials_of_other_rates_ranks_and_seeds_share_a_bank(trial: Settings) -> None:
    configs = [trial(), trial(lora_r=64, learning_rate=1e-5, seed=9, lora_target_modules=["q_proj"], max_steps=3)]
    assert disagreement(configs) is None
    assert len({pack_key(config) for config in configs}) == 1


def test_the_first_setting_that_keeps_trials_apart_is_named(trial: Settings) -> None:
    assert disagreement([trial(), trial(max_length=99)]) == "max_length differs (1024, 99)"
    assert disagreement([trial(), trial(method="qlora")]) == "method differs (lora, qlora)"
    assert disagreement([trial(method="qlora"), trial(method="qlora", bits=8)]) == "bits differs (4, 8)"
