from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raytune_ft.data.minhash import (
    band_keys,
    bands_for,
    candidate_pairs,
    place_ids,
    place_of,
    signatures,
    sketch_rows,
    with_bands,
)

from .planted import settled


def sketched(table: pa.Table) -> pa.Table:
    return sketch_rows(table, table.column("node").to_numpy())


@pytest.mark.parametrize(("threshold", "bands"), [(0.5, (42, 3)), (0.7, (25, 5)), (0.9, (12, 10)), (1.0, (1, 128))])
def test_bands_find_pairs_at_the_threshold_with_the_promised_chance(threshold: float, bands: tuple[int, int]) -> None:
    # 1 - (1 - 0.7^5)^25 = 0.990, while six values a band would give 1 - (1 - 0.7^6)^21 = 0.928.
    assert bands_for(threshold) == bands
    assert 1 - (1 - threshold ** bands[1]) ** bands[0] >= 0.985


def test_signatures_agree_as_often_as_sets_are_alike() -> None:
    """Two sets of 100 with 60 in common have a similarity of 60 / 140; 4,096 permutations tell it to 3 x 0.0077."""
    values = np.arange(1, 141, dtype=np.uint32) * np.uint32(2654435761)
    sets = np.concatenate((values[:100], values[40:]))
    found = signatures(sets, np.array([0, 100, 200]), 4096)
    assert found.shape == (4096, 2)
    assert abs((found[:, 0] == found[:, 1]).mean() - 60 / 140) < 0.024


def test_ids_sort_as_file_and_position_do() -> None:
    table = pa.table({"file": [0, 1, 0, 70000], "position": [5, 0, (1 << 40) - 1, 3]})
    ids = place_ids(table)
    assert [place_of(row_id) for row_id in ids.tolist()] == [(0, 5), (1, 0), (0, (1 << 40) - 1), (70000, 3)]
    assert np.argsort(ids).tolist() == [0, 2, 1, 3]


def test_rejected_rows_and_rows_without_text_are_not_sketched() -> None:
    table = settled(["one two", "", "three four"], reason=[None, None, "too long"])
    assert sketched(table).column("id").to_pylist() == [0]


def test_opposite_labels_have_no_shingle_in_common() -> None:
    text = "what a fine day it is in the park"
    sketches = sketched(settled([text, text, text, text], label=[True, False, None, True]))
    sets = {row["id"]: set(row["shingles"]) for row in sketches.to_pylist()}
    assert sets[0] == sets[3]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_an_answer_chosen_and_the_same_rejected_have_no_shingle_in_common() -> None:
    """A prompt of 6 words has 2 shingles, each answer of 5 words one: swapped pairs share those of the prompt alone."""
    one, other = (f"{word} in the old park" for word in ("walk", "sleep"))
    sides = [[{"role": "assistant", "content": text, "tool_calls": None}] for text in (one, other)]
    table = settled(["what shall we do now then", "what shall we do now then"], chosen=sides, rejected=sides[::-1])
    first, second = (set(row["shingles"]) for row in sketched(table).to_pylist())
    assert (len(first), len(second), len(first & second)) == (4, 4, 2)


def test_rows_of_one_set_share_every_band_and_other_rows_none() -> None:
    sketches = sketched(settled(["one two three four five six", "One  two three four five six", "seven eight nine"]))
    keys = band_keys(pa.concat_tables(with_bands(sketches, 0.7)))
    assert keys.num_rows == 3 * 25
    of_row = {
        number: set(keys.filter(pa.array(keys["id"].to_numpy() == number))["key"].to_pylist()) for number in range(3)
    }
    assert of_row[0] == of_row[1]
    assert len(of_row[0]) == 25
    assert not of_row[0] & of_row[2]


def test_up_to_sixteen_rows_of_a_bucket_are_all_paired() -> None:
    ids = list(range(100, 116))
    pairs = candidate_pairs(pa.table({"key": [7] * 16 + [8], "next": [0] * 17, "id": [*ids, 900]}))
    found = {(row["id"], row["other"]) for row in pairs.to_pylist()}
    assert found == {(one, other) for one in ids for other in ids if one != other}
    assert pairs.num_rows == 16 * 15


def test_a_giant_bucket_costs_sixteen_pairs_a_row_and_leaves_nobody_out() -> None:
    count = 5000
    following = np.arange(count) % 500  # ten rows of each next band, far apart by id
    pairs = candidate_pairs(pa.table({"key": np.zeros(count, np.int64), "next": following, "id": np.arange(count)}))
    assert pairs.num_rows <= 2 * 16 * count
    found = {(row["id"], row["other"]) for row in pairs.to_pylist()}
    assert all((0, row) in found for row in range(1, count))
    assert all((row, row + 500) in found for row in range(count - 500))
