"""The whole circle on a tiny model: every step for real, and nothing done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.pipeline.config import PipelineConfig
from raytune_ft.pipeline.run import Pipeline

pytestmark = pytest.mark.ray


def test_the_circle_closes_and_a_second_run_redoes_nothing(
    ray_cluster, tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    config = PipelineConfig(
        storage_path=str(tmp_path / "runs"),
        model_path=str(tiny_model),
        prepare={"sources": [str(orders)], "validation_split": 0.15, "test_split": 0.15},
        tune={
            "space": {"learning_rate": [1e-4, 1e-2]},
            "grace_steps": 2,
            "training": {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2},
        },
        train={"num_workers": 2, "max_steps": 6, "lora_target_modules": "all-linear"},
        evaluate={"metrics": ["exact_match", "perplexity"], "decoding": {"max_new_tokens": 8}},
        quantize={"bits": 8},
        serve={"port": 0, "max_new_tokens": 128},
    )
    artifact = Pipeline(config).run()
    page = (tmp_path / "runs/pipeline/report.html").read_text()
    exchange = json.loads((tmp_path / "runs/endpoint/exchange.json").read_text())
    assert exchange["usage"]["completion_tokens"] > 0
    assert exchange["expected"] in [json.loads(line)["messages"][1]["content"] for line in orders.open()]
    assert artifact.numbers["Best settings"] == {"learning_rate": 1e-2}
    assert page.count("data:image/svg+xml") >= 4
    assert "<script" not in page

    manifests = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/manifest.json")}
    assert len(manifests) == 7
    assert Pipeline(config).run().digest == artifact.digest
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests
