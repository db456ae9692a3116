"""A sweep on a GPU: Ray Tune's trials in one bank, or on it one after the other, with the curves that a CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.tuning.result import SweepResult
from raytune_ft.tuning.run import HyperparameterSweep

from .test_packed import curves, sweep

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


def test_a_sweep_on_a_gpu_has_the_curves_of_one_on_a_cpu(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    found = []
    for name, use_gpu, packed in (("here", False, "auto"), ("there", True, "auto"), ("apart", True, "never")):
        training = {"use_gpu": use_gpu, "precision": "fp32", "learning_rate": 1e-3}
        config = sweep(tiny_model, orders, tmp_path / name, training=training, scheduler="none", packed=packed)
        artifact = HyperparameterSweep(config).run()
        result = SweepResult.from_json(artifact.read_json("result.json"))
        found.append(curves(result))
        assert not [trial for trial in result.trials if trial.ending == "infeasible"]
    here, *there = found
    assert len(here) == 4
    for label, curve in here.items():
        for other in there:
            assert other[label] == pytest.approx(curve, abs=1e-3)
