"""Jobs on a real cluster with token authentication: they prepare and train, fail readably, and shut strangers out."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from raytune_ft.core.artifacts import open_artifact
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.quickstart import generator

CHECKOUT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class TokenCluster:
    """Address of the cluster's dashboard, and the environment that knows its token."""

    address: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str) -> subprocess.CompletedProcess[str]:
        """Runs the command as the README shows it, and waits for the job's end."""
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", "--", *entrypoint]
        return subprocess.run(
            command,
            cwd=CHECKOUT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until_open(port, process, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail("the cluster's dashboard did not come up")


def stop(process):
    """Ends the cluster that `process` started, and no other one on this machine."""
    head = psutil.Process(process.pid)
    family = [*head.children(recursive=True), head]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    _, alive = psutil.wait_procs(family, timeout=3)  # some wait for others, which have ended
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=15)


@pytest.fixture(scope="module")
def token_cluster():
    """A head node with two logical CPUs, ports and a home of its own, that only answers to its token."""
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short: a socket's path has at most 107 bytes
    environment = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", "PYTHONPATH"}}
    environment |= {
        "HOME": folder,
        "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "240",  # 30 are too few where tests share a busy machine
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    fixed = ["--num-cpus=2", "--dashboard-host=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    command = [RAY, "start", "--head", "--block", f"--temp-dir={folder}/ray", *fixed]
    with (Path(folder) / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(f"--{name}={port}" for name, port in ports.items())],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_open(ports["dashboard-port"], process)
        yield TokenCluster(f"http://127.0.0.1:{ports['dashboard-port']}", environment)
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def prepared(token_cluster, tiny_model, tmp_path_factory):
    """A dataset for the tiny model, made by a job from the shipped data."""
    where = tmp_path_factory.mktemp("shared") / "dataset"
    done = token_cluster.submit(
        *("python", "jobs/prepare.py", "jobs/configs/prepare.yaml"),
        *(f"output_path={where}", f"model_path={tiny_model}", "max_length=400"),
    )
    assert done.returncode == 0, done.stdout
    return where


def test_a_submitted_job_prepares_a_dataset(prepared):
    dataset = open_artifact(prepared, ArtifactKind.DATASET)
    assert dataset.numbers["rows_test"] == generator.TEST_ROWS


def test_a_submitted_job_trains_a_model(token_cluster, tiny_model, prepared):
    where = prepared.parent / "model"
    done = token_cluster.submit(
        *("python", "jobs/train.py", "jobs/configs/train.yaml", f"dataset_path={prepared}", f"output_dir={where}"),
        *(f"model_path={tiny_model}", "max_steps=3"),
    )
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout
    model = open_artifact(where, ArtifactKind.MODEL)
    assert model.manifest.settings["max_steps"] == 3
    assert {parent.role for parent in model.manifest.parents} == {"model", "dataset"}


def test_a_job_with_broken_settings_fails_with_a_readable_message(token_cluster, tmp_path):
    done = token_cluster.submit(
        *("python", "jobs/train.py", "jobs/configs/train.yaml"),
        *("lora_r=0", "learning_rat=1e-3", f"output_dir={tmp_path}/model"),
    )
    assert done.returncode != 0
    assert "jobs/configs/train.yaml: lora_r: must be at least 1 (got 0)" in done.stdout
    assert "learning_rat: there is no such setting; did you mean learning_rate?" in done.stdout
    assert "Traceback" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_would_lose_its_results_is_refused(token_cluster):
    done = token_cluster.submit("python", "jobs/train.py", "jobs/configs/train.yaml")
    assert done.returncode != 0
    assert "output_dir: runs/orders/model lies in the job's working folder, which Ray deletes" in done.stdout


def test_a_stranger_without_the_token_is_refused(token_cluster):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{token_cluster.address}/api/jobs/", timeout=10)
    assert caught.value.code == 401
