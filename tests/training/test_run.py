"""Training on real Ray Train workers under real DeepSpeed engines."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.core import cluster
from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.errors import ArtifactError, ClusterError, ModelError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.data.run import tokenized_splits
from raytune_ft.training.run import FineTuner
from raytune_ft.training.session import Seat, train_in_process

pytestmark = pytest.mark.ray


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def kill_a_worker_when(there: Path, killed: list[int], limit_s: float = 120) -> None:
    """Waits for a file, then ends one Ray Train worker of this process's cluster with SIGKILL."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end and not there.exists():
        time.sleep(0.005)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_two_workers_under_zero_2_have_the_losses_of_one_process(
    ray_cluster, settings, orders: Path, tiny_model: Path, tmp_path: Path
) -> None:
    common = {"dataset_path": str(orders), "max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}
    common |= {"use_rslora": True, "max_grad_norm": 0.02, "adam_beta1": 0.6, "adam_beta2": 0.8, "weight_decay": 2.0}
    config = settings(**common, num_workers=2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    artifact = FineTuner(config).train()
    alone: list[float] = []
    splits = tokenized_splits(str(orders), str(tiny_model), tmp_path / "tokens", max_length=config.max_length)
    train_in_process(
        settings(**common, per_device_train_batch_size=8),
        splits,
        Seat(),
        output=None,
        report=lambda step, metrics: alone.append(metrics["loss"]),
    )
    assert losses(tmp_path / "out") == pytest.approx(alone, abs=1e-5)
    assert artifact.manifest.kind is ArtifactKind.MODEL
    assert artifact.numbers["steps"] == 5
    assert {parent.role for parent in artifact.manifest.parents} == {"model", "dataset"}
    assert not [name for name in artifact.manifest.files if name.startswith(("ray/", "checkpoints/", "tokens/"))]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")

    # Run again, it finds its finished work; with another learning rate it refuses and touches nothing.
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    assert FineTuner(config).train().digest == artifact.digest
    with pytest.raises(ArtifactError, match=r"learning_rate: 0.01 -> 0.5"):
        FineTuner(settings(**{**common, "learning_rate": 0.5}, num_workers=2)).train()
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == before


def test_a_killed_worker_is_replaced_and_the_run_ends_with_the_same_losses(
    ray_cluster, settings, splits, tmp_path: Path
) -> None:
    from raytune_ft.core.storage import Location
    from raytune_ft.training.run import run_workers

    common = {"max_steps": 40, "num_workers": 2, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    config = settings(**common, save_steps=5, eval_strategy="no", lora_dropout=0.2, save_total_limit=20)
    run_workers(config, splits, Location.at(tmp_path / "unbroken"), use_gpu=False)
    killed: list[int] = []
    first = tmp_path / "broken/checkpoints/step-00000010/manifest.json"
    killer = threading.Thread(target=kill_a_worker_when, args=(first, killed))
    killer.start()
    run_workers(config, splits, Location.at(tmp_path / "broken"), use_gpu=False)
    killer.join()
    assert killed
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-6)


def test_a_plan_that_the_cluster_cannot_place_is_refused_before_anything_starts(
    ray_cluster, settings, orders: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match=r"3 train worker x .1 CPU.*cannot be placed.*2 CPU"):
        FineTuner(settings(dataset_path=str(orders), num_workers=3)).train()
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_model_error_on_workers_reaches_the_user_as_it_is_and_at_once(
    num_workers: int, ray_cluster, settings, orders: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"lora_target_modules": ["query"], "num_workers": num_workers, "max_failures": 2}
    with pytest.raises(ModelError, match=r"lora_target_modules.*q_proj"):
        FineTuner(settings(dataset_path=str(orders), **changes)).train()
    assert "Traceback" not in capfd.readouterr().err  # nor is any attempt repeated
    with pytest.raises(ArtifactError, match="unfinished"):
        open_or_resume(settings)


def test_an_output_folder_that_cannot_be_used_is_refused_before_a_cluster_starts(
    monkeypatch: pytest.MonkeyPatch, settings, orders: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: pytest.fail("it started"))
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="file: is a file; a folder is needed to write the model into"):
        FineTuner(settings(dataset_path=str(orders), output_dir=str(tmp_path / "file"))).train()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_model_that_a_full_disk_does_not_take_ends_the_run_in_words_and_the_same_call_goes_on(
    workers: int, ray_cluster, small_disk, settings, orders: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk, enlarge = small_disk
    changes = {"dataset_path": str(orders), "output_dir": str(disk / "out"), "max_steps": 2, "eval_strategy": "no"}
    changes |= {"num_workers": workers, "per_device_train_batch_size": 2}
    config = settings(**changes, save_strategy="no", report_to=[], lora_r=2048)  # an adapter of 16 MiB
    told = "No space left on device.* Make room there, or choose another folder. Then the same command goes on"
    with caplog.at_level(logging.INFO, logger="raytune_ft"), pytest.raises(ArtifactError, match=told):
        FineTuner(config).train()
    assert caplog.text.count("training starts: 2 steps") == 1  # no further attempt
    assert "Traceback" not in caplog.text
    enlarge()
    assert FineTuner(config).train().numbers["steps"] == 2


def open_or_resume(settings) -> None:
    try:
        open_artifact(settings().output_dir)
    except ArtifactError as error:
        assert "did not finish" in str(error)
        raise ArtifactError("unfinished") from error
