"""ZeRO stage 3 with everything offloaded, in a DeepSpeed process of its own, against one process without DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.core.storage import Location
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.session import Seat, train_in_process

COMMON: dict[str, Any] = {
    **{"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
    **{"lr_scheduler_type": "constant", "warmup_steps": 0, "report_to": [], "learning_rate": 1e-3},
}


def history(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "history.jsonl").read_text().splitlines() if name in line]


def on_ranks(runs: list[dict[str, Any]], splits, folder: Path, world_size: int = 1) -> None:
    """Makes runs, one after the other, in DeepSpeed processes."""
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({"splits": splits, "meet": str(folder / "meet"), "runs": runs}))
    program = Path(__file__).with_name("train_on_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(program), str(jobs)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world_size)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    for rank in ranks:
        said = rank.communicate(timeout=200)[1]
        assert rank.returncode == 0, said[-3000:]


def run(config: FineTuningConfig, output: Path, **more: object) -> dict[str, Any]:
    kind = type(config).__name__
    return {"kind": kind, "config": config.model_dump(mode="json"), "output": str(output), **more}


@pytest.mark.ray  # no Ray, but as long as a test with it
def test_stage_3_offloaded_equals_one_process_and_goes_on_under_another_stage(settings, splits, tmp_path: Path) -> None:
    sharded = settings(**COMMON, method="full", zero_stage=3, offload="all")
    plain = settings(**COMMON, method="full")
    adapter = settings(**{**COMMON, "max_steps": 2}, zero_stage=3, deepspeed_config={"zero_optimization": {"stage": 3}})
    runs = [
        run(sharded.with_overrides(max_tokens_per_micro_batch=60), tmp_path / "a", cut_after=3),
        run(plain.with_overrides(zero_stage=1), tmp_path / "a"),
        run(plain.with_overrides(max_tokens_per_micro_batch=60), tmp_path / "b", cut_after=3),
        run(sharded, tmp_path / "b"),
        run(adapter, tmp_path / "lora"),
    ]
    on_ranks(runs, splits, tmp_path)
    train_in_process(plain, splits, Seat(), output=Location.at(tmp_path / "alone"))
    alone = load_file(tmp_path / "alone/model.safetensors")
    for name in "ab":
        for metric in ("loss", "eval_loss"):
            expected = history(tmp_path / "alone", metric)
            assert history(tmp_path / name, metric) == pytest.approx(expected, abs=1e-5), (name, metric)
        saved = load_file(tmp_path / name / "model.safetensors")
        assert saved.keys() == alone.keys()
        assert all(torch.allclose(saved[key], alone[key], atol=1e-4) for key in alone)
    factors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert len(factors) == 2 * 7 * 2  # two factors, seven linear layers, two blocks
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in factors.values())


@pytest.mark.soak
@pytest.mark.ray  # no Ray, but two starts of DeepSpeed
def test_every_kind_of_adapter_goes_on_with_another_number_of_workers(settings, splits, tmp_path: Path) -> None:
    virtual = {"num_virtual_tokens": 4}
    kinds: dict[str, dict[str, Any]] = {
        "nf4": {"method": "qlora", "zero_stage": 2},
        "int8": {"method": "qlora", "bits": 8, "zero_stage": 1},
        "dora": {"use_dora": True, "zero_stage": 2},
        "prefix": {"method": "prefix_tuning", **virtual, "zero_stage": 2},
        "prompt": {"method": "prompt_tuning", **virtual, "zero_stage": 1},
        "sharded": {"zero_stage": 3},
        "dropout": {"lora_dropout": 0.3, "zero_stage": 2},
    }
    one = {name: settings(**COMMON, **kind) for name, kind in kinds.items()}
    two = {name: one[name].with_overrides(num_workers=2, per_device_train_batch_size=4) for name in kinds}
    on_ranks([run(two[name], tmp_path / name, cut_after=2) for name in kinds], splits, tmp_path, world_size=2)
    on_ranks([run(one[name], tmp_path / name) for name in kinds], splits, tmp_path)
    for name, config in one.items():
        alone = Location.at(tmp_path / f"{name}-alone")
        train_in_process(config.with_overrides(zero_stage=2), splits, Seat(), output=alone)
        for metric in ("loss", "eval_loss"):
            expected = history(tmp_path / f"{name}-alone", metric)
            assert history(tmp_path / name, metric) == pytest.approx(expected, abs=1e-5), (name, metric)
