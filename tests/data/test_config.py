from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.data.config import DataCollectionConfig, DatasetFormat


def test_the_guides_block_is_a_valid_config() -> None:
    config = DataCollectionConfig(
        sources=["path/to/your/data.jsonl"],
        output_format=DatasetFormat.JSONL,
        output_path="prepared_dataset",
        shuffle=True,
        validation_split=0.1,
        test_split=0.1,
    )
    assert config.sources == ("path/to/your/data.jsonl",)


def test_given_test_files_leave_nothing_to_draw_for_the_test() -> None:
    config = DataCollectionConfig(sources=["a.jsonl"], output_path="out", test_sources=["b.jsonl"])
    assert config.test_split == 0.0
    assert config.with_overrides(seed=1).test_split == 0.0
    with pytest.raises(ConfigError, match="test_split must be 0 where test_sources are given"):
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", test_sources=["b.jsonl"], test_split=0.1)


def test_splits_that_leave_no_training_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="less than 1"):
        DataCollectionConfig(sources=["a.jsonl"], output_path="out", validation_split=0.5, test_split=0.5)


def test_where_and_in_which_format_it_is_exported_does_not_change_the_identity() -> None:
    one = DataCollectionConfig(sources=["a.jsonl"], output_path="x")
    other = DataCollectionConfig(sources=["a.jsonl"], output_path="y", output_format=DatasetFormat.CSV)
    assert one.identity() == other.identity()
    assert one.identity() != DataCollectionConfig(sources=["a.jsonl"], output_path="x", seed=1).identity()
