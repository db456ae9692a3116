"""A budget of tokens that does not take every trial to its first evaluation is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.tuning.budget import (
    refuse_late_grace,
    refuse_other_rows,
    refuse_small_budget,
    rows_and_tokens,
    tokens_to_first_evaluation,
)
from raytune_ft.tuning.config import SweepConfig


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Ten rows of 20 tokens and ten of 40, in two files of two groups each."""
    found = []
    for length in (20, 40):
        rows = [{"input_ids": [1] * length, "supervised": [True] * length} for _ in range(10)]
        where = tmp_path / f"{length}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), where, row_group_size=5)
        found.append(str(where))
    return found


def sweep(most: int | None, *, space: dict | None = None, grace_steps: int = 1, **changes: object) -> SweepConfig:
    training = {"model_path": "m", "dataset_path": "d", "eval_strategy": "steps", "eval_steps": 3, "max_steps": 9}
    training |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **changes}
    searched = {"space": space or {"lora_r": [4, 8]}, "grace_steps": grace_steps, "max_tokens": most}
    return SweepConfig(output_dir="o", training=training, **searched)


def test_tokens_are_counted_without_reading_them(files: list[str]) -> None:
    assert rows_and_tokens(files) == (20, 600)


def test_the_budget_has_to_cover_every_first_evaluation(files: list[str]) -> None:
    split = {"train": files, "validation": files}
    # 3 steps of 4 rows of 30 tokens: 360 a trial
    refuse_small_budget(sweep(720), 2, split)
    refuse_small_budget(sweep(None), 2, split)
    with pytest.raises(ConfigError, match=r"max_tokens: 719 do not take 2 trials to .* \(about 360 tokens each, 720"):
        refuse_small_budget(sweep(719), 2, split)
    # an epoch is 5 steps of 4 rows: 600 a trial
    with pytest.raises(ConfigError, match="about 600 tokens each"):
        refuse_small_budget(sweep(1199, eval_strategy="epoch"), 2, split)


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"eval_steps": 7}, 600 + 2 * 4 * 30),  # in the second epoch
        ({"eval_steps": 100}, 600 + 4 * 4 * 30),  # at the last step, the ninth
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 8}, 600),  # of 16 rows and 4
        ({"space": {"per_device_train_batch_size": [4, 1]}}, 3 * 2 * 30),
        ({"space": {"max_steps": [9, 2]}}, 2 * 4 * 30),
        ({"eval_steps": 9, "space": {"eval_steps": [9, 2]}}, 2 * 4 * 30),
        ({"eval_strategy": "epoch", "space": {"eval_strategy": ["epoch", "steps"]}}, 3 * 4 * 30),
        ({"space": {"gradient_accumulation_steps": [3, 1]}}, 3 * 2 * 30),
    ],
)
def test_the_first_evaluation_is_where_a_trial_makes_it(files: list[str], changes: dict, tokens: int) -> None:
    split = {"train": files, "validation": files}
    assert tokens_to_first_evaluation(sweep(None, **changes), split) == tokens
    assert tokens_to_first_evaluation(sweep(None, eval_strategy="epoch"), {"train": files}) == 4 * 30  # losses only


def test_a_grace_beyond_the_longest_trial_is_refused_where_epochs_decide_that(files: list[str]) -> None:
    # 5 steps an epoch, with batches of 4 rows; with those of 2, 10
    epochs = {"max_steps": None, "space": {"num_train_epochs": [1, 2], "gradient_accumulation_steps": [1, 2]}}
    refuse_late_grace(sweep(None, grace_steps=20, **epochs), {"train": files})
    with pytest.raises(ConfigError, match=r"grace_steps: 21 is beyond the last step of the longest trial \(20\)"):
        refuse_late_grace(sweep(None, grace_steps=21, **epochs), {"train": files})


def rows_in(folder: Path, count: int) -> list[str]:
    rows = [{"input_ids": [1, 2], "supervised": [True, True]} for _ in range(count)]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "0.parquet")
    return [str(folder / "0.parquet")]


def test_trials_that_would_be_measured_on_other_rows_are_refused(tmp_path: Path) -> None:
    three, nine = rows_in(tmp_path / "3", 3), rows_in(tmp_path / "9", 9)
    splits = {64: {"train": nine, "validation": nine}, 52: {"train": three, "validation": three}}
    with pytest.raises(ConfigError, match=r"other validation rows each \(3 rows fit 52 tokens, 9 rows fit 64 tokens\)"):
        refuse_other_rows(sweep(None), splits)
    refuse_other_rows(sweep(None), {length: {**split, "validation": nine} for length, split in splits.items()})
    by_training = sweep(None).model_copy(update={"metric": "loss"})
    with pytest.raises(ConfigError, match="compared by loss on other train rows each"):
        refuse_other_rows(by_training, splits)


def test_a_metric_of_validation_rows_wants_some(tmp_path: Path) -> None:
    splits = {64: {"train": rows_in(tmp_path / "t", 2)}}
    with pytest.raises(ConfigError, match=r"metric: eval_loss is measured on validation rows, and d has none"):
        refuse_other_rows(sweep(None), splits)
    by_training = sweep(None).model_copy(update={"metric": "loss"})
    refuse_other_rows(by_training, splits)
    patient = sweep(None, early_stopping_patience=2).model_copy(update={"metric": "loss"})
    with pytest.raises(ConfigError, match="early_stopping_patience: d has no validation split"):
        refuse_other_rows(patient, splits)
