"""A search under Ray Tune's own scheduler, each trial a real training run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.result import SweepResult
from raytune_ft.tuning.run import HyperparameterSweep

pytestmark = pytest.mark.ray


def test_asha_stops_the_slow_learners_and_the_best_settings_are_found(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    import ray

    config = SweepConfig(
        output_dir=str(tmp_path / "sweep"),
        space={"lora_r": [2, 8], "learning_rate": [2e-2, 1e-6]},
        grace_steps=4,
        max_concurrent_trials=1,  # then a slow learner always meets a fast one's result at the rung
        training={
            "model_path": str(tiny_model),
            "dataset_path": str(orders),
            "max_steps": 8,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "per_device_train_batch_size": 8,
            "lora_target_modules": "all-linear",
        },
    )
    artifact = HyperparameterSweep(config).run()
    result = SweepResult.from_json(artifact.read_json("result.json"))
    assert len(result.trials) == 4
    assert {trial.ending for trial in result.trials} == {"finished", "stopped early"}
    assert result.best.settings["learning_rate"] == 2e-2
    assert artifact.numbers["best_settings"] == result.best.settings
    for trial in result.trials:
        assert [row["global_step"] for row in trial.curve] == [2.0, 4.0, 6.0, 8.0][: len(trial.curve)]
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2.0  # stopped trials hold nothing

    assert HyperparameterSweep(config).run().digest == artifact.digest
