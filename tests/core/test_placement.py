"""Plans are checked against nodes, and shares computed from them."""

from __future__ import annotations

import pytest

from raytune_ft.core.placement import Demand, Node, ResourcePlan, largest_share, misfit


def plan(*demands: Demand) -> ResourcePlan:
    return ResourcePlan("test", demands)


def test_two_workers_fit_on_two_cpus_and_three_do_not() -> None:
    nodes = [Node(cpus=2)]
    assert misfit(plan(Demand("worker", 2, 1)), nodes) is None
    assert misfit(plan(Demand("worker", 3, 1)), nodes) == "no node has room for 3 worker x (1 CPU, 1 thread)"


def test_a_process_needs_one_node_to_itself_not_the_sum_of_two() -> None:
    nodes = [Node(cpus=2), Node(cpus=2)]
    assert misfit(plan(Demand("worker", 1, 3)), nodes) is not None
    assert misfit(plan(Demand("worker", 2, 2)), nodes) is None


def test_gpus_are_counted_apart_from_cpus() -> None:
    assert misfit(plan(Demand("worker", 1, 1, gpus=1)), [Node(cpus=8)]) is not None
    assert misfit(plan(Demand("worker", 2, 1, gpus=1)), [Node(cpus=4, gpus=1, count=2)]) is None


def test_the_large_processes_are_placed_first() -> None:
    # 1 + 1 + 2 on nodes of 2: in the given order the ones would spread and leave no room for the two.
    demands = (Demand("small", 2, 1), Demand("large", 1, 2))
    assert misfit(plan(*demands), [Node(cpus=2), Node(cpus=2)]) is None


@pytest.mark.parametrize(
    ("workers", "nodes", "share"),
    [
        (1, [Node(cpus=16)], 16),
        (3, [Node(cpus=16)], 5),
        (2, [Node(cpus=8), Node(cpus=6)], 6),
        (2, [Node(cpus=8), Node(cpus=3)], 4),
        (1, [Node(cpus=1.5)], 1),
        (4, [Node(cpus=2)], 1),
        (1, [], 1),
    ],
)
def test_each_process_gets_as_many_cpus_as_all_can_have_at_once(workers: int, nodes: list[Node], share: int) -> None:
    assert largest_share(Demand("worker", workers, 1), nodes) == share


def test_gpus_decide_where_a_process_can_be_before_its_share_is_computed() -> None:
    nodes = [Node(cpus=32), Node(cpus=8, gpus=1)]
    assert largest_share(Demand("worker", 1, 1, gpus=1), nodes) == 8
