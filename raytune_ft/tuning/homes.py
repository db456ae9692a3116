"""Whether trials share banks, how many at a time, and what of the cluster each bank gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raytune_ft.core.placement import Node
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.packs import Packs

PROXY_CPUS = 0.01
POINTERS_KEPT = 4
"""Checkpoints of a trial that Ray Tune keeps; of a packed trial each names a snapshot of the bank's."""
_MOST_TOGETHER = 64
_TOGETHER_PER_CPU = 4
"""A core that computes whole trials is as fast with four as with more, and each has a process of 200 MB."""
_PAUSING = frozenset({"hyperband", "pbt"})


def why_alone(config: SweepConfig, packs: Packs) -> str | None:
    """Why the trials of a sweep share no bases, as far as its settings tell; None if they do."""
    if config.packed == "never":
        return "packed: never"
    if config.training.num_workers > 1:
        return f"training.num_workers is {config.training.num_workers}: such a trial is a Ray Train run"
    return packs.why_alone()


def together(config: SweepConfig, nodes: Sequence[Node], trials: int) -> int:
    """Trials that share banks at the same time: all up to 64; on CPUs, no more than keep the cores busy.

    Schedulers that pause trials get all of them: they compare what is there.
    """
    if config.max_concurrent_trials is not None:
        return min(trials, config.max_concurrent_trials)
    most = _MOST_TOGETHER
    if config.scheduler not in _PAUSING and not config.training.on_gpu(sum(node.gpus for node in nodes)):
        cpus = math.ceil(max(node.cpus for node in nodes))
        most = min(most, _TOGETHER_PER_CPU * cpus * bank_count(nodes, trials, use_gpu=False))
    return min(trials, most)


def bank_count(nodes: Sequence[Node], trials: int, *, use_gpu: bool) -> int:
    """Homes of banks: every GPU; or, where none is used, every node as large as the largest; at most `trials`."""
    if use_gpu:
        return max(1, min(int(sum(node.gpus * node.count for node in nodes)), trials))
    largest = max(node.cpus for node in nodes)
    return min(sum(node.count for node in nodes if node.cpus == largest), trials)


def bank_cpus(nodes: Sequence[Node], trials: int, gpus: int, share: int = 1) -> tuple[float, int]:
    """Logical CPUs and threads of a bank: all of the largest node but what proxies need, shared by its banks.

    Ray takes whole CPUs, or a fraction below one.

    Args:
        nodes: of the cluster.
        trials: proxies.
        gpus: GPUs that banks are on; 0 if none.
        share: banks on each of them, or on each node.
    """
    node = max(nodes, key=lambda node: (node.gpus, node.cpus))
    banks = max(1, min(gpus, int(node.gpus))) * share
    room = (node.cpus - PROXY_CPUS * trials) / banks
    cpus = math.floor(room) if room >= 1 else max(1, math.floor(round(100 * room, 6))) / 100
    return float(cpus), max(1, int(node.cpus // banks))
