from __future__ import annotations

import networkx
import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.components import components

from .planted import parts_of


def graph(edges: list[tuple[int, int]]) -> pa.Table:
    return pa.table(
        {"low": pa.array([a for a, _ in edges], pa.int64()), "high": pa.array([b for _, b in edges], pa.int64())}
    )


def roots(edges: list[tuple[int, int]], *, parts: int, few: int) -> dict[int, int]:
    rows = components(LocalBlocks(parts_of(graph(edges), parts)), few=few).table().to_pylist()
    assert len(rows) == len({row["node"] for row in rows})
    return {row["node"]: row["root"] for row in rows}


@pytest.mark.parametrize("few", [0, 1000])
def test_a_component_is_named_by_its_smallest_node(few: int) -> None:
    edges = [(9, 5), (5, 7), (2, 3), (3, 2), (4, 4)]
    assert roots(edges, parts=2, few=few) == {5: 5, 7: 5, 9: 5, 2: 2, 3: 2}


def _random(nodes: int, edges: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(edges)
    names = rng.permutation(10**15 + np.arange(nodes))
    return [(int(names[a]), int(names[b])) for a, b in rng.integers(0, nodes, (edges, 2))]


@pytest.mark.parametrize(
    "edges",
    [
        [(n, n + 1) for n in range(200)],
        [((n * 37) % 211, ((n + 1) * 37) % 211) for n in range(150)],
        [(500, n) for n in range(300)],
        _random(400, 150),
        _random(400, 380),
    ],
    ids=["path", "shuffled path", "star round its largest", "many small", "one large"],
)
def test_turns_of_stars_and_one_task_agree_with_networkx(edges: list[tuple[int, int]]) -> None:
    peer = networkx.Graph([edge for edge in edges if edge[0] != edge[1]])
    wanted = {node: min(members) for members in networkx.connected_components(peer) for node in members}
    assert roots(edges, parts=1, few=1000) == wanted
    assert roots(edges, parts=5, few=0) == wanted
    assert roots(edges[::-1], parts=3, few=0) == wanted
