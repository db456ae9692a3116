"""The one door to Ray's life: join or start a cluster, say which, check what a run needs, stop only what was started.

A cluster is joined when ``RAY_ADDRESS`` names one (inside ``ray job submit`` it does); else a local one is started,
also beside another one on this machine, with its dashboard on, since Ray Train's placement-group cleaner asks the
dashboard's state API.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytune_ft.core import relay
from raytune_ft.core.errors import ClusterError, RaytuneError, first_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.placement import UNLIMITED, Demand, Node, ResourcePlan, largest_share, misfit
from raytune_ft.core.termination import sigterm_like_ctrl_c

logger = logging.getLogger("raytune_ft")


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process is connected to."""

    address: str
    origin: Literal["joined", "started"]
    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """Logical CPUs of all nodes, those that the autoscaler may start included."""
        return sum(node.cpus * node.count for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes, those that the autoscaler may start included."""
        return sum(node.gpus * node.count for node in self.nodes)

    @property
    def is_one_machine(self) -> bool:
        """Whether every process of a run sees this machine's files."""
        return sum(node.count for node in self.nodes) == 1

    def __str__(self) -> str:
        kind = "joined" if self.origin == "joined" else "started locally"
        nodes = sum(node.count for node in self.nodes)
        return f"Ray cluster {kind} at {self.address}: {number_of(nodes, 'node')}, {self.cpus:g} CPU, {self.gpus:g} GPU"

    def free(self, patience_s: float = 3.0) -> tuple[Node, ...]:
        """The nodes with what nothing holds now; what has just ended gets `patience_s` to give back what it held."""
        deadline = time.monotonic() + patience_s
        while (found := _nodes(free=True)) != _nodes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def share(self, demand: Demand) -> float:
        """Whole CPUs that each process of `demand` can hold of what is free, all of them at once; at least 1."""
        return float(largest_share(demand, self.free()))

    def admit(self, plan: ResourcePlan) -> None:
        """Prints the plan, and refuses it if this cluster cannot place it.

        Raises:
            ClusterError: as `refuse_misfit`.
        """
        self.refuse_misfit(plan)
        logger.info("%s", plan)

    def refuse_misfit(self, plan: ResourcePlan) -> None:
        """Checks that this cluster can place a plan, if nothing else is on it.

        Raises:
            ClusterError: with the plan, what the cluster has, and how to mend it.
        """
        reason = misfit(plan, self.nodes)
        if reason is not None:
            has = ", ".join(f"{node.count} x ({node.cpus:g} CPU, {node.gpus:g} GPU)" for node in self.nodes)
            raise ClusterError(
                f"{plan}. This cannot be placed: {reason}. The cluster has {has or 'no nodes'}. "
                "Ask for fewer or smaller processes, or join a larger cluster (RAY_ADDRESS)."
            )


def connect(*, num_cpus: int | None = None) -> Cluster:
    """Connects to Ray and says to which cluster; calling it again returns the same cluster.

    Args:
        num_cpus: logical CPUs of a cluster that has to be started here; by default this machine's usable cores.

    Raises:
        ClusterError: if ``RAY_ADDRESS`` names a cluster that cannot be reached.
    """
    import ray

    if not ray.is_initialized():
        _quiet_ray()
        with sigterm_like_ctrl_c():
            if address := named_address():
                _join(address)
                origin: Literal["joined", "started"] = "joined"
            else:
                _start(num_cpus)
                origin = "started"
        _listen()
        cluster = Cluster(ray.get_runtime_context().gcs_address, origin, _nodes())
        logger.info("%s", cluster)
        if origin == "started" and (other := found_here()):
            logger.warning("%s", beside(other))
        _state["origin"] = origin
        return cluster
    return Cluster(ray.get_runtime_context().gcs_address, _state.get("origin", "joined"), _nodes())


def named_address() -> str:
    """The address of the cluster to join; empty if one is to be started (also by Ray's word for that, ``local``)."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def found_here() -> str | None:
    """The address of a cluster that ``ray start`` began on this machine, and that answers; None if there is none."""
    from ray._private.utils import read_ray_address

    address = read_ray_address()
    return address if address and answers(address) else None


def beside(address: str) -> str:
    """What it means for a run that another cluster is on this machine."""
    return (
        f"another Ray cluster runs on this machine, at {address}: RAY_ADDRESS is not set, so that it is left alone, "
        f"and shares cores and memory with a local one. To use it, set RAY_ADDRESS={address} and, if it wants a token, "
        "RAY_AUTH_MODE=token"
    )


def disconnect() -> None:
    """Leaves the cluster, and stops it if `connect` started it; nothing happens when there is none."""
    import ray

    if ray.is_initialized() and "origin" in _state:
        ray.shutdown()
    _state.clear()
    if os.environ.get(_WATCHER) == _NO_WATCHER:
        del os.environ[_WATCHER]


_state: dict[str, Literal["joined", "started"]] = {}
_WATCHER, _NO_WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "false"
"""Ray Train's watch for nodes that are about to be taken away, an actor for each run: one's own machine is not."""


def own_error(error: BaseException | None) -> RaytuneError | None:
    """The error that a worker raised on purpose, out of what Ray wraps around it; None if it raised none of ours."""
    waiting = [error]
    while waiting:
        seen = waiting.pop(0)
        if seen is None:
            continue
        cause = getattr(seen, "cause", None)  # Ray's copy of an error has its type, and the error itself as cause
        if isinstance(seen, RaytuneError) and cause is None:
            return seen
        lost = getattr(seen, "worker_failures", None)
        waiting += [cause, *(lost.values() if isinstance(lost, dict) else ()), seen.__cause__]
    return None


@contextmanager
def own_errors() -> Iterator[None]:
    """Within the block, an error that a worker raised on purpose comes out as it was raised there."""
    try:
        yield
    except Exception as error:
        own = own_error(error)
        if own is None:
            raise
        raise own from None


def report_to_driver() -> None:
    """In a worker: our own lines go to its standard output, marked, so that the driver says them as its own."""
    os.environ.update(worker_environment())
    relay.mark_own_lines()


def worker_environment() -> dict[str, str]:
    """Environment variables that every process of a run needs: this interpreter's scripts on PATH, no hub telemetry.

    A program started as ``.venv/bin/raytune-ft`` does not put ``.venv/bin`` on PATH, where ``ninja`` lies.
    """
    path = os.environ.get("PATH", "")
    scripts = str(Path(sys.executable).parent)
    if scripts not in path.split(os.pathsep):
        path = scripts + os.pathsep + path
    return {
        "PATH": path,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }


def _quiet_ray() -> None:
    os.environ.update(worker_environment())
    for key, value in {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_TRAIN_ENABLE_V2": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_raylet_start_wait_time_s": "120",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would swallow Ctrl-C and return as if all trials had run
    }.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def _listen() -> None:
    """Takes over from Ray what workers print and what Ray has to say of them, where this Ray lets us."""
    try:
        from ray._private import worker
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as printed
    except ImportError:
        return  # then Ray prints it, with its own prefix
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda batch, ignore_prefix=False: relay.say(batch)
    printed.remove_handler("ray_print_logs")
    printed.add_handler("ray_print_logs", relay.say)


_TOKEN = (
    "A cluster that `ray start` began wants a token by default: RAY_AUTH_MODE=token, and the token in RAY_AUTH_TOKEN "
    "or ~/.ray/auth_token, give it."
)


def _join(address: str) -> None:
    import ray

    _knock(address)
    try:
        ray.init(address=address, logging_level=logging.WARNING, runtime_env={"env_vars": worker_environment()})
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ClusterError(
            f"RAY_ADDRESS={address}: this Ray cluster cannot be joined ({said[:400]}). {_TOKEN} Ray and Python have to "
            "be the cluster's versions. Unset RAY_ADDRESS to start a local one."
        ) from None


def _knock(address: str) -> None:
    """Refuses at once an address where nothing listens; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error.strerror or error}). "
            "Unset RAY_ADDRESS to start a local one, or start the cluster first."
        ) from None


