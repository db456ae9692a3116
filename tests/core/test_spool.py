"""Sequences on disk: they are what they were made of, in order, and hold little in memory."""

from __future__ import annotations

import math
import pickle
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from raytune_ft.core.spool import Places, Spool


def spooled(items: Any) -> Spool[Any]:
    return Spool(items, lambda item: {"is": item}, lambda row: row["is"])


def test_items_come_back_as_they_were() -> None:
    items = ["a", "zwei\nZeilen", "\ud800", None, 0.1, [1, {"x": "ü"}], "", -math.inf]
    spool = spooled(iter(items))
    assert list(spool) == items
    assert spool == items
    assert items == spool
    assert spool != items[:-1]
    assert spool != [*items[:-1], 0]
    assert spool[1:3] == tuple(items[1:3])
    assert spool[-1] == items[-1]
    assert spool[::-2] == tuple(items[::-2])
    with pytest.raises(IndexError):
        spool[len(items)]
    assert pickle.loads(pickle.dumps(spool)) == tuple(items)
    assert not spooled([])
    assert spooled([]) == ()


def test_items_may_be_read_in_any_order_while_others_are() -> None:
    spool = spooled(range(50))
    pairs = zip(spool, reversed(spool), strict=True)
    assert [one + other for one, other in pairs] == [49] * 50


def test_of_two_rows_in_one_place_the_later_counts() -> None:
    rows = [{"position": 3, "n": 1}, {"position": 0, "n": 2}, {"position": 3, "n": 3}]
    places = Places(iter(rows))
    assert dict(places) == {0: rows[1], 3: rows[2]}
    assert (len(places), 3 in places, 1 in places, -1 in places, 9 in places) == (2, True, False, False, False)
    with pytest.raises(KeyError):
        places[1]
    assert dict(Places([])) == {}


def test_memory_grows_by_a_few_bytes_an_item() -> None:
    def texts(count: int) -> Iterator[dict[str, Any]]:
        return ({"position": number, "text": "x" * 5000} for number in range(count))

    def peak(count: int) -> int:
        tracemalloc.start()  # it sees the process's other threads, too
        places = Places(texts(count))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(places) == count
        return most

    few, many = (min(peak(count) for _ in range(5)) for count in (500, 2500))
    assert many - few < 2000 * 100
