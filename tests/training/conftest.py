"""Tokenized rows as Parquet files, as the data room leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig

from ..conftest import make_tiny_model  # noqa: TID252 - tests are no installed package
from ..rows import pair_files, token_files, turns_file  # noqa: TID252


@pytest.fixture
def splits(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """18 training rows of uneven length and 4 validation rows."""
    return token_files(tiny_model, tmp_path, train=18, validation=4)


@pytest.fixture
def pairs(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """18 training pairs of uneven length and 5 validation pairs."""
    return pair_files(tiny_model, tmp_path, train=18, validation=5)


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path) -> Callable[..., FineTuningConfig]:
    """Training settings for the tiny model, with changes."""

    def make(**changes: object) -> FineTuningConfig:
        common = {
            "model_path": str(tiny_model),
            "output_dir": str(tmp_path / "out"),
            "dataset_path": "given as splits",
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
            "per_device_train_batch_size": 8,
            "logging_steps": 1,
        }
        return FineTuningConfig(**{**common, **changes})

    return make


@pytest.fixture(scope="session")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers every order with yes or with no, each about half of the time."""
    folder = tmp_path_factory.mktemp("undecided")
    model = make_tiny_model(folder / "tiny")
    turns = [(f"order {n // 2}", ("yes", "no")[n % 2]) for n in range(32)]
    settings = {
        **{"model_path": str(model), "output_dir": str(folder), "dataset_path": "given", "method": "full"},
        **{"per_device_train_batch_size": 16, "num_train_epochs": 30, "learning_rate": 3e-3, "report_to": []},
        **{"save_strategy": "no", "logging_strategy": "no"},
    }
    from raytune_ft.training.session import Seat, train_in_process

    files = {"train": [turns_file(model, folder / "train.parquet", turns)]}
    train_in_process(FineTuningConfig(**settings), files, Seat(), output=Location.at(folder / "model"), golden=False)
    return folder / "model"
