"""Rates and dates, by hand and against transformers."""

from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.schedule import Timetable, learning_rate_at


def settings(**changes: object) -> FineTuningConfig:
    return FineTuningConfig(**{"model_path": "m", "output_dir": "o", "dataset_path": "d", **changes})


@pytest.mark.parametrize("warmup", [0, 3, 10])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_rates_are_those_of_transformers_schedulers(kind: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(1, 11):
        ours = learning_rate_at(step, 10, peak=0.5, warmup=warmup, kind=kind)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_eighteen_rows_in_batches_of_eight_make_three_steps_an_epoch() -> None:
    table = Timetable.of(settings(per_device_train_batch_size=8, num_train_epochs=2), 18, has_validation=True)
    assert (table.steps_per_epoch, table.total, table.warmup) == (3, 6, 1)
    assert [step for step in range(1, 7) if table.evaluates(step)] == [3, 6]
    assert [step for step in range(1, 7) if table.saves(step)] == [3, 6]
    part = Timetable.of(settings(per_device_train_batch_size=8, num_train_epochs=1.5), 18, has_validation=True)
    assert (part.total, [step for step in range(1, 6) if part.evaluates(step)]) == (5, [3, 5])


def test_the_last_step_is_evaluated_whatever_the_rhythm() -> None:
    table = Timetable.of(settings(max_steps=5, eval_strategy="steps", eval_steps=2), 100, has_validation=True)
    assert [step for step in range(1, 6) if table.evaluates(step)] == [2, 4, 5]


def test_without_validation_nothing_is_evaluated() -> None:
    table = Timetable.of(settings(max_steps=5), 100, has_validation=False)
    assert not any(table.evaluates(step) for step in range(1, 6))


@pytest.mark.parametrize(("strategy", "lines"), [("steps", [1, 4, 6]), ("epoch", [1, 3, 6]), ("no", [])])
def test_progress_lines_come_with_steps_or_epochs_or_not_at_all(strategy: str, lines: list[int]) -> None:
    config = settings(per_device_train_batch_size=8, num_train_epochs=2, logging_strategy=strategy, logging_steps=4)
    table = Timetable.of(config, 18, has_validation=True)
    assert [step for step in range(1, 7) if table.logs(step)] == lines


def test_warmup_steps_override_the_ratio() -> None:
    assert Timetable.of(settings(max_steps=50, warmup_steps=7), 10, has_validation=False).warmup == 7
    assert Timetable.of(settings(max_steps=50, warmup_ratio=0.2), 10, has_validation=False).warmup == 10
    assert Timetable.of(settings(max_steps=50, warmup_steps=0), 10, has_validation=False).warmup == 0
    assert Timetable.of(settings(max_steps=51, warmup_ratio=0.1), 10, has_validation=False).warmup == 6  # of 5.1


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_torch_does_not_take_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed: must be"):
        settings(seed=seed)
