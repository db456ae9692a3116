"""Trials that learn from pairs of answers on one frozen base: each has the losses that it would have alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.storage import Location
from raytune_ft.models.chat import Encoded
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.preferences import Preferences, Ratings, referenced
from raytune_ft.training.bank.referenced import ReferencedRows
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.folder import read_history
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.preference import PairTerms
from raytune_ft.training.ratings import RatedRows
from raytune_ft.training.session import Seat, train_in_process

from ...rows import pair_files, rated_files  # noqa: TID252 - tests are no installed package
from .conftest import MakeBank, Settings, losses_of, some_rows
from .reference import reference_preferences
from .test_equality import difference


@dataclass
class Given:
    """Pairs in a list."""

    pairs: list[tuple[Encoded, Encoded]]

    def __len__(self) -> int:
        return len(self.pairs)

    def both(self, number: int) -> tuple[Encoded, Encoded]:
        return self.pairs[number]


def some_pairs(count: int, seed: int) -> list[tuple[Encoded, Encoded]]:
    return list(zip(some_rows(count, seed), some_rows(count, seed + 100), strict=True))


PAIRS, VALIDATION = some_pairs(11, 1), some_pairs(4, 2)
MIXED: dict[str, dict[str, object]] = {
    "mild": {"beta": 0.1, "lora_r": 4, "seed": 1},
    "strict": {"beta": 0.5, "lora_r": 16, "lora_alpha": 32, "learning_rate": 2e-3, "seed": 2},
    "identity": {"beta": 0.2, "loss_type": "ipo", "gradient_accumulation_steps": 2, "weight_decay": 0.1, "seed": 3},
}


def bank_of(
    make_bank: MakeBank, configs: dict[str, PreferenceConfig], pairs: list[tuple[Encoded, Encoded]], **options: object
) -> AdapterBank:
    bank = make_bank(
        ReferencedRows(Given(VALIDATION)), train=ReferencedRows(Given(pairs)), criterion=Preferences(), **options
    )
    for name, config in configs.items():
        bank.admit(name, config)
    return bank


@pytest.mark.parametrize("arithmetic", ["ragged", "stacked"])
def test_losses_equal_those_of_plain_peft(make_bank: MakeBank, preference: Settings, arithmetic: str) -> None:
    configs = {name: preference(**changes) for name, changes in MIXED.items()}
    bank = bank_of(make_bank, configs, PAIRS, arithmetic=arithmetic)
    packed = losses_of(bank)
    for name, config in configs.items():
        alone = reference_preferences(config, PAIRS, 20)
        assert difference(packed[name], alone) <= 1e-5, name
        assert alone[-1] < alone[0], name


def test_a_small_budget_keeps_both_answers_of_a_pair_together(make_bank: MakeBank, preference: Settings) -> None:
    configs = {name: preference(**changes, max_steps=6) for name, changes in MIXED.items()}
    whole, parts = (bank_of(make_bank, configs, PAIRS, token_budget=budget) for budget in (4096, 20))
    expected, found = losses_of(whole), losses_of(parts)
    for name in configs:
        assert difference(expected[name], found[name]) <= 1e-5, name
    fresh = bank_of(make_bank, {"t": configs["mild"]}, PAIRS, token_budget=4096)
    assert smallest_budget(fresh) == max(a + b for a, b in zip(*lengths(fresh), strict=True))
    rated = make_bank(train=ReferencedRows(Given(PAIRS)), criterion=Ratings(), token_budget=4096)
    rated.admit("t", preference(loss_type="kto"))
    assert smallest_budget(rated) == max(max(*pair) for pair in zip(*lengths(rated), strict=True))


def lengths(bank: AdapterBank) -> tuple[list[int], list[int]]:
    """Tokens of the first and of the second row of each item of the next step."""
    found = [len(row.input_ids) for row in bank.trial("t").upcoming().rows]
    return found[::2], found[1::2]


def smallest_budget(bank: AdapterBank) -> int:
    """What is left of the budget when memory runs out again and again."""
    while bank.make_room() is None:
        pass
    return bank._budget


def test_all_that_is_measured_is_that_of_the_run_alone(
    make_bank: MakeBank, preference: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    files = pair_files(tiny_model, tmp_path, train=8, validation=3)
    rows = {split: PairRows(some, str(tmp_path / "cache")) for split, some in files.items()}
    margin = "eval_reward_margin"
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "metric_for_best_model": margin}
    configs = {name: preference(**{**changes, **evaluated}) for name, changes in MIXED.items()}
    train, validation = (ReferencedRows(rows[split]) for split in ("train", "validation"))
    bank = make_bank(validation, train=train, criterion=Preferences())
    for name, config in configs.items():
        bank.admit(name, config)
    losses_of(bank)
    for name, config in configs.items():
        where = Location.at(tmp_path / name)
        train_in_process(config, files, Seat(), output=where, golden=False)
        packed, alone = bank.trial(name).history, read_history(where)
        assert len(packed) == len(alone) == 6
        for found, expected in zip(packed, alone, strict=True):
            # Before the first step all margins are 0, and rounding decides which pairs are ranked right.
            known = found.keys() - ({"reward_accuracy"} if found["step"] == 1 else set())
            assert {key: found[key] for key in known} == pytest.approx({key: expected[key] for key in known}, abs=1e-5)
        assert {"loss", "reward_margin", margin, "eval_chosen_nll"} <= packed[-1].keys()
        assert "eval_perplexity" not in packed[-1]
        assert bank.trial(name).patience.best == max(row[margin] for row in packed[1::2])


RATED: dict[str, dict[str, object]] = {
    "mild": {"lora_r": 4, "seed": 1},
    "strict": {"beta": 0.5, "lora_r": 16, "learning_rate": 5e-3, "desirable_weight": 1.5, "seed": 2},
    "accumulating": {"beta": 0.3, "gradient_accumulation_steps": 2, "learning_rate": 5e-3, "seed": 3},
}


@pytest.mark.parametrize("options", [{"arithmetic": "ragged", "token_budget": 40}, {"arithmetic": "stacked"}])
def test_rated_answers_are_learned_from_as_alone(
    make_bank: MakeBank, preference: Settings, tiny_model: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    files = rated_files(tiny_model, tmp_path, train=8, validation=3)
    rows = {split: RatedRows(some, str(tmp_path / "cache")) for split, some in files.items()}
    evaluated = {"loss_type": "kto", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    configs = {name: preference(**{**changes, **evaluated}) for name, changes in RATED.items()}
    train, validation = (referenced(rows[split]) for split in ("train", "validation"))
    bank = make_bank(validation, train=train, criterion=Ratings(), **options)
    for name, config in configs.items():
        bank.admit(name, config)
    losses_of(bank)
    points = []
    for name, config in configs.items():
        where = Location.at(tmp_path / name)
        train_in_process(config, files, Seat(), output=where, golden=False)
        for found, expected in zip(bank.trial(name).history, read_history(where), strict=True):
            # Before the first step all ratios are 0, and rounding decides which answers are on the right side.
            known = found.keys() - ({"reward_accuracy"} if found["step"] == 1 else set())
            assert {key: found[key] for key in known} == pytest.approx({key: expected[key] for key in known}, abs=1e-5)
            points.append(found["kl"])
    assert max(points) > 0.01  # else nothing was held against anything


def test_neighbours_that_are_no_numbers_change_nothing_bit_for_bit(make_bank: MakeBank, preference: Settings) -> None:
    configs = {"t": preference(seed=1), "other": preference(seed=2, beta=0.3)}
    curves = []
    for broken in (False, True):
        bank = bank_of(make_bank, configs, PAIRS)
        if broken:
            bank._criterion._terms["other"] = PairTerms(float("nan"), 0.0, 0.0, identity=False)
        curves.append(losses_of(bank))
    assert curves[0]["t"] == curves[1]["t"] and len(curves[0]["t"]) == 20
    assert bank.trial("other").status == "infeasible"


def test_examples_are_refused_among_pairs(make_bank: MakeBank, preference: Settings, trial: Settings) -> None:
    bank = bank_of(make_bank, {}, PAIRS)
    with pytest.raises(ConfigError, match="its trials learn from pairs of answers"):
        bank.admit("t", trial())
    with pytest.raises(ConfigError, match="loss_type kto learns from single answers"):
        bank.admit("t", preference(loss_type="kto"))
    with pytest.raises(ConfigError, match="its trials learn from examples"):
        make_bank().admit("t", preference())
