"""Methods and stages under real DeepSpeed engines, two workers of one Ray Train group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.core import cluster
from raytune_ft.core.storage import Location
from raytune_ft.training.session import Seat, train_in_process

pytestmark = [pytest.mark.ray, pytest.mark.soak]  # twelve runs under DeepSpeed, each made twice

COMMON: dict[str, Any] = {
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "no"},
    **{"lr_scheduler_type": "constant", "warmup_steps": 0},
}
SMALL = {"max_tokens_per_micro_batch": 40}
"""About a row at a time: steps of several micro-batches, and not the same number on both ranks by themselves."""
RUNS: dict[str, dict[str, Any]] = {
    "full-0": {"method": "full", "learning_rate": 1e-3, "zero_stage": 0},
    "full-1": {"method": "full", "learning_rate": 1e-3, "zero_stage": 1, **SMALL},
    "qlora-2": {"method": "qlora"},
    "dora-2": {"use_dora": True, "lora_target_modules": ["q_proj"], "zero_stage": 2},
    "prefix-2": {"method": "prefix_tuning", "num_virtual_tokens": 4, "zero_stage": 2, **SMALL},
    "prompt-2": {"method": "prompt_tuning", "num_virtual_tokens": 4, "gradient_checkpointing": True},
    "full-3": {"method": "full", "learning_rate": 1e-3, "zero_stage": 3},
    "lora-3": {"zero_stage": 3, "gradient_checkpointing": True, **SMALL},
    "offload-2": {"zero_stage": 2, "offload": "optimizer", **SMALL},
    "offload-3": {"zero_stage": 3, "offload": "all"},
    "bf16-3": {"precision": "bf16", "zero_stage": 3},
    "bf16-0": {"precision": "bf16", "zero_stage": 0, **SMALL},
}


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_two_workers_have_the_losses_of_one_process_and_resume_to_the_same_ones(
    ray_cluster, settings, splits, tmp_path: Path
) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    def worker(settings: dict[str, Any]) -> None:
        # All runs in one process group, each once whole and once cut after its second step and resumed. Not a function
        # of this module: workers cannot import it.
        import ray.train

        context = ray.train.get_context()
        seat = Seat(context.get_world_rank(), context.get_world_size(), "cpu", deepspeed=True)
        for name, config in settings["runs"].items():
            short = config.with_overrides(max_steps=2)
            train_in_process(config, settings["splits"], seat, output=Location.at(f"{settings['output']}/{name}"))
            resumed = Location.at(f"{settings['output']}/{name}-resumed")
            train_in_process(short, settings["splits"], seat, output=resumed)
            train_in_process(config, settings["splits"], seat, output=resumed)

    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_workers": 2}
    runs = {name: settings(**COMMON, **layout, **changes) for name, changes in RUNS.items()}
    TorchTrainer(
        worker,
        train_loop_config={"runs": runs, "splits": splits, "output": str(tmp_path)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="ray", storage_path=str(tmp_path), worker_runtime_env={"env_vars": cluster.worker_environment()}
        ),
    ).fit()
    for name, config in runs.items():
        alone: list[tuple[float, float]] = []
        train_in_process(
            config.with_overrides(
                per_device_train_batch_size=8,
                gradient_accumulation_steps=1,
                num_workers=1,
                max_tokens_per_micro_batch=None,
            ),
            splits,
            Seat(),
            output=None,
            report=lambda step, metrics, alone=alone: alone.append((metrics["loss"], metrics["grad_norm"])),
        )
        rows = history(tmp_path / name)
        # One process keeps a half-precision base's adapter in fp32, DeepSpeed computes with a bf16 copy of it.
        tolerance = 0.1 if name.startswith("bf16") else 1e-5
        assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in alone], abs=tolerance), name
        norms = [norm for _, norm in alone]
        assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=tolerance**0.5), name
        resumed = [row["loss"] for row in history(tmp_path / f"{name}-resumed")]
        assert resumed == pytest.approx([row["loss"] for row in rows], abs=1e-6), name
        assert len(resumed) == 4
