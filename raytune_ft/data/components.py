"""Connected components of a graph given as a table of edges, `low` and `high`; each is named by its smallest node.

Few edges are joined in one task. More are rewired by turns of large-star and small-star (Kiveris et al., Connected
Components in MapReduce and Beyond, 2014), each one shuffle of the edges by a node, until every node hangs directly
on the smallest of its component.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from raytune_ft.core.errors import RunError
from raytune_ft.data.blocks import Blocks
from raytune_ft.data.minhash import distinct_pairs, pair_key
from raytune_ft.data.shingles import Places

FEW_EDGES = 4_000_000
"""Edges that one task joins: about 300 MB at its height."""
_MOST_TURNS = 100


def components(edges: Blocks, *, few: int | None = None) -> Blocks:
    """Each node of an edge with the `root` of its component, itself included: columns `node` and `root`.

    Args:
        edges: columns `low` and `high`, in any order and however often.
        few: up to so many edges are joined in one task; by default `FEW_EDGES`.

    Raises:
        RunError: if the turns do not settle; their number grows with the logarithm of the longest path.
    """
    edges = edges.map(plain_edges).kept()
    if edges.rows() <= (FEW_EDGES if few is None else few):
        return edges.together().map(union_roots).kept()
    before: tuple[int, int] | None = None
    for _ in range(_MOST_TURNS):
        edges = edges.map(both_ways).by_key("node").map(large_star)
        edges = edges.map(high_first).by_key("node").map(small_star).kept()
        sums = edges.map(checksum).table()
        after = sum(sums.column("edges").to_pylist()), sum(sums.column("sum").to_pylist()) % 2**32
        if after == before:
            return edges.map(both_ways).by_key("node").map(star_roots).kept()
        before = after
    raise RunError(f"components were not settled after {_MOST_TURNS} turns; please report this")


def plain_edges(edges: pa.Table) -> pa.Table:
    """The edges of a table, each once with the smaller node first, without those from a node to itself."""
    ends = np.sort(np.stack([edges.column(name).to_numpy() for name in ("low", "high")], 1), axis=1)
    return _edges(ends[ends[:, 0] < ends[:, 1]])


def union_roots(edges: pa.Table) -> pa.Table:
    """`components` of edges that are all in the table."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ends = np.concatenate([edges.column(name).to_numpy() for name in ("low", "high")])
    nodes, places = np.unique(ends, return_inverse=True)
    low, high = places[: edges.num_rows], places[edges.num_rows :]
    graph = coo_array((np.ones(len(low), bool), (low, high)), shape=(len(nodes), len(nodes)))
    _, members = connected_components(graph, directed=False)
    # Nodes are in order, so the first of a component is its smallest.
    _, first = np.unique(members, return_index=True)
    return pa.table({"node": pa.array(nodes, pa.int64()), "root": pa.array(nodes[first][members], pa.int64())})


def both_ways(edges: pa.Table) -> pa.Table:
    """Each edge from either of its ends: `node` and `other`."""
    low, high = (edges.column(name).to_numpy() for name in ("low", "high"))
    return pa.table({"node": np.concatenate((low, high)), "other": np.concatenate((high, low))})


def high_first(edges: pa.Table) -> pa.Table:
    """Each edge from its larger end: `node` and `other`."""
    return pa.table({"node": edges.column("high"), "other": edges.column("low")})


def large_star(edges: pa.Table) -> pa.Table:
    """Each larger neighbour of a node linked to the smallest of the node and its neighbours.

    All edges (`both_ways`) of a node must be in the table.
    """
    node, other, smallest = _stars(edges)
    larger = other > node
    return _edges(np.stack((smallest[larger], other[larger]), 1))


def small_star(edges: pa.Table) -> pa.Table:
    """A node and its smaller neighbours linked to the smallest of these.

    All edges (`high_first`) of a node must be in the table.
    """
    node, other, smallest = _stars(edges)
    ends = np.concatenate((np.stack((smallest, other), 1), np.stack((smallest, node), 1)))
    return _edges(ends[ends[:, 0] < ends[:, 1]])


def star_roots(edges: pa.Table) -> pa.Table:
    """`node` and `root` of edges (`both_ways`) that are stars round the smallest nodes."""
    node, _, smallest = _stars(edges)
    first = np.flatnonzero(_changes(node))
    return pa.table({"node": node[first], "root": smallest[first]})


def checksum(edges: pa.Table) -> pa.Table:
    """One row that tells whether the edges changed, whatever parts they are in: how many, and a sum of hashes."""
    low, high = (edges.column(name).to_numpy() for name in ("low", "high"))
    total = int((pair_key(low, high) >> np.uint64(32)).sum()) % 2**32
    return pa.table({"edges": [edges.num_rows], "sum": [total]})


def _stars(edges: pa.Table) -> tuple[Places, Places, Places]:
    """Nodes and neighbours in order, and the smallest of each node and its neighbours."""
    pairs = distinct_pairs(np.stack([edges.column(name).to_numpy() for name in ("node", "other")], 1))
    node, other = pairs[:, 0], pairs[:, 1]
    if not len(node):
        return node, other, node
    first = np.flatnonzero(_changes(node))
    least = np.minimum(node[first], other[first])  # neighbours are in order
    return node, other, np.repeat(least, np.diff(np.append(first, len(node))))


def _changes(values: Places) -> np.ndarray[Any, Any]:
    """Whether each value differs from the one before it."""
    return np.concatenate((np.ones(min(len(values), 1), bool), values[1:] != values[:-1]))


def _edges(ends: Places) -> pa.Table:
    ends = distinct_pairs(ends)
    return pa.table({"low": pa.array(ends[:, 0], pa.int64()), "high": pa.array(ends[:, 1], pa.int64())})
