"""On a GPU the host waits for a step of a bank once, at its end, and its work does not grow with the trials."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raytune_ft.models.chat import Encoded
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import FrozenBase, frozen_base
from raytune_ft.training.bank.preferences import Preferences
from raytune_ft.training.bank.referenced import ReferencedRows

from ...numberless import READ, Calls, takes_gpus_way, where_read  # noqa: TID252 - tests are no installed package
from .conftest import Settings
from .test_preferences import MIXED, PAIRS, Given

ADAMW = "aten._fused_adamw_.default"
EVEN = [Encoded(list(range(3, 27)), [place >= 8 for place in range(24)]) for _ in range(64)]


@pytest.fixture
def base(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> FrozenBase:
    model, tokenizer = (kind.from_pretrained(tiny_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    found = frozen_base(model, tokenizer, str(tiny_model))
    found.model.to("meta", torch.bfloat16)
    takes_gpus_way(monkeypatch)
    return found


def calls_until_read(bank: AdapterBank) -> Counter[str]:
    """What a step calls before the host reads its losses and norms, the first that it may wait for."""
    with Calls() as calls, pytest.raises(NotImplementedError, match=READ) as raised:
        bank.step()
    assert where_read(raised) == "_step_group"
    return calls.counts


def calls_of(base: FrozenBase, trial: Settings, trials: int, **changes: object) -> Counter[str]:
    bank = AdapterBank(base, EVEN, token_budget=1 << 20, arithmetic="stacked")
    for number in range(trials):
        bank.admit(f"trial-{number}", trial(lora_r=4 + number % 8, seed=number, **changes))
    return calls_until_read(bank)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_calls_of_a_step_do_not_grow_with_the_trials_but_for_adamw(
    base: FrozenBase, trial: Settings, dropout: float
) -> None:
    few, many = (calls_of(base, trial, trials, lora_dropout=dropout) for trials in (2, 32))
    assert (few.pop(ADAMW), many.pop(ADAMW)) == (2, 32)
    assert few == many
    assert few["torch_attn._varlen_attn.default"] == 2  # one for each layer of the model
    assert few["aten._grouped_mm.default"] == 6 * 14 - 3  # the first layer's q, k and v need give back nothing


def test_a_step_in_several_passes_is_waited_for_once(base: FrozenBase, trial: Settings) -> None:
    bank = AdapterBank(base, EVEN, token_budget=48, arithmetic="stacked")
    bank.admit("long", trial(gradient_accumulation_steps=4))
    assert calls_until_read(bank)["torch_attn._varlen_attn.default"] == 2 * 4


def test_a_step_on_pairs_is_waited_for_once(base: FrozenBase, preference: Settings) -> None:
    rows = ReferencedRows(Given(PAIRS))
    everyone = range(2 * len(PAIRS))
    rows.learn(everyone, [-5.0] * len(everyone))
    bank = AdapterBank(base, rows, criterion=Preferences(), arithmetic="stacked")
    for name, changes in MIXED.items():
        bank.admit(name, preference(**changes))
    assert calls_until_read(bank)[ADAMW] == len(MIXED)


def test_an_evaluation_is_waited_for_once(base: FrozenBase, trial: Settings) -> None:
    bank = AdapterBank(base, EVEN, EVEN, token_budget=96, arithmetic="stacked")
    for name in ("one", "two"):
        bank.admit(name, trial())
    with Calls() as calls, pytest.raises(NotImplementedError, match=READ) as raised:
        bank.evaluate(["one", "two"])
    assert where_read(raised) == "score"
    assert calls.counts["torch_attn._varlen_attn.default"] == 2 * 32  # 64 rows, two of each trial in a pass
