"""Settings and tokenized rows of trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..rows import token_files  # noqa: TID252 - tests are no installed package


@pytest.fixture
def settings(tiny_model: Path) -> dict:
    """Twenty steps, evaluated at every second one."""
    return {
        **{"model_path": str(tiny_model), "output_dir": "unused", "dataset_path": "given as splits", "max_steps": 20},
        **{"eval_strategy": "steps", "eval_steps": 2, "lora_dropout": 0.0, "per_device_train_batch_size": 2},
    }


@pytest.fixture
def splits(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """Eight training rows of uneven length and 4 validation rows."""
    return token_files(tiny_model, tmp_path, train=8, validation=4)