def _start(num_cpus: int | None) -> None:
    import ray

    # Ray's own actors ask the state API by this variable; without it they give up where two clusters share a machine.
    port = _free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    try:
        with _daemons_in_own_sessions():
            ray.init(
                address="local",  # else Ray takes a cluster that `ray start` began here, or the note of one that died
                num_cpus=num_cpus or usable_cpus(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=port,
                logging_level=logging.ERROR,
                log_to_driver=True,
            )
    except Exception as error:
        # Ray raises bare exceptions here, such as "The current node timed out during startup".
        raise ClusterError(
            f"a local Ray cluster did not start: {first_line(error)} "
            "Wait until the machine is less busy, or name a running cluster in RAY_ADDRESS."
        ) from error
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
    os.environ.setdefault(_WATCHER, _NO_WATCHER)
    atexit.register(disconnect)


@contextmanager
def _daemons_in_own_sessions() -> Iterator[None]:
    """Within the block, Ray's daemons start outside this process's group: a signal to the group leaves them running.

    `timeout` and schedulers end a command so, and its last checkpoint needs them. They end with this process all the
    same, also where it is killed, by the kernel's signal upon a parent's death.
    """
    from ray._private import services
    from ray._private.utils import detect_fate_sharing_support

    plain = getattr(services, "ConsolePopen", None)
    if plain is None or sys.platform == "win32" or not detect_fate_sharing_support():
        yield  # Ray's reaper, where the kernel does not help, finds its processes by the group
        return
    services.ConsolePopen = functools.partial(plain, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = plain


def answers(address: str) -> bool:
    """Whether something listens at ``host:port``, the address of a cluster."""
    try:
        _knock(address)
    except ClusterError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usable_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nodes(*, free: bool = False) -> tuple[Node, ...]:
    """Nodes by size; `free`: of those that are there, what nothing holds."""
    import ray
    from ray._private.state import available_resources_per_node

    unused = available_resources_per_node() if free else {}
    whole: Counter[tuple[float, float]] = Counter()
    found: Counter[tuple[float, float]] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            left = unused.get(node["NodeID"], {}) if free else node["Resources"]
            whole[node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)] += 1
            found[left.get("CPU", 0.0), left.get("GPU", 0.0)] += 1
    for cpus, gpus, most in _autoscaled():
        found[cpus, gpus] += max(0, most - whole[cpus, gpus])
    return tuple(Node(cpus, gpus, count) for (cpus, gpus), count in sorted(found.items(), reverse=True) if count)


def _autoscaled() -> list[tuple[float, float, int]]:
    """CPUs, GPUs and highest number of nodes of each group that the cluster's autoscaler may start."""
    from ray._private.state import state

    config: Any = state.get_cluster_config()
    if config is None:
        return []
    groups = []
    for group in config.node_group_configs:
        most = UNLIMITED if group.max_count == -1 else group.max_count
        if most > 0:
            groups.append((float(group.resources.get("CPU", 0)), float(group.resources.get("GPU", 0)), most))
    return groups
