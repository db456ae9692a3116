from __future__ import annotations

import json
import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from raytune_ft.data.findings import label_numbers
from raytune_ft.data.shingles import stream
from raytune_ft.data.sketches import DistinctCount, Histogram, ValueCount, evenness


@pytest.mark.parametrize("count", [1, 100, 5_000, 60_000, 1_000_000])
def test_distinct_hashes_are_counted_within_three_percent(count: int) -> None:
    hashes = stream(7, count)
    sketch = DistinctCount()
    sketch.add(hashes)
    sketch.add(hashes[: count // 2])  # seen before
    assert abs(sketch.estimate / count - 1) < 0.03


def test_the_sum_of_distinct_counts_is_the_count_of_all() -> None:
    hashes = stream(3, 20_000)
    whole, left, right = DistinctCount(), DistinctCount(), DistinctCount()
    whole.add(hashes)
    left.add(hashes[:12_000])
    right.add(hashes[8_000:])
    left.update(DistinctCount.from_text(right.to_text()))
    assert left.estimate == whole.estimate


def test_a_register_holds_the_first_one_bit_behind_its_number() -> None:
    sketch = DistinctCount()
    # Register 5; behind its 14 bits come 3 zeros, then a one: rank 4. Register 6: 40 zeros: rank 41.
    sketch.add(np.array([(5 << 50) | (1 << 46), (6 << 50) | (1 << 9)], np.uint64))
    assert (sketch.registers[5], sketch.registers[6], int(sketch.registers.astype(int).sum())) == (4, 41, 45)


def test_values_are_counted_exactly_and_beyond_the_limit_the_same_ones_in_any_order() -> None:
    few = ValueCount(3)
    few.add(["a", "b", "a", None])
    assert (few.counts, few.total, few.complete) == (Counter(a=2, b=1), 3, True)
    values = [f"v{number % 50}" for number in range(200)]
    whole, parts = ValueCount(10), ValueCount(10)
    whole.add(values)
    for start in range(0, 200, 7):
        part = ValueCount(10)
        part.add(reversed(values[start : start + 7]))
        parts.update(ValueCount.from_json(part.to_json()))
    assert whole.counts == parts.counts
    assert set(whole.counts.values()) == {4}
    assert (parts.total, len(parts), parts.complete) == (200, 10, False)


def test_evenness_is_entropy_over_the_highest() -> None:
    assert evenness([5, 5]) == pytest.approx(1)
    assert evenness([3, 1]) == pytest.approx(-(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)))  # 0.811 of 1 bit
    assert evenness([4]) is None
    assert evenness([4, 0]) is None
    assert len({evenness(order) for order in permutations([2, 1, 33, 4, 7])}) == 1  # also to the last bit


def test_the_values_of_a_label_come_in_one_order_whichever_was_seen_first() -> None:
    orders = []
    for values in (["b", "a", "c", "c"], ["a", "c", "b", "c"]):
        counts = ValueCount()
        counts.add(values)
        orders.append(json.dumps(label_numbers(counts)))
    assert orders[0] == orders[1]


def test_median_and_deviation_come_from_the_bins() -> None:
    histogram = Histogram(0.5, 20)
    histogram.add(np.array([0.1, 0.6, 1.2, 1.3, 5.0, 99.0]))
    # Bins 0, 1, 2, 2, 10, 19: the third of six lies in bin 2, distances 2, 1, 0, 0, 8, 17: the third is 1 bin.
    assert histogram.median() == 1.25
    assert histogram.deviation() == 0.5
