"""Whether trials share banks, how many at a time, and what of the cluster each bank gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.placement import Demand, Node
from raytune_ft.tuning.config import SweepConfig
from raytune_ft.tuning.packs import Packs

PROXY_CPUS = 0.01
POINTERS_KEPT = 4
"""Checkpoints of a trial that Ray Tune keeps; of a packed trial each names a snapshot of the bank's."""
_MOST_TOGETHER = 64
_TOGETHER_PER_CPU = 4
"""A core that computes whole trials is as fast with four as with more, and each has a process of 200 MB."""
_LEAST_CPUS = 0.5
"""A bank with less of a node is not worth it."""
_PAUSING = frozenset({"hyperband", "pbt"})


def apart(config: SweepConfig, packs: Packs) -> dict[str, str]:
    """The packs whose trials share no base, as far as settings tell, by their names, and why."""
    if config.packed == "never":
        return dict.fromkeys(packs.settings, "packed: never")
    if config.objective not in {"train", "align"}:
        why = f"objective: {config.objective}; a shared base is for trials that train on examples, or align"
        return dict.fromkeys(packs.settings, why)
    if config.training.num_workers > 1:
        why = f"training.num_workers is {config.training.num_workers}: such a trial is a Ray Train run"
        return dict.fromkeys(packs.settings, why)
    return packs.apart()


def refuse_pausing(config: SweepConfig, apart: Mapping[str, str]) -> None:
    """Checks that trials which share no base, for the reasons in `apart`, need not be paused, or changed on their way.

    Raises:
        ConfigError: if the scheduler does that.
    """
    for name, why in apart.items():
        if config.scheduler in _PAUSING:
            raise ConfigError(
                f"scheduler: {config.scheduler} pauses trials, which only those on a shared base can be, and {name} "
                f"cannot share one ({why}); set scheduler: asha"
            )


def left_for_banks(config: SweepConfig, nodes: Sequence[Node], *, use_gpu: bool) -> list[Node]:
    """What banks may take where trials with runs of their own need room beside them; nothing if that is too little.

    On GPUs one of them is left to such a trial, on CPUs `cpus_per_trial` of each of the largest nodes.
    """
    largest = max(nodes, key=lambda node: (node.gpus if use_gpu else 0, node.cpus))
    smaller = replace(largest, cpus=largest.cpus - config.cpus_per_trial, gpus=largest.gpus - use_gpu, count=1)
    others = [node for node in nodes if node is not largest]
    if not use_gpu:
        return [*others, replace(smaller, count=largest.count)] if smaller.cpus >= _LEAST_CPUS else []
    if largest.count > 1:
        others.append(replace(largest, count=largest.count - 1))
    left = [*others, smaller] if smaller.gpus else others
    return left if any(node.gpus for node in left) else []


def own_runs(config: SweepConfig, together: int, *, use_gpu: bool) -> Demand:
    """What trials with runs of their own hold, a process each."""
    threads = max(1, math.floor(config.cpus_per_trial))
    return Demand("trial", together, config.cpus_per_trial, int(use_gpu), threads)


def own_together(config: SweepConfig, nodes: Sequence[Node], trials: int, *, use_gpu: bool) -> int:
    """Trials with runs of their own at the same time: as many as the nodes have room for, at least one."""
    room = 0
    for node in nodes:
        here = math.floor(node.cpus / config.cpus_per_trial)
        room += min(here, math.floor(node.gpus) if use_gpu else here) * min(node.count, trials)
    return max(1, min(trials, room, config.max_concurrent_trials or trials))


def together(config: SweepConfig, nodes: Sequence[Node], trials: int) -> int:
    """Trials that share banks at the same time: all up to 64; on CPUs, no more than keep the cores busy.

    HyperBand gets all up to 64 on CPUs, too: it compares what is there. Those of a population wait for each other, and
    so all of them run.
    """
    if config.scheduler == "pbt":
        return trials
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
