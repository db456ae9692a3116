"""Near-duplicates: pairs of rows alike by their word 5-grams, and which row of each cluster stays.

Rows are sketched once; only ids and hashes are shuffled after that. The result follows from the rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data import components
from raytune_ft.data.blocks import Blocks, pass_here
from raytune_ft.data.minhash import (
    SKETCH_SCHEMA,
    band_keys,
    candidate_pairs,
    flat_lists,
    pair_key,
    place_of,
    with_bands,
)
from raytune_ft.data.shingles import Places

_SIDE_SCHEMA = pa.schema(
    [
        *(SKETCH_SCHEMA.field(name) for name in ("id", "node", "stratum", "shingles")),
        pa.field("other", pa.int64()),
    ]
)
_HALF_SCHEMA = pa.schema([pa.field("pair", pa.int64()), *_SIDE_SCHEMA])
EDGE_SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.int64()) for name in ("low", "high", "low_node", "high_node")),
        *(pa.field(name, pa.int64()) for name in ("low_stratum", "high_stratum")),
        pa.field("similarity", pa.float32()),
    ]
)
"""Two rows that are near-duplicates, with the node and stratum of each."""
NEAR_REASON = "near-duplicate"
FEW_BYTES = 128 << 20
"""Sketches that one task compares: about 200,000 rows of 100 words, and 600 MB at its height."""
_PAIRS_AT_ONCE = 4096


def near_edges(sketches: Blocks, threshold: float) -> Blocks:
    """The pairs of rows (`EDGE_SCHEMA`) whose shingle sets have a Jaccard similarity of `threshold` or more.

    Each such pair that meets in a band is found, and no other: similarities are exact. Up to `FEW_BYTES` of sketches
    are compared in one task, more by shuffles.
    """
    sketches = sketches.map(with_bands, threshold=threshold).kept()
    if sketches.size() <= FEW_BYTES:
        settings = {"threshold": threshold}
        return sketches.together().map(pass_here, run=shuffled_edges, settings=settings).kept()
    return shuffled_edges(sketches, threshold).kept()


def shuffled_edges(sketches: Blocks, threshold: float) -> Blocks:
    """The edges by three shuffles: of bands, of candidates with the sketches they ask for, and of pairs."""
    met = sketches.map(band_keys).by_key("key").map(candidate_pairs)
    sides = met.map(as_sides).union(sketches.map(as_sides)).by_key("id")
    return sides.map(halves).by_key("pair").map(compare, threshold=threshold)


def as_sides(table: pa.Table) -> pa.Table:
    """Candidates or sketches in one schema, so that those of one id can be brought together."""
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in _SIDE_SCHEMA
    ]
    return pa.table(columns, schema=_SIDE_SCHEMA)


def halves(sides: pa.Table) -> Iterator[pa.Table]:
    """For each candidate of a row the row's sketch with the `other` id, under a hash of the `pair`.

    All candidates and the sketch of an id must be in the table.
    """
    asked = pc.is_valid(sides.column("other"))
    sketches = sides.filter(pc.invert(asked)).sort_by("id")
    wanted = sides.filter(asked)
    yield _HALF_SCHEMA.empty_table()
    if not wanted.num_rows:
        return
    ids, others = (wanted.column(name).to_numpy() for name in ("id", "other"))
    order = np.lexsort((others, ids))
    fresh = np.concatenate(([True], (ids[order][1:] != ids[order][:-1]) | (others[order][1:] != others[order][:-1])))
    ids, others = ids[order][fresh], others[order][fresh]
    keys = pair_key(np.minimum(ids, others), np.maximum(ids, others)).view(np.int64)
    places = np.searchsorted(sketches.column("id").to_numpy(), ids)
    for at in range(0, len(ids), _PAIRS_AT_ONCE):
        part = sketches.take(places[at : at + _PAIRS_AT_ONCE]).drop_columns("other")
        part = part.append_column("other", pa.array(others[at : at + _PAIRS_AT_ONCE]))
        yield part.add_column(0, "pair", pa.array(keys[at : at + _PAIRS_AT_ONCE])).cast(_HALF_SCHEMA)


def compare(pairs: pa.Table, threshold: float) -> Iterator[pa.Table]:
    """The edges among pairs, from the two `halves` of each, which must be in the table."""
    yield EDGE_SCHEMA.empty_table()
    ids, others = (pairs.column(name).to_numpy() for name in ("id", "other"))
    low, high = np.minimum(ids, others), np.maximum(ids, others)
    order = np.lexsort((ids, high, low))
    for at in range(0, len(order), 2 * _PAIRS_AT_ONCE):
        part = pairs.take(order[at : at + 2 * _PAIRS_AT_ONCE])
        one, two = part.take(np.arange(0, part.num_rows, 2)), part.take(np.arange(1, part.num_rows, 2))
        similarity = _jaccard(part)
        near = np.flatnonzero(similarity >= threshold)
        columns = [one.column("id"), two.column("id"), one.column("node"), two.column("node")]
        columns += [one.column("stratum"), two.column("stratum"), pa.array(similarity.astype(np.float32))]
        yield pa.table(columns, schema=EDGE_SCHEMA).take(near)


def _jaccard(sides: pa.Table) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Similarity of the sets in rows 0 and 1, 2 and 3, and so on."""
    values, starts = flat_lists(sides.column("shingles"))
    sizes = np.diff(starts)
    pair_of = np.repeat(np.arange(sides.num_rows, dtype=np.uint64) >> np.uint64(1), sizes)
    tagged = np.sort((pair_of << np.uint64(32)) | values)
    # Within a set no value repeats, so what repeats within a pair is shared.
    shared = tagged[1:][tagged[1:] == tagged[:-1]] >> np.uint64(32)
    common = np.bincount(shared.astype(np.int64), minlength=sides.num_rows // 2)
    return np.asarray(common / (sizes[0::2] + sizes[1::2] - common))


def near_labels(edges: Blocks) -> Blocks:
    """For each row of a cluster: its `id` and `node`, the cluster's first row (`root`), and a `partner`.

    The partner is the most similar of its earlier neighbours, or where all are later, of those.
    """
    if edges.rows() <= components.FEW_EDGES:
        return edges.together().map(pass_here, run=shuffled_labels, settings={}).kept()
    return shuffled_labels(edges).kept()


def shuffled_labels(edges: Blocks) -> Blocks:
    """The labels by a shuffle of edges and roots."""
    roots = components.components(edges).map(as_links)
    return roots.union(edges.map(edge_links)).by_key("id").map(best_links)


_LINK_SCHEMA = pa.schema(
    [*(pa.field(name, pa.int64()) for name in ("id", "node", "root", "partner")), pa.field("similarity", pa.float32())]
)


def as_links(roots: pa.Table) -> pa.Table:
    """Roots in the schema of links, with what they do not know null."""
    count = roots.num_rows
    columns = [roots.column("node"), pa.nulls(count, pa.int64()), roots.column("root"), pa.nulls(count, pa.int64())]
    return pa.table([*columns, pa.nulls(count, pa.float32())], schema=_LINK_SCHEMA)


def edge_links(edges: pa.Table) -> pa.Table:
    """Each edge from either of its ends, without a root."""
    sides = []
    for end, other in (("low", "high"), ("high", "low")):
        columns = [edges.column(end), edges.column(f"{end}_node"), pa.nulls(edges.num_rows, pa.int64())]
        sides.append(pa.table([*columns, edges.column(other), edges.column("similarity")], schema=_LINK_SCHEMA))
    return pa.concat_tables(sides)


def best_links(links: pa.Table) -> pa.Table:
    """One link for each id, with its root; all links of an id must be in the table."""
    known = pc.is_valid(links.column("root"))
    roots = links.filter(known).sort_by("id").column("root")
    links = links.filter(pc.invert(known))
    ids, partners, similarity = (links.column(name).to_numpy() for name in ("id", "partner", "similarity"))
    order = np.lexsort((partners, -similarity, partners > ids, ids))
    first = order[np.flatnonzero(np.diff(ids[order], prepend=-1))]
    best = links.take(first)
    return best.set_column(2, "root", roots)


def near_reasons(
    row_ids: Places, links: pa.Table, labels: Sequence[str], tests: int, *, only_tests: bool
) -> list[str | None]:
    """Why rows are left out as near-duplicates; None for the first of a cluster and rows in none.

    Args:
        row_ids: the rows.
        links: what `near_labels` gave, at least for these rows.
        labels: the names of the source files, by number.
        tests: how many of them, the first, are of `test_sources`; their rows stay.
        only_tests: leaves out near-duplicates of the test files only.
    """
    columns = zip(*(links.column(name).to_pylist() for name in ("id", "root", "partner", "similarity")), strict=True)
    found = {row_id: (root, partner, similarity) for row_id, root, partner, similarity in columns}

    def reason(row_id: int) -> str | None:
        root, partner, similarity = found.get(row_id, (row_id, 0, 0.0))
        of_test = place_of(root)[0] < tests
        if root == row_id or place_of(row_id)[0] < tests or (only_tests and not of_test):
            return None
        text = f"{NEAR_REASON}: of {_name(partner, labels)} (similarity {similarity:.2f})"
        return text if partner == root else f"{text}, which leads to {_name(root, labels)}"

    return [reason(row_id) for row_id in row_ids.tolist()]


def _name(row_id: int, labels: Sequence[str]) -> str:
    file, position = place_of(row_id)
    return f"{labels[file]}:{position}"
