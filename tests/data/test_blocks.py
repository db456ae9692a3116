from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.data.blocks import LocalBlocks, key_range, packed, reaches, unpacked, within

from .planted import parts_of


def rows(count: int) -> pa.Table:
    keys = np.random.default_rng(0).integers(-5, 5, count)
    return pa.table({"key": keys, "value": [[n, n + 1] for n in range(count)], "text": [f"t{n}" for n in range(count)]})


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_all_rows_of_a_key_come_into_one_part(parts: int) -> None:
    table = rows(60)
    shuffled = LocalBlocks(parts_of(table, parts)).by_key("key")
    keys = [set(part.column("key").to_pylist()) for part in shuffled.parts]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 10
    assert shuffled.table().sort_by("text").equals(table.sort_by("text"))
    assert len(shuffled.parts) == parts


def test_no_rows_come_into_parts_too() -> None:
    assert LocalBlocks([rows(0), rows(0)]).by_key("key").rows() == 0


def test_buckets_hold_whole_keys_and_give_back_every_row() -> None:
    parts = [packed(part, "key", 4) for part in parts_of(rows(60), 3)]
    travelled = pa.concat_tables(parts).sort_by("bucket")
    assert all(part.num_rows <= 4 for part in parts)
    buckets = [
        unpacked(travelled.filter(pa.array(travelled["bucket"].to_numpy() == bucket)))
        for bucket in set(travelled["bucket"].to_pylist())
    ]
    keys = [set(bucket["key"].to_pylist()) for bucket in buckets]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 10
    assert len(keys) > 1
    assert pa.concat_tables(buckets).sort_by("text").equals(rows(60).sort_by("text"))


def test_labels_are_fetched_by_ranges_of_their_key() -> None:
    table = pa.table({"key": [3, 9, 5, 3]})
    assert key_range(table, "key") == (3, 9)
    assert key_range(table.slice(0, 0), "key") is None
    assert [reaches((3, 9), low, high) for low, high in ((0, 2), (0, 3), (9, 9), (10, 12))] == [
        False,
        True,
        True,
        False,
    ]
    assert not reaches(None, 0, 9)
    assert within(table, "key", 3, 5).column("key").to_pylist() == [3, 5, 3]
