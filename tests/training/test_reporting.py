"""What a search hears of a run: every evaluation, whatever it measures, and the last one when the model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import ReinforcementConfig
from raytune_ft.training.reporting import EvaluationReport
from raytune_ft.training.session import Seat, train_in_process

from ..rows import turns_file  # noqa: TID252 - tests are no installed package


def test_a_run_on_rewards_is_heard_of_by_its_rewards(tiny_model: Path, tmp_path: Path) -> None:
    turns = [(f"order {n}", "yes") for n in range(4)]
    splits = {name: [turns_file(tiny_model, tmp_path / f"{name}.parquet", turns)] for name in ("train", "validation")}
    config = ReinforcementConfig(
        **{"model_path": str(tiny_model), "output_dir": str(tmp_path), "dataset_path": "given", "report_to": []},
        **{"reward_metric": "exact_match", "num_generations": 2, "max_new_tokens": 2, "eval_generation_rows": 2},
        **{"max_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"},
    )
    told: list[dict[str, Any]] = []
    report = EvaluationReport(config, told.append)
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "a"), report=report, golden=False)
    assert [row["global_step"] for row in told] == [2]
    report.model_is_written()
    assert [(row["global_step"], row["eval_reward"]) for row in told] == [(2, 0.0), (3, 0.0)]


def test_steps_without_an_evaluation_are_told_where_there_is_none() -> None:
    told: list[dict[str, Any]] = []
    paths = {"model_path": "m", "output_dir": "o", "dataset_path": "d"}
    for strategy in ("epoch", "no"):
        report = EvaluationReport(FineTuningConfig(**paths, eval_strategy=strategy), told.append)
        report(1, {"loss": 1.0, "tokens_so_far": 5, "last_step": 9})
    assert told == [{"global_step": 1, "loss": 1.0, "tokens": 5, "tokens_so_far": 5, "last_step": 9}]
