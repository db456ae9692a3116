"""A tiny base, rows of uneven length, and trial settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.models.chat import Encoded
from raytune_ft.training.answers import AnswerCheck
from raytune_ft.training.bank.bank import AdapterBank
from raytune_ft.training.bank.base import frozen_base
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig

Settings = Callable[..., FineTuningConfig]
MakeBank = Callable[..., AdapterBank]


def some_rows(count: int, seed: int, longest: int = 24) -> list[Encoded]:
    """Random rows of 4 to `longest` tokens; the first third of each is a prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(4, longest + 1, (), generator=generator))
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        rows.append(Encoded(ids, [place >= length // 3 for place in range(length)]))
    return rows


@pytest.fixture(scope="session")
def rows() -> list[Encoded]:
    """23 training rows."""
    return some_rows(23, seed=1)


@pytest.fixture(scope="session")
def validation_rows() -> list[Encoded]:
    """5 validation rows."""
    return some_rows(5, seed=2)


@pytest.fixture
def trial(tiny_model: Path) -> Settings:
    """Settings of a trial, with changes."""

    def make(**changes: object) -> FineTuningConfig:
        common = {
            "model_path": str(tiny_model),
            "output_dir": "unused",
            "dataset_path": "given as rows",
            "max_steps": 8,
            "learning_rate": 1e-3,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
            "per_device_train_batch_size": 2,
            "eval_strategy": "no",
        }
        return FineTuningConfig(**{**common, **changes})

    return make


@pytest.fixture
def preference(tiny_model: Path) -> Settings:
    """Settings of a trial that learns from pairs, with changes."""

    def make(**changes: object) -> PreferenceConfig:
        common = {"model_path": str(tiny_model), "output_dir": "unused", "dataset_path": "given", "max_steps": 20}
        more = {"learning_rate": 1e-3, "lora_target_modules": "all-linear", "eval_strategy": "no"}
        schedule = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "per_device_train_batch_size": 2}
        return PreferenceConfig(**{**common, **more, **schedule, **changes})

    return make


@pytest.fixture
def make_bank(tiny_model: Path, rows: list[Encoded]) -> MakeBank:
    """An empty bank on the tiny base, or on that in the folder `of`."""

    def make(
        validation: Any = None,
        *,
        train: Any = None,
        answers_of: FineTuningConfig | None = None,
        of: Path = tiny_model,
        **options: Any,
    ) -> AdapterBank:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(of)
        base = frozen_base(model, AutoTokenizer.from_pretrained(of), str(of))
        if answers_of is not None:
            options["answers"] = AnswerCheck.wanted(answers_of, validation, base.model, base.tokenizer, "cpu")
        return AdapterBank(base, rows if train is None else train, validation, **options)

    return make


def losses_of(bank: AdapterBank) -> dict[str, list[float]]:
    """Steps a bank until no trial runs; every trial's losses."""
    while bank.step():
        pass
    return {name: [row["loss"] for row in bank.trial(name).history] for name in bank.names()}
