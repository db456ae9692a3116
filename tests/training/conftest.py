"""Tokenized rows as Parquet files, as the data room leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.loading import load_tokenizer
from raytune_ft.training.config import FineTuningConfig


@pytest.fixture
def splits(tiny_model: Path, tmp_path: Path) -> dict[str, list[str]]:
    """18 training rows of uneven length and 4 validation rows."""
    chat = Chat(load_tokenizer(str(tiny_model)))
    rows = [
        chat.encode([Message("user", f"order {i} red {i * 7}"), Message("assistant", "yes " * (i % 5 + 1))])
        for i in range(22)
    ]
    files = {}
    for name, part in (("train", rows[:18]), ("validation", rows[18:])):
        path = tmp_path / f"{name}.parquet"
        table = {"input_ids": [r.input_ids for r in part], "supervised": [r.supervised for r in part]}
        pq.write_table(pa.table(table), path)
        files[name] = [str(path)]
    return files


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
