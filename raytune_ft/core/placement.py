"""Whether what a run holds fits on a cluster's nodes, and how large it may be; pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

UNLIMITED = 1_000_000


@dataclass(frozen=True)
class Demand:
    """Processes of one kind that run at the same time: how many, and what each holds."""

    what: str
    count: int
    cpus: float
    gpus: float = 0
    threads: int = 1

    def __str__(self) -> str:
        gpus = f" + {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.count} {self.what} x ({self.cpus:g} CPU{gpus}, {self.threads} thread{'s' * (self.threads != 1)})"


@dataclass(frozen=True)
class Node:
    """Logical CPUs and GPUs of one node; `count` such nodes exist or can be started by the autoscaler."""

    cpus: float
    gpus: float = 0
    count: int = 1


@dataclass(frozen=True)
class ResourcePlan:
    """What a run holds at once on the cluster."""

    run: str
    demands: tuple[Demand, ...]

    def __str__(self) -> str:
        return f"Resource plan of {self.run}: " + "; ".join(str(demand) for demand in self.demands)


def misfit(plan: ResourcePlan, nodes: Sequence[Node]) -> str | None:
    """Why `plan` cannot be placed on `nodes`, or None if it can (first-fit decreasing, one process on one node)."""
    free = [[node.cpus, node.gpus] for node in nodes for _ in range(min(node.count, UNLIMITED // 1000))]
    needs = [(demand.gpus, demand.cpus, demand) for demand in plan.demands for _ in range(demand.count)]
    for gpus, cpus, demand in sorted(needs, key=lambda need: need[:2], reverse=True):
        for slot in free:
            if slot[0] >= cpus - 1e-9 and slot[1] >= gpus - 1e-9:
                slot[0] -= cpus
                slot[1] -= gpus
                break
        else:
            return f"no node has room for {demand}"
    return None


def largest_share(demand: Demand, nodes: Sequence[Node]) -> int:
    """Most whole CPUs that each process of `demand` can hold, all of them placed at once; at least 1."""
    share = max((int(node.cpus) for node in nodes), default=1)
    while share > 1 and misfit(ResourcePlan("", (replace(demand, cpus=share),)), nodes) is not None:
        share -= 1
    return max(1, share)
