"""The best trial is the one with the lowest metric anywhere on its curve."""

from __future__ import annotations

import json

import pytest

from raytune_ft.core.errors import RunError
from raytune_ft.tuning.result import SweepResult, Trial


def trial(name: str, *losses: float, ending: str = "finished", error: str | None = None) -> Trial:
    curve = [{"global_step": float(n), "eval_loss": loss} for n, loss in enumerate(losses, start=1)]
    return Trial(name, {"lora_r": 8, "learning_rate": 1e-3}, ending, curve, error)  # type: ignore[arg-type]


def test_the_best_trial_counts_its_lowest_point_not_its_last() -> None:
    result = SweepResult("eval_loss", (trial("a", 2.0, 0.5, 0.9), trial("b", 0.8, 0.6)))
    assert result.best.name == "a"


def test_a_sweep_without_any_metric_lists_every_trials_reason() -> None:
    result = SweepResult("eval_loss", (trial("a", ending="failed", error="out of memory"), trial("b", ending="failed")))
    with pytest.raises(RunError, match=r"out of memory; .*reported nothing"):
        _ = result.best


def test_what_is_written_reads_back_equal() -> None:
    result = SweepResult("eval_loss", (trial("a", 2.0, 0.5), trial("b", 0.8, ending="stopped early")))
    assert SweepResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_a_label_is_the_settings_in_words() -> None:
    assert trial("a").label() == "lora_r=8, learning_rate=0.001"
