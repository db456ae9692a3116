from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data.sources import SourceFile, find_files
from raytune_ft.data.weights import apply_weights, copies, file_weights, weigh_training_rows

IDS = [f"{number:016x}" for number in range(4000)]


def test_half_a_weight_keeps_half_the_rows_and_whole_ones_all() -> None:
    assert {copies(row_id, 1.0, 0) for row_id in IDS} == {1}
    assert {copies(row_id, 0.0, 0) for row_id in IDS} == {0}
    assert {copies(row_id, 3.0, 0) for row_id in IDS} == {3}
    # 4,000 draws at 0.5: a standard deviation of 32, so five of them are 160.
    assert abs(sum(copies(row_id, 0.5, 0) for row_id in IDS) - 2000) < 160
    several = Counter(copies(row_id, 2.5, 0) for row_id in IDS)
    assert set(several) == {2, 3}
    assert abs(several[3] - 2000) < 160


def test_a_higher_weight_keeps_what_a_lower_keeps_and_a_seed_chooses_others() -> None:
    low, high, other = ({i for i in IDS if copies(i, weight, seed)} for weight, seed in ((0.3, 0), (0.6, 0), (0.3, 1)))
    assert low < high
    assert low != other


def test_files_get_the_weight_of_their_file_folder_or_glob(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "a/y.jsonl", "b.jsonl", "c.jsonl", "t.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    sources = [str(tmp_path / name) for name in ("a", "b.jsonl", "c.jsonl")]
    files = find_files(sources, [str(tmp_path / "t.jsonl")])
    weights = {str(tmp_path / "a"): 0.5, str(tmp_path / "b.*"): 2.0}
    assert file_weights(files, weights) == {1: 0.5, 2: 0.5, 3: 2.0}
    assert file_weights(files, {}) == {}
    for wrong, message in [
        ({str(tmp_path / "t.jsonl"): 2.0}, "t.jsonl is none of the sources"),
        ({str(tmp_path / "a/x"): 2.0}, "is none of the sources"),
        ({str(tmp_path / "a"): 0.5, str(tmp_path / "*/x.jsonl"): 2.0}, "both give a weight to one file"),
    ]:
        with pytest.raises(DataError, match=message):
            file_weights(files, wrong)


def test_uris_and_datasets_of_the_hub_have_weights_too() -> None:
    uris = ["s3://b/d/x.jsonl?region=r", "hf:o/n:c@train#0-of-2", "hf:o/n:c@train#1-of-2", "hf:o/n2@train#0-of-1"]
    files = [SourceFile(uri, uri, "jsonl", number, False) for number, uri in enumerate(uris)]
    assert file_weights(files, {"s3://b/d?region=r": 2.0, "hf:o/n:c": 0.5}) == {0: 2.0, 1: 0.5, 2: 0.5}


def table(count: int) -> pa.Table:
    return pa.table(
        {
            "id": IDS[:count],
            "file": [number % 2 for number in range(count)],
            "reason": pa.array(["empty answer", *[None] * (count - 1)], pa.string()),
            "is_test": [False, False, True, *[False] * (count - 3)],
        }
    )


def test_rows_go_out_as_often_as_their_weight_says_and_none_vanishes() -> None:
    rows = apply_weights(table(400), {0: 2.5}, seed=3).to_pylist()
    for place, row_id in enumerate(IDS[:400]):
        mine = [row for row in rows if row["id"] == row_id]
        expected = copies(row_id, 2.5, 3) if place % 2 == 0 and place not in {0, 2} else 1
        assert [row["copy"] for row in mine] == list(range(expected))
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)


def test_rows_that_are_left_out_say_why_and_others_keep_their_reason() -> None:
    rows = apply_weights(table(400), {0: 0.25}, seed=3).to_pylist()
    assert len(rows) == 400
    assert rows[0]["reason"] == "empty answer"
    left_out = [row for row in rows[1:] if row["reason"]]
    assert {row["reason"] for row in left_out} == {"source weight: 0.25 leaves it out"}
    assert [row["id"] for row in left_out] == [
        i for place, i in enumerate(IDS[:400]) if place % 2 == 0 and place not in {0, 2} and not copies(i, 0.25, 3)
    ]
    assert apply_weights(table(3).slice(0, 0), {0: 2.0}, seed=0).num_rows == 0


def test_weights_touch_the_training_split_alone_and_copies_say_what_made_them() -> None:
    folders = ["train", "validation", "rejected", "train"]
    rows = pa.table(
        {
            "id": ["a", "b", "c", "d"],
            "file": [0, 0, 0, 1],
            "reason": pa.array([None, None, "empty answer", None], pa.string()),
            "is_test": [False] * 4,
            "folder": folders,
            "format": ["alpaca"] * 4,
        }
    )
    out = weigh_training_rows(rows, {0: 3.0, 1: 0.0}, seed=0).to_pylist()
    told = sorted((row["id"], row["copy"], row["folder"], row["made"], row["format"]) for row in out)
    assert told == [
        ("a", 0, "train", None, "alpaca"),
        ("a", 1, "train", "source weight", None),
        ("a", 2, "train", "source weight", None),
        ("b", 0, "validation", None, "alpaca"),
        ("c", 0, "rejected", None, "alpaca"),
        ("d", 0, "rejected", None, "alpaca"),
    ]
