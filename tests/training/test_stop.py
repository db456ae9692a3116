"""Runs that are ended from outside: the same command goes on.

SIGTERM to the driver, its process group, or a worker saves a checkpoint, and the exit code is 143; Ctrl-C and SIGKILL
to all processes leave the newest checkpoint that there was.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.core.storage import Location
from raytune_ft.training.folder import read_history

from ..processes import kill_tree  # noqa: TID252 - tests are no installed package

pytestmark = [pytest.mark.ray, pytest.mark.soak]  # whole starts of Ray

SETTINGS = {
    "num_workers": 1,
    "max_steps": 400,
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 5,
    "per_device_train_batch_size": 4,
    "max_failures": 0,
}


def start(config: Path, *overrides: str, start_new_session: bool = False) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("RAY_ADDRESS", None)
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # in the background: ignored
    program += "from raytune_ft.cli import main; main()"
    command = [sys.executable, "-c", program, "train", str(config), *overrides]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=start_new_session
    )


def said(process: subprocess.Popen[str], words: str) -> str:
    """Reads lines until one has `words`."""
    heard = ""
    for line in process.stderr:
        heard += line
        if words in line:
            return heard
    raise AssertionError(heard)


def worker_of(driver: subprocess.Popen[str]) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        for process in psutil.Process(driver.pid).children(recursive=True):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                return process.pid
    raise AssertionError("no worker")


def test_sigterm_to_worker_and_driver_saves_and_the_same_command_goes_on(
    settings, orders: Path, tmp_path: Path
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(settings(**SETTINGS, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    steps = []
    for whom in ("worker", "driver"):
        process = start(config)
        heard = said(process, "grad norm")
        assert not steps or f"resumes after step {steps[0]} of 400" in heard
        os.kill(worker_of(process) if whom == "worker" else process.pid, signal.SIGTERM)
        rest = process.communicate(timeout=120)[1]
        assert process.returncode == 143, rest
        assert "stopped after step" in rest
        assert "the same command goes on from there" in rest
        (folder,) = sorted((tmp_path / "out/checkpoints").glob("step-*"))[-1:]
        steps.append(int(folder.name.removeprefix("step-")))
        assert f"after step {steps[-1]} of 400" in rest
    assert 0 < steps[0] < steps[1] < 400


def test_sigterm_to_the_whole_group_saves_as_one_to_the_driver_does(settings, orders: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(settings(**SETTINGS, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    process = start(config, start_new_session=True)
    said(process, "grad norm")
    os.killpg(process.pid, signal.SIGTERM)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 143, rest
    assert "a checkpoint is saved after this step" in rest
    assert "the same command goes on from there" in rest
    assert list((tmp_path / "out/checkpoints").glob("step-*"))


@pytest.mark.parametrize("when", ["Resource plan", "grad norm"])
def test_ctrl_c_ends_a_training_as_it_ends_any_command(when: str, settings, orders: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(settings(**SETTINGS, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    process = start(config, start_new_session=True)
    said(process, when)
    time.sleep(5 if when == "Resource plan" else 0)  # while workers start
    os.killpg(process.pid, signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "interrupted; the same command goes on from here" in rest
    assert "Traceback" not in rest


def test_where_ray_is_ended_with_the_run_the_driver_says_so_and_ends(settings, orders: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(settings(**SETTINGS, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    driver = start(config)
    said(driver, "grad norm")
    everyone = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    rest = driver.communicate(timeout=120)[1]
    assert driver.returncode == 143, rest
    assert "the same command goes on from" in rest
    _, alive = psutil.wait_procs(everyone[1:], timeout=60)
    assert not alive


def losses(folder: Path) -> dict[int, float]:
    return {int(row["step"]): row["loss"] for row in read_history(Location.at(folder))}


def test_the_whole_tree_killed_the_same_command_ends_with_the_losses_of_an_unbroken_run(
    settings, orders: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 200, "save_strategy": "steps", "save_steps": 20, "logging_steps": 1, "num_workers": 2}
    config = tmp_path / "train.yaml"
    config.write_text(settings(**{**SETTINGS, **changes}, dataset_path=str(orders)).model_dump_json(), encoding="utf-8")
    broken = start(config)
    said(broken, "step 50/200")
    kill_tree(broken)
    assert not (tmp_path / "out/manifest.json").exists()
    again = start(config)
    heard = again.communicate(timeout=200)[1]
    assert again.returncode == 0, heard
    (step,) = [int(line.split("after step ")[1].split()[0]) for line in heard.splitlines() if "resumes after" in line]
    assert step >= 20 and step % 20 == 0
    whole = start(config, f"output_dir={tmp_path / 'unbroken'}")
    rest = whole.communicate(timeout=200)[1]
    assert whole.returncode == 0, rest
    expected, found = losses(tmp_path / "unbroken"), losses(tmp_path / "out")
    assert list(found) == list(expected) == list(range(1, 201))
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-6
