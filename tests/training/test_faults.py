"""Faults that a long run meets, provoked for real: each run ends with the losses of the unbroken one."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from raytune_ft.core.storage import Location
from raytune_ft.training.session import Seat, train_in_process

pytestmark = [pytest.mark.ray, pytest.mark.soak]  # several starts of Ray Train each

STEPS = {"save_strategy": "steps", "eval_strategy": "no", "report_to": [], "save_total_limit": 99}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "history.jsonl").read_text().splitlines()]


def workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended meanwhile
        return False


def kill_a_worker_when(is_time: Callable[[], bool], killed: list[float], limit_s: float = 120) -> threading.Thread:
    """A thread that ends one Ray Train worker by SIGKILL as soon as it is time, and notes when."""

    def wait() -> None:
        end = time.monotonic() + limit_s
        chosen = None
        while time.monotonic() < end:
            chosen = chosen or next(iter(workers()), None)  # found before: looking through processes takes long
            if is_time():
                break
            time.sleep(0.002)
        os.kill(chosen.pid, signal.SIGKILL)
        killed.append(time.time())

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def resumed_after(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"training resumes after step (\d+) of", text)]


@pytest.fixture
def run_workers(ray_cluster, splits, caplog):
    from raytune_ft.training.run import run_workers

    def run(config, output: Path) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="raytune_ft"):
            run_workers(config, splits, Location.at(output), use_gpu=False)
        return caplog.text

    return run


def test_two_workers_runs_go_on_with_one_and_one_with_two(run_workers, settings, tmp_path: Path) -> None:
    common = {**STEPS, "lr_scheduler_type": "constant", "warmup_steps": 0, "save_steps": 3}
    two = settings(**common, max_steps=8, num_workers=2, per_device_train_batch_size=4, zero_stage=3)
    run_workers(two, tmp_path / "unbroken")
    run_workers(two.with_overrides(max_steps=3), tmp_path / "broken")
    one = two.with_overrides(num_workers=1, per_device_train_batch_size=8, zero_stage=2, max_steps=6)
    said = run_workers(one, tmp_path / "broken")
    assert resumed_after(said) == [3]
    assert "which 2 workers wrote" in said
    assert resumed_after(run_workers(two, tmp_path / "broken")) == [6]
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-5)


def test_a_rank_killed_right_after_a_save_resumes_from_that_save(run_workers, settings, tmp_path: Path) -> None:
    config = settings(
        **STEPS, max_steps=24, save_steps=8, num_workers=2, per_device_train_batch_size=2, lora_dropout=0.2, seed=3
    )
    run_workers(config, tmp_path / "unbroken")
    manifest = tmp_path / "broken/checkpoints/step-00000008/manifest.json"
    killed: list[float] = []
    killer = kill_a_worker_when(manifest.exists, killed)
    said = run_workers(config, tmp_path / "broken")
    killer.join()
    assert 0 <= killed[0] - manifest.stat().st_mtime < 0.1
    assert resumed_after(said) == [8]
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-6)


def test_a_rank_killed_in_the_middle_of_a_save_resumes_from_the_one_before(
    run_workers, settings, tmp_path: Path
) -> None:
    config = settings(
        **STEPS, max_steps=18, save_steps=6, num_workers=2, per_device_train_batch_size=2, lora_r=512, zero_stage=1
    )
    run_workers(config, tmp_path / "unbroken")
    saving = tmp_path / "broken/checkpoints/step-00000012"
    killed: list[float] = []
    killer = kill_a_worker_when(saving.exists, killed)
    said = run_workers(config, tmp_path / "broken")
    killer.join()
    assert resumed_after(said) in ([6], [12])  # the save may win the race
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-6)


def test_on_a_full_disk_the_run_goes_on_and_the_same_call_goes_on_from_the_newest_whole_checkpoint(
    small_disk, settings, splits, tmp_path: Path, caplog
) -> None:
    disk, enlarge = small_disk
    config = settings(**STEPS, save_steps=1, lora_r=64, max_steps=12)
    train_in_process(config, splits, Seat(), output=Location.at(tmp_path / "unbroken"))
    caplog.clear()

    def cut(step, metrics):
        if step == 8:
            raise InterruptedError

    with caplog.at_level(logging.INFO, logger="raytune_ft"), pytest.raises(InterruptedError):
        train_in_process(config, splits, Seat(), output=Location.at(disk), report=cut)
    refused = [int(step) for step in re.findall(r"checkpoint of step (\d+) could not be written", caplog.text)]
    kept = sorted(path.name for path in (disk / "checkpoints").iterdir())
    assert refused == list(range(refused[0], 9))  # who hears of a step finds it saved, or refused
    assert kept == [f"step-{step:08d}" for step in range(1, refused[0])]
    caplog.clear()
    enlarge()
    with caplog.at_level(logging.INFO, logger="raytune_ft"):
        train_in_process(config, splits, Seat(), output=Location.at(disk))
    assert resumed_after(caplog.text) == [refused[0] - 1]
    assert losses(disk) == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-6)


def test_memory_that_runs_out_under_deepspeed_restarts_the_run_with_half_the_rows(
    settings, orders: Path, tmp_path: Path
) -> None:
    config = tmp_path / "train.yaml"
    changes = {**STEPS, "save_steps": 2, "max_steps": 400, "num_workers": 2, "per_device_train_batch_size": 8}
    config.write_text(settings(**changes, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    # Every larger tensor then asks the kernel for memory, which a limit on the address space refuses.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_MMAP_THRESHOLD_": "16384"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", "from raytune_ft.cli import main; main()", "train", str(config)]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    heard = ""
    for line in driver.stderr:
        heard += line
        if "grad norm" in line and "step 1/" not in line:
            break
    victim = workers()[0]
    size = victim.memory_info().vms
    resource.prlimit(victim.pid, resource.RLIMIT_AS, (size, size))
    heard += driver.communicate(timeout=280)[1]
    assert driver.returncode == 0, heard[-3000:]
    assert "out of memory with 8 rows at a time" in heard
    assert resumed_after(heard)
    rows = [json.loads(line) for line in (tmp_path / "out/history.jsonl").read_text().splitlines()]
    divisors = [row["micro_batch_divisor"] for row in rows]
    assert divisors[0] == 1
    assert divisors[-1] == 2
    assert len(rows) == 400
