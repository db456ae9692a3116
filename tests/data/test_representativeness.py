from __future__ import annotations

import math
from collections import Counter

import pyarrow as pa
import pytest
from scipy.spatial import distance

from raytune_ft.data.representativeness import added_counts, count_fields, distances, jensen_shannon

from .planted import settled


def test_the_distance_is_none_for_the_same_shares_and_one_for_nothing_in_common() -> None:
    assert jensen_shannon({"a": 1, "b": 3}, {"a": 10, "b": 30}) == pytest.approx(0)
    assert jensen_shannon({"a": 1}, {"b": 30}) == pytest.approx(1)


def test_the_distance_is_as_worked_out_by_hand() -> None:
    """(1, 0) and (1/2, 1/2), middle (3/4, 1/4): (log2(4/3) + log2(2/3) / 2 + log2(2) / 2) / 2 = 0.3113 bits."""
    assert jensen_shannon({"a": 5}, {"a": 2, "b": 2}) == pytest.approx(math.sqrt(0.311278), abs=1e-6)


def test_the_distance_is_scipys() -> None:
    one, other = {"a": 7, "b": 1, "c": 4}, {"b": 9, "c": 2, "d": 5}
    assert jensen_shannon(one, other) == pytest.approx(distance.jensenshannon([7, 1, 4, 0], [0, 9, 2, 5], base=2))


def rows(folders: list[str]) -> pa.Table:
    count = len(folders)
    columns = {"source": ["a", "b"] * (count // 2), "label": [True] * (count // 2) + [None] * (count // 2)}
    columns["metadata"] = [f'{{"topic": "{n % 3}"}}' for n in range(count)]
    columns["reason"] = [None] * (count - 1) + ["too long"]
    table = settled([f"text number {n}" for n in range(count)], **columns).sort_by("position")
    return table.append_column("folder", pa.array(folders))


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    table = rows(["train", "train", "test", "train", "test", "train", "train", "rejected"])
    whole = added_counts(count_fields(table, "topic").column("text").to_pylist())
    parts = [count_fields(table.slice(at, 3), "topic").column("text")[0].as_py() for at in (0, 3, 6)]
    assert added_counts(parts) == whole
    assert whole["train"]["source"] == Counter({"a": 2, "b": 3})
    assert whole["train"]["label"] == Counter({"True": 3})
    assert whole["test"]["topic"] == Counter({"2": 1, "1": 1})
    assert "rejected" not in whole


def test_a_given_test_is_no_part_of_the_whole() -> None:
    counts = {"train": {"topic": {"a": 3, "b": 1}}, "test": {"topic": {"c": 4}}}
    assert distances(counts, given_test=True) == {"train": {"topic": 0.0}, "test": {"topic": pytest.approx(1)}}


def test_each_split_is_measured_against_all_of_them() -> None:
    counts = {"train": {"source": {"a": 6, "b": 2}, "label": {"True": 8}}, "test": {"source": {"a": 2}}}
    found = distances(counts)
    assert found["test"] == {"source": pytest.approx(jensen_shannon({"a": 2}, {"a": 8, "b": 2}))}
    assert found["train"] == {"source": pytest.approx(jensen_shannon({"a": 6, "b": 2}, {"a": 8, "b": 2}))}
