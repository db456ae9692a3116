"""Tokenized rows as Parquet files, as the data room leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from raytune_ft.training.config import FineTuningConfig

from ..rows import token_files  # noqa: TID252 - tests are no installed package


@pytest.fixture
def splits(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """18 training rows of uneven length and 4 validation rows."""
    return token_files(tiny_model, tmp_path, train=18, validation=4)


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
