"""Each trial's losses are those of the same trial alone."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.training.bank import stacked_slot

from .conftest import MakeBank, Settings, losses_of
from .reference import reference_losses

MIXED = {
    "small": {"lora_r": 4, "lora_alpha": 8, "seed": 1, "warmup_steps": 5},
    "wide": {"lora_r": 32, "lora_alpha": 64, "learning_rate": 2e-3, "per_device_train_batch_size": 3, "seed": 2},
    "accumulating": {
        "lora_r": 8,
        "gradient_accumulation_steps": 3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "seed": 3,
    },
    "clipped": {
        "lora_r": 16,
        "use_rslora": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.05,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-4,
        "seed": 4,
    },
}


@pytest.fixture(params=["ragged", "stacked"])
def arithmetic(request: pytest.FixtureRequest) -> str:
    return request.param


def difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_losses_of_60_steps_equal_plain_peft_on_padded_batches(make_bank: MakeBank, trial: Settings, rows) -> None:
    configs = {name: trial(max_steps=60, **{"warmup_steps": 0, **changes}) for name, changes in MIXED.items()}
    alone = {name: reference_losses(config, rows, 60) for name, config in configs.items()}
    for arithmetic in ("ragged", "stacked"):
        bank = make_bank(arithmetic=arithmetic)
        for name, config in configs.items():
            bank.admit(name, config)
        packed = losses_of(bank)
        for name in configs:
            assert difference(packed[name], alone[name]) <= 1e-5, (arithmetic, name)
            assert alone[name][-1] < alone[name][0], name


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "gemma2",
            {"head_dim": 16, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "sliding_window": 8},
        ),
        ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    ],
)
def test_losses_on_a_base_that_bends_its_scores_and_logits_equal_plain_peft(
    kind: str, settings: dict, make_bank: MakeBank, trial: Settings, rows, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(tiny_model)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, vocab_size=len(tokens), num_key_value_heads=2, **shape, **settings)
    config.initializer_range = 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    common = {"model_path": str(tmp_path), "max_steps": 15, "warmup_steps": 0}
    configs = {name: trial(**{**common, **changes}) for name, changes in MIXED.items()}
    for arithmetic in ("ragged", "stacked"):
        bank = make_bank(arithmetic=arithmetic, of=tmp_path)
        for name, config in configs.items():
            bank.admit(name, config)
        packed = losses_of(bank)
        for name, config in configs.items():
            assert difference(packed[name], reference_losses(config, rows, 15)) <= 1e-5, (arithmetic, name)


def losses_like_alone(make_bank: MakeBank, configs: dict[str, Any], arithmetic: str) -> dict[str, list[float]]:
    """The losses of trials in one bank, which are those that each has in a bank of its own."""
    bank = make_bank(arithmetic=arithmetic)
    for name, config in configs.items():
        bank.admit(name, config)
    packed = losses_of(bank)
    for name, config in configs.items():
        solo = make_bank(arithmetic="ragged")
        solo.admit(name, config)
        assert difference(packed[name], losses_of(solo)[name]) <= 1e-5, name
    return packed


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_equals_a_bank_of_one(make_bank: MakeBank, trial: Settings, dropout: float, arithmetic: str) -> None:
    configs = {name: trial(max_steps=12, lora_dropout=dropout, **changes) for name, changes in MIXED.items()}
    losses_like_alone(make_bank, configs, arithmetic)


def test_slots_in_several_blocks_compute_the_same(
    make_bank: MakeBank, trial: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {name: trial(max_steps=6, **changes) for name, changes in MIXED.items()}
    found = []
    for block in (stacked_slot._BLOCK, 300):
        monkeypatch.setattr(stacked_slot, "_BLOCK", block)
        bank = make_bank(arithmetic="stacked")
        for name, config in configs.items():
            bank.admit(name, config)
        found.append(losses_of(bank))
    for name in configs:
        assert difference(*(losses[name] for losses in found)) <= 1e-6


def test_dropout_changes_the_losses(make_bank: MakeBank, trial: Settings) -> None:
    bank = make_bank()
    for name, changes in {"none": {}, "some": {"lora_dropout": 0.3}, "other": {"lora_dropout": 0.3, "seed": 9}}.items():
        bank.admit(name, trial(**changes))
    losses = losses_of(bank)
    assert difference(losses["none"], losses["some"]) > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_neighbour_of_nan_changes_no_bit(
    make_bank: MakeBank, trial: Settings, dropout: float, arithmetic: str
) -> None:
    histories = []
    for poisoned in (False, True):
        bank = make_bank(arithmetic=arithmetic)
        for name in ("left", "neighbour", "right"):
            bank.admit(name, trial(lora_r=8, lora_dropout=dropout, seed=len(name)))
        snapshot = bank.snapshot("neighbour")
        if poisoned:
            for weight in snapshot.weights.values():
                weight.fill_(math.nan)
        bank.evict("neighbour")
        bank.admit("neighbour", trial(lora_r=8, lora_dropout=dropout), snapshot)
        bank.admit("fourth", trial(lora_r=8, lora_dropout=dropout))  # two lanes take an even number at once
        first = bank.step()
        assert any(math.isnan(p.metrics["loss"]) for p in first) == poisoned
        while bank.step():
            pass
        histories.append({name: bank.trial(name).history for name in ("left", "right")})
        finite = all(torch.isfinite(w).all() for n in ("left", "right") for w in bank.snapshot(n).weights.values())
        assert finite
    assert histories[0]["left"][0] == histories[1]["left"][0]
    assert histories[0]["right"][0] == histories[1]["right"][0]


def test_a_neighbour_that_stays_nan_changes_no_bit_of_any_step(
    make_bank: MakeBank, trial: Settings, arithmetic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bank marks a trial of NaN infeasible at once; here it is kept stepping, so that shapes stay equal.
    from raytune_ft.training.bank.trial import Trial

    monkeypatch.setattr(Trial, "fail", lambda self, reason: None)
    histories = []
    for poisoned in (False, True):
        bank = make_bank(arithmetic=arithmetic)
        bank.admit("neighbour", trial(lora_r=8, lora_dropout=0.2))
        bank.admit("kept", trial(lora_r=16, lora_dropout=0.2, seed=5))
        snapshot = bank.snapshot("neighbour")
        if poisoned:
            next(iter(snapshot.weights.values())).fill_(math.nan)
        bank.evict("neighbour")
        bank.admit("neighbour", trial(lora_r=8, lora_dropout=0.2), snapshot)
        for _ in range(6):
            bank.step()
        assert all(math.isnan(row["loss"]) == poisoned for row in bank.trial("neighbour").history)
        histories.append((bank.trial("kept").history, bank.snapshot("kept")))
    (clean, clean_end), (beside_nan, nan_end) = histories
    assert clean == beside_nan
    assert all(torch.equal(tensor, nan_end.weights[name]) for name, tensor in clean_end.weights.items())


def test_neighbours_that_enter_stop_and_are_replaced_change_nothing(
    make_bank: MakeBank, trial: Settings, arithmetic: str
) -> None:
    config = trial(max_steps=14, lora_r=8, lora_dropout=0.1)
    solo = make_bank()
    solo.admit("kept", config)
    alone = losses_of(solo)["kept"]
    bank = make_bank(arithmetic=arithmetic)
    bank.admit("first", trial(max_steps=14, seed=7))
    bank.admit("kept", config)
    for _ in range(3):
        bank.step()
    bank.evict("first")
    bank.step()
    bank.admit("second", trial(max_steps=3, lora_r=32, seed=8))
    third = trial(max_steps=14, lora_target_modules=["o_proj"], seed=9)
    bank.admit("third", third)
    bank.step()
    taken = bank.snapshot("third")
    bank.evict("third")
    bank.step()
    bank.admit("third", third, taken)
    assert difference(losses_of(bank)["kept"], alone) <= 1e-5


def test_a_neighbour_that_adapts_further_layers_changes_nothing(
    make_bank: MakeBank, trial: Settings, arithmetic: str
) -> None:
    config = trial(max_steps=8, lora_target_modules=["q_proj", "v_proj"], learning_rate=5e-3)
    solo = make_bank()
    solo.admit("kept", config)
    alone = losses_of(solo)["kept"]
    bank = make_bank(arithmetic=arithmetic)
    bank.admit("kept", config)
    for _ in range(4):
        bank.step()
    before = bank.snapshot("kept")
    bank.admit("further", trial(max_steps=4, lora_r=16, lora_target_modules=["o_proj", "q_proj"], seed=8))
    after = bank.snapshot("kept")
    assert after.step == 4 and before.moments
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    assert all(torch.equal(tensor, after.moments[name]) for name, tensor in before.moments.items())
    assert difference(losses_of(bank)["kept"], alone) <= 1e-5


def test_trials_that_take_turns_get_the_same_losses(make_bank: MakeBank, trial: Settings, arithmetic: str) -> None:
    configs = {name: trial(max_steps=6, lora_dropout=0.1, **changes) for name, changes in MIXED.items()}
    histories = []
    for budget in (10_000, 60, 1):  # all together; two or so at a time; row by row
        bank = make_bank(arithmetic=arithmetic, token_budget=budget)
        for name, config in configs.items():
            bank.admit(name, config)
        histories.append(losses_of(bank))
    for name in configs:
        for before, after in pairwise(histories):
            assert difference(before[name], after[name]) <= 1e-5, name


def test_an_idle_slot_keeps_every_bit(make_bank: MakeBank, trial: Settings, arithmetic: str) -> None:
    bank = make_bank(arithmetic=arithmetic)
    bank.admit("done", trial(max_steps=2, weight_decay=0.5))
    bank.admit("running", trial(max_steps=6))
    bank.step()
    bank.step()
    before = bank.snapshot("done")
    losses_of(bank)
    after = bank.snapshot("done")
    assert (before.step, bank.trial("running").step) == (2, 6)
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    assert before.moments
    assert all(torch.equal(tensor, after.moments[name]) for name, tensor in before.moments.items())


def test_quantized_bases_give_the_losses_of_a_bank_of_one(trial: Settings, rows, arithmetic: str) -> None:
    from raytune_ft.training.bank.bank import AdapterBank
    from raytune_ft.training.bank.base import load_frozen_base

    for bits in (4, 8):
        common = {"method": "qlora", "bits": bits, "max_steps": 4, "learning_rate": 2e-2, "warmup_steps": 0}
        configs = {n: trial(**common, seed=n, lora_r=4 * n) for n in (1, 2, 3)}
        bank = AdapterBank(load_frozen_base(configs[1], "cpu"), rows, arithmetic=arithmetic)
        for number, config in configs.items():
            bank.admit(str(number), config)
        packed = losses_of(bank)
        for number, config in configs.items():
            solo = AdapterBank(load_frozen_base(config, "cpu"), rows)
            solo.admit(str(number), config)
            assert difference(packed[str(number)], losses_of(solo)[str(number)]) <= 1e-4, (bits, number)


@pytest.mark.parametrize("number_format", [{"precision": "bf16"}, {"method": "qlora", "bits": 4}], ids=["bf16", "nf4"])
def test_in_low_precision_packing_moves_losses_no_more_than_the_order_of_a_batchs_rows(
    number_format, tiny_model, trial: Settings, rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measure is twice the largest drift between a trial alone and the same with each batch's rows reversed."""
    from raytune_ft.training.bank.bank import AdapterBank
    from raytune_ft.training.bank.base import load_frozen_base
    from raytune_ft.training.bank.trial import Trial

    shared = {**number_format, "max_steps": 20, "per_device_train_batch_size": 4}
    configs = {str(n): trial(**shared, seed=n, lora_r=4 * n, lora_alpha=8 * n) for n in (1, 2, 3, 4)}

    def run(names: list[str]) -> dict[str, list[float]]:
        bank = AdapterBank(load_frozen_base(configs["1"], "cpu"), rows)
        for name in names:
            bank.admit(name, configs[name])
        return losses_of(bank)

    packed = run(list(configs))
    alone = {name: run([name])[name] for name in configs}
    upcoming = Trial.upcoming
    monkeypatch.setattr(Trial, "upcoming", lambda self: replace(upcoming(self), rows=upcoming(self).rows[::-1]))
    permuted = {name: run([name])[name] for name in configs}
    drift = max(difference(alone[name], permuted[name]) for name in configs)
    assert drift > 0
    assert max(difference(packed[name], alone[name]) for name in configs) <= 2 * drift


def test_trials_that_drop_features_and_such_as_do_not_share_a_pass(
    make_bank: MakeBank, trial: Settings, arithmetic: str
) -> None:
    configs = {name: trial(max_steps=5, lora_dropout=rate) for name, rate in (("all", 0.0), ("half", 0.5))}
    packed = losses_like_alone(make_bank, configs, arithmetic)
    assert difference(packed["all"], packed["half"]) > 1e-4


def test_the_gradients_norm_is_that_of_the_trial_also_where_others_wait(
    make_bank: MakeBank, trial: Settings, arithmetic: str
) -> None:
    configs = {name: trial(max_steps=3, **changes) for name, changes in MIXED.items()}
    bank = make_bank(arithmetic=arithmetic, token_budget=1)  # one at a time
    for name, config in configs.items():
        bank.admit(name, config)
    losses_of(bank)
    for name, config in configs.items():
        solo = make_bank(arithmetic="ragged")
        solo.admit(name, config)
        losses_of(solo)
        alone, found = ([row["grad_norm"] for row in one.trial(name).history] for one in (solo, bank))
        assert found == pytest.approx(alone, rel=1e-4), name
