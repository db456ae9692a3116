"""Sketches of rows and the pairs among them worth comparing: MinHash signatures cut into bands (Broder, 1997; LSH).

A sketch is a row's set of word 5-grams, 32 bits each. Rows that share a band of their signatures meet in a bucket;
the pairs from the buckets are then compared by the sets themselves, so the signature decides recall, not precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data.shingles import Hashes, Places, mixed, ngram_hashes, row_texts, stream

WORDS = 5
"""Words of a shingle."""
PERMUTATIONS = 128
_RECALL = 0.985
_NEIGHBOURS = 15
_CHUNK = 2048
_POSITION_BITS = 40
_LABELS = 3  # true, false and none

SKETCH_SCHEMA = pa.schema(
    [("id", pa.int64()), ("node", pa.int64()), ("stratum", pa.int64()), ("shingles", pa.list_(pa.uint32()))]
)
"""`id` is a row's place (file and position), `node` the group of rows that it belongs to, `shingles` sorted."""


def bands_for(threshold: float) -> tuple[int, int]:
    """Bands and values per band: the most selective that find a pair at `threshold` with a chance of 0.985.

    The chance is 1 - (1 - threshold^values)^bands.
    """
    for values in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // values
        if 1 - (1 - threshold**values) ** bands >= _RECALL:
            return bands, values
    return PERMUTATIONS, 1


def place_ids(rows: pa.Table) -> Places:
    """One number for each row that sorts as (file, position) does; those of test files come first."""
    file, position = (rows.column(name).to_numpy() for name in ("file", "position"))
    return np.asarray((file.astype(np.int64) << _POSITION_BITS) | position)


def place_of(row_id: int) -> tuple[int, int]:
    """File and position of a row by its id."""
    return row_id >> _POSITION_BITS, row_id & ((1 << _POSITION_BITS) - 1)


def sketch_rows(rows: pa.Table, nodes: Places) -> pa.Table:
    """The sketches of the usable rows that have any text (`SKETCH_SCHEMA`).

    Rows with different labels (KTO) have no shingle in common: they say opposite things of one text. Nor has an answer
    that one preference chooses and another rejects.

    Args:
        rows: of `ROW_SCHEMA`, with `stratum`.
        nodes: the node of each row.
    """
    usable = pc.is_null(rows.column("reason"))
    rows, nodes = rows.filter(usable), nodes[usable.to_numpy()]
    parts = [_sketched(rows.slice(at, _CHUNK), nodes[at : at + _CHUNK]) for at in range(0, rows.num_rows, _CHUNK)]
    return pa.concat_tables([SKETCH_SCHEMA.empty_table(), *parts])


def _sketched(rows: pa.Table, nodes: Places) -> pa.Table:
    labels = rows.column("label").cast(pa.int8()).fill_null(-1).to_numpy().astype(np.uint64) + np.uint64(1)
    found = []
    for side, parts in enumerate((("messages", "text", "reference"), ("chosen",), ("rejected",))):
        hashes, starts = ngram_hashes(row_texts(rows, parts), WORDS, whole=True)
        row_of = np.repeat(np.arange(rows.num_rows, dtype=np.uint64), np.diff(starts))
        salted = mixed(hashes ^ (labels[row_of.astype(np.int64)] + np.uint64(_LABELS * side)))
        found.append((row_of << np.uint64(32)) | (salted >> np.uint64(32)))
    distinct = np.sort(np.concatenate(found))
    distinct = distinct[np.concatenate((distinct[:1] >= 0, distinct[1:] != distinct[:-1]))]
    ends = np.cumsum(np.bincount((distinct >> np.uint64(32)).astype(np.int64), minlength=rows.num_rows))
    lists = pa.ListArray.from_arrays(
        pa.array(np.concatenate(([0], ends)).astype(np.int32)), pa.array(distinct.astype(np.uint32))
    )
    columns = [place_ids(rows), nodes, rows.column("stratum").combine_chunks(), lists]
    table = pa.table([pa.array(column) for column in columns], schema=SKETCH_SCHEMA)
    return table.filter(pc.greater(pc.list_value_length(table.column("shingles")), 0))


