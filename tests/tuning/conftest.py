"""Settings and tokenized rows of trials."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.loading import load_tokenizer


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
    chat = Chat(load_tokenizer(str(tiny_model)))
    rows = [
        chat.encode([Message("user", f"order {i} red {i * 7}"), Message("assistant", "yes " * (i % 5 + 1))])
        for i in range(12)
    ]
    splits = {}
    for name, part in (("train", rows[:8]), ("validation", rows[8:])):
        splits[name] = [str(tmp_path / f"{name}.parquet")]
        table = {"input_ids": [r.input_ids for r in part], "supervised": [r.supervised for r in part]}
        pq.write_table(pa.table(table), splits[name][0])
    return splits
