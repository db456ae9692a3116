"""A packed sweep on two nodes (two raylets on this machine), one of which is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from raytune_ft.tuning.result import SweepResult

from .test_packed import sweep

PROGRAM = textwrap.dedent(
    """
    import json, logging, os, sys, threading, time
    from pathlib import Path
    import ray
    from ray.cluster_utils import Cluster

    def lose_node(cluster, node, folder):
        while len(list(folder.glob("snapshots/*/*/manifest.json"))) < 4:
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)
        print("node lost", flush=True)

    if __name__ == "__main__":
        from raytune_ft.core.cluster import connect
        from raytune_ft.tuning.config import SweepConfig
        from raytune_ft.tuning.run import tune
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
        node = cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = cluster.address
        config = SweepConfig(**json.load(open(sys.argv[1])))
        logging.basicConfig(level=logging.INFO)
        connect()
        if sys.argv[2] == "lose":
            threading.Thread(target=lose_node, args=(cluster, node, Path(config.output_dir)), daemon=True).start()
        tune(config)
        held = ray.cluster_resources()["CPU"] - ray.available_resources()["CPU"]
        end = time.monotonic() + 60
        while held > 0 and time.monotonic() < end:
            time.sleep(0.2)
            held = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
        print("held", held, flush=True)
        ray.shutdown()
        cluster.shutdown()
    """
)


def run_on_two_nodes(tiny_model: Path, orders: Path, folder: Path, what: str) -> tuple[str, SweepResult]:
    config = sweep(tiny_model, orders, folder / "sweep", scheduler="none", training={"max_steps": 60})
    (folder / "config.json").write_text(config.model_dump_json())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-c", PROGRAM, str(folder / "config.json"), what]
    done = subprocess.run(command, check=False, env=environment, timeout=280, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = SweepResult.from_json(json.loads((folder / "sweep/result.json").read_text()))
    return done.stdout + done.stderr, result


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize("what", ["keep", "lose"])
def test_two_nodes_have_a_bank_each_and_the_loss_of_one_loses_no_trial(what, tiny_model, orders, tmp_path) -> None:
    said, result = run_on_two_nodes(tiny_model, orders, tmp_path, what)
    assert "2 bank of adapters x" in said
    assert ("node lost" in said) == (what == "lose")
    assert "held 0.0" in said
    assert [trial.ending for trial in result.trials] == ["finished"] * 4
    for trial in result.trials:
        # A trial that changes banks may report once out of turn; none of its evaluations is missing.
        assert {row["global_step"] for row in trial.curve} >= set(range(2, 61, 2))