def flat_lists(column: pa.ChunkedArray) -> tuple[np.ndarray[Any, Any], Places]:
    """All values of a column of lists, and where each row's begin: ``[values]``, ``[rows + 1]``."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    return lists.flatten().to_numpy(), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)


def signatures(shingles: np.ndarray[Any, Any], starts: Places, count: int) -> np.ndarray[Any, Any]:
    """The smallest value of each row's set under `count` permutations of 32 bits: ``[count, rows]``.

    Args:
        shingles: all sets, row after row.
        starts: where each row's begin, ``[rows + 1]``; no set is empty.
        count: permutations.
    """
    numbers = stream(WORDS, 2 * count).astype(np.uint32)
    found = np.empty((count, len(starts) - 1), np.uint32)
    for number in range(count):
        # Exclusive or, then an odd factor: a bijection whose high bits, which decide the smallest, depend on all.
        values = (shingles ^ numbers[2 * number]) * (numbers[2 * number + 1] | np.uint32(1))
        found[number] = np.minimum.reduceat(values, starts[:-1])
    return found


def with_bands(sketches: pa.Table, threshold: float) -> Iterator[pa.Table]:
    """The sketches with a column `bands`: a hash for each band of their signatures."""
    bands, values = bands_for(threshold)
    yield sketches.slice(0, 0).append_column("bands", pa.array([], pa.list_(pa.int64())))
    for at in range(0, sketches.num_rows, _CHUNK):
        part = sketches.slice(at, _CHUNK)
        shingles, starts = flat_lists(part.column("shingles"))
        parts = signatures(shingles, starts, bands * values).reshape(bands, values, -1).astype(np.uint64)
        keys = mixed(np.repeat(np.arange(bands, dtype=np.uint64)[:, None], part.num_rows, axis=1))
        for place in range(values):
            keys = mixed(keys ^ parts[:, place])
        offsets = np.arange(0, bands * part.num_rows + 1, bands, dtype=np.int32)
        flat = pa.array(np.ascontiguousarray(keys.T).ravel().view(np.int64))
        yield part.append_column("bands", pa.ListArray.from_arrays(pa.array(offsets), flat))


def band_keys(sketches: pa.Table) -> pa.Table:
    """For each sketch and band a row: the band's `key`, that of the `next` band, and the sketch's `id`."""
    flat, _ = flat_lists(sketches.column("bands"))
    keys = flat.reshape(sketches.num_rows, len(flat) // max(sketches.num_rows, 1))
    ids = np.repeat(sketches.column("id").to_numpy(), keys.shape[1])
    return pa.table({"key": keys.ravel(), "next": np.roll(keys, -1, axis=1).ravel(), "id": ids})


def candidate_pairs(keys: pa.Table) -> pa.Table:
    """Pairs of rows that met in a bucket, each once, as two rows: `id`, the `other`, and the other way round.

    A row is paired with the smallest of its bucket and the next 15 in the order of their next band, so a bucket of
    any size costs 16 pairs a row, rows alike in two bands still meet, and up to 16 rows all do. All rows of a key
    must be in the table.
    """
    key, following, ids = (keys.column(name).to_numpy() for name in ("key", "next", "id"))
    order = np.argsort(key)
    alone = np.ones(len(key) + 1, bool)  # most keys are: they need no second sort
    alone[1:-1] = key[order][1:] != key[order][:-1]
    met = order[~(alone[1:] & alone[:-1])]
    key, following, ids = key[met], following[met], ids[met]
    order = np.lexsort((ids, following, key))
    key, ids = key[order], ids[order]
    pairs = [np.empty((0, 2), np.int64)]
    if len(key):
        first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1])))
        smallest = np.repeat(np.minimum.reduceat(ids, first), np.diff(np.append(first, len(key))))
        pairs.append(np.stack((smallest, ids), 1))
    for lag in range(1, _NEIGHBOURS + 1):
        near = np.flatnonzero(key[lag:] == key[:-lag])
        if not len(near):
            break
        pairs.append(np.stack((ids[near], ids[near + lag]), 1))
    both = np.sort(np.concatenate(pairs), axis=1)
    both = distinct_pairs(both[both[:, 0] < both[:, 1]])
    return pa.table({"id": np.concatenate((both[:, 0], both[:, 1])), "other": np.concatenate((both[:, 1], both[:, 0]))})


def distinct_pairs(pairs: Places) -> Places:
    """The pairs in order, each once: ``[pairs, 2]``."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    fresh = np.ones(len(pairs), bool)
    fresh[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return np.asarray(pairs[fresh])


def pair_key(low: Places, high: Places) -> Hashes:
    """One hash for each pair of ids, to bring the two sides of a pair together."""
    return mixed(mixed(low.astype(np.uint64)) ^ high.astype(np.uint64))
