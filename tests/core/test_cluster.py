"""Plans are refused in words, and a local cluster starts, works and stops without help from its surroundings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from raytune_ft.core import cluster
from raytune_ft.core.cluster import Cluster
from raytune_ft.core.errors import ClusterError
from raytune_ft.core.placement import Demand, Node, ResourcePlan


def plan(*demands: Demand) -> ResourcePlan:
    return ResourcePlan("test", demands)


def test_nodes_that_the_autoscaler_may_start_count() -> None:
    connected = Cluster("x", "joined", (Node(cpus=4), Node(cpus=8, gpus=1, count=4)))
    assert (connected.cpus, connected.gpus, connected.is_one_machine) == (36, 4, False)
    connected.admit(plan(Demand("worker", 4, 1, gpus=1)))


def test_a_refused_plan_says_what_was_wanted_what_there_is_and_how_to_mend_it() -> None:
    with pytest.raises(ClusterError, match=r"3 worker x .2 CPU.*The cluster has 1 x .2 CPU, 0 GPU.*RAY_ADDRESS"):
        Cluster("x", "started", (Node(cpus=2),)).admit(plan(Demand("worker", 3, 2)))


def test_workers_find_the_environments_scripts_although_it_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert cluster.worker_environment()["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_an_address_that_nobody_answers_is_the_users_mistake() -> None:
    script = (
        "from raytune_ft.core import cluster\nfrom raytune_ft.core.errors import ClusterError\n"
        "try:\n    cluster.connect()\nexcept ClusterError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in done.stdout


@pytest.mark.ray
def test_what_another_process_holds_is_left_to_it(ray_cluster: Cluster) -> None:
    import ray

    @ray.remote(num_cpus=1)
    class Holder:
        def ready(self) -> None:
            pass

    worker = Demand("worker", 1, 1)
    assert ray_cluster.share(worker) == 2
    holder = Holder.remote()
    ray.get(holder.ready.remote())
    assert ray_cluster.share(worker) == 1
    ray.kill(holder)  # gives back a moment later, and that moment is waited for
    assert ray_cluster.share(worker) == 2


BESIDE_ANOTHER = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from raytune_ft.core import cluster, doctor
connected = cluster.connect(num_cpus=1)
import ray
print(connected.origin, ray.get(ray.remote(lambda: "ran").remote()), connected.address, flush=True)
cluster.disconnect()
finding = doctor._cluster("")
print(finding.verdict, finding.remedy)
"""


@pytest.mark.ray
def test_beside_a_cluster_that_somebody_started_here_a_local_one_is_started_and_both_say_so() -> None:
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # Ray's sockets want a short path
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": folder, "PYTHONPATH": str(Path(__file__).parents[2])}
        start = ["ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1", f"--port={cluster._free_port()}"]
        command = [sys.executable, "-m", *start, "--include-dashboard=false"]
        head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        noted = Path(folder) / "ray/ray_current_cluster"
        try:
            while not noted.exists():
                assert head.poll() is None
                time.sleep(0.1)
            other = noted.read_text()
            command = [sys.executable, "-c", BESIDE_ANOTHER]
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
            assert done.stdout.startswith("started ran ") and other not in done.stdout.splitlines()[0], done.stderr
            assert f"note another Ray cluster runs on this machine, at {other}" in done.stdout
            assert f"another Ray cluster runs on this machine, at {other}" in done.stderr
            assert noted.read_text() == other
        finally:
            left = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(timeout=60)
            psutil.wait_procs(left, timeout=60)


WAITS = """
import sys, time
import psutil
from raytune_ft.core import cluster
from raytune_ft.exits import guarded

def work():
    cluster.connect(num_cpus=1)
    import ray
    print("children:", *[p.pid for p in psutil.Process().children(recursive=True)], flush=True)
    ray.get(ray.remote(lambda: time.sleep(60)).remote()) if sys.argv[1] == "in Ray" else time.sleep(60)

sys.exit(guarded(work))
"""


@pytest.mark.ray
@pytest.mark.parametrize("where", ["in Ray", "in Python"])
def test_sigterm_ends_a_command_and_its_cluster_in_order(where: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, where], stdout=pipe, stderr=pipe, text=True, env=environment
    )
    assert process.stdout is not None
    children = process.stdout.readline().split()[1:]
    assert children
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "terminated; the same command goes on from here" in said
    _, alive = psutil.wait_procs([psutil.Process(p) for p in map(int, children) if psutil.pid_exists(p)], timeout=60)
    assert not alive


STARTS = """
import os, signal, sys, threading, time
from raytune_ft.core import cluster
from raytune_ft.exits import guarded

def terminate():
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # until Ray has set its own
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=terminate, daemon=True).start()
sys.exit(guarded(lambda: cluster.connect(num_cpus=1)))
"""


@pytest.mark.ray
def test_sigterm_while_a_cluster_starts_ends_the_command_in_order() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", STARTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 143, done.stderr
    assert "terminated; the same command goes on from here" in done.stderr
    assert "Traceback" not in done.stderr


TRAIN_IN_A_HOSTILE_PLACE = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from raytune_ft.core import cluster
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.run import FineTuner
model, data, out = sys.argv[1:]
cluster.connect(num_cpus=2)
config = FineTuningConfig(model_path=model, dataset_path=data, output_dir=out, num_workers=2, max_steps=2)
print("steps:", FineTuner(config).train().numbers["steps"], flush=True)
children = [p.pid for p in __import__("psutil").Process().children(recursive=True)]
print("children:", *children, flush=True)
"""


@pytest.mark.ray
def test_deepspeed_trains_without_compiler_activated_environment_or_clean_build_cache(
    tiny_model: Path, orders: Path, tmp_path: Path
) -> None:
    stale = tmp_path / "extensions" / "deepspeed_shm_comm"
    stale.mkdir(parents=True)
    (stale / "lock").touch()  # a killed build leaves this, and every later build waits for it
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "bash", "env", "uname", "ps", "ldconfig"):  # a PATH without gcc, g++, ninja and the environment
        found = next(
            (p for p in (Path("/bin") / tool, Path("/usr/sbin") / tool, Path("/sbin") / tool) if p.exists()), None
        )
        if found is not None:
            (tools / tool).symlink_to(found)
    environment = {key: value for key, value in os.environ.items() if key not in {"VIRTUAL_ENV", "RAY_ADDRESS"}}
    environment |= {
        "PATH": str(tools),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "CC": "/nowhere/cc",
        "CXX": "/nowhere/c++",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    arguments = [str(tiny_model), str(orders), str(tmp_path / "out")]
    command = [sys.executable, "-c", TRAIN_IN_A_HOSTILE_PLACE, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=480, env=environment, cwd=tmp_path, check=False
    )
    assert "steps: 2" in done.stdout, done.stderr[-3000:]
    assert "started locally" in done.stderr
    children = next(line for line in done.stdout.splitlines() if line.startswith("children:")).split()[1:]
    assert children
    left = [psutil.Process(pid) for pid in map(int, children) if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(left, timeout=60)
    assert not alive
