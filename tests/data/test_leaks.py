from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytune_ft.core.errors import DataError, RunError
from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.leaks import (
    audit,
    benchmark_grams,
    mark_benchmarks,
    overlapping,
    refuse_overlaps,
    refuse_straddles,
    sorted_grams,
)
from raytune_ft.data.sources import find_files

from .planted import parts_of, settled

QUESTION = "A farmer has 17 sheep, and all but nine of them run away; how many are left?"
LONGER = f"Please think: {QUESTION.upper()} Answer!"
WORDS = "'a farmer has 17 sheep and all but nine of them run away'"


@pytest.fixture
def grams(tmp_path: Path) -> tuple[pa.Table, list[str]]:
    """What is known of a benchmark with columns of its own, a short text and a malformed line."""
    rows = [{"id": 1, "choices": ["only a few words"]}, {"id": 2, "stem": {"text": QUESTION}}]
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stem": "cut short\n')
    files = find_files([str(tmp_path / "bench.jsonl")])
    tables = benchmark_grams(pa.Table.from_pylist([asdict(file) for file in files]))
    return sorted_grams(pa.concat_tables(tables)), [file.label for file in files]


def marked(texts: list[str], grams: tuple[pa.Table, list[str]], **columns: list[object]) -> list[str | None]:
    table = mark_benchmarks(settled(texts, **columns).sort_by("position"), *grams)
    return list(table.column("reason").to_pylist())


def test_thirteen_words_of_a_benchmark_are_found_whatever_their_case_and_punctuation(
    grams: tuple[pa.Table, list[str]],
) -> None:
    assert grams[0].num_rows == 5  # 17 words
    twelve = " ".join(QUESTION.split()[:12])
    found = marked([LONGER, twelve, "only a few words", QUESTION], grams)
    assert found[:3] == [f"benchmark overlap: {WORDS} also stands in bench.jsonl:1", None, None]
    assert found[3] == found[0]


def test_test_rows_and_rejected_rows_are_left_alone(grams: tuple[pa.Table, list[str]]) -> None:
    found = marked([QUESTION, LONGER], grams, is_test=[True, False], reason=[None, "empty answer"])
    assert found == [None, "empty answer"]


def test_an_overlap_stops_the_run_with_count_and_examples(grams: tuple[pa.Table, list[str]]) -> None:
    table = mark_benchmarks(settled([LONGER, "clean"] + [f"{QUESTION} {n}" for n in range(4)]), *grams)
    found = [row for part in parts_of(table, 3) for row in overlapping(part).to_pylist()]
    with pytest.raises(DataError, match=r"^5 rows share 13 words.*a:\d \('a farmer has.* also stands in bench"):
        refuse_overlaps(found)
    refuse_overlaps(overlapping(settled(["clean"])).to_pylist())


CONFIG = DataCollectionConfig(sources=("a",), output_path="out", stratify_by=None)


def audited(table: pa.Table, folders: list[str], parts: int) -> list[dict[str, object]]:
    table = table.sort_by("position").append_column("folder", pa.array(folders))
    rows = audit(LocalBlocks(parts_of(table, parts)), CONFIG).table().to_pylist()
    return [row for row in rows if row["kind"] != "fields"]


@pytest.mark.parametrize("parts", [1, 4])
def test_splits_that_share_nothing_pass(parts: int) -> None:
    table = settled(["a", "b", "c", "d", "a"], reason=[None] * 4 + ["duplicate: of a:0"])
    table = table.append_column("cluster", pa.array([-1] * 5))
    found = audited(table, ["train", "test", "validation", "train", "rejected"], parts)
    assert found == []
    refuse_straddles(found, ["a"])


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize(
    ("columns", "cluster", "kind"),
    [
        ({"id": ["i", "j", "i", "k"]}, [-1, -1, -1, -1], "content"),
        ({"group": [f"{n:016x}" for n in (1, 2, 1, 3)]}, [-1, -1, -1, -1], "prompt"),
        ({"question": [4, 5, 4, None]}, [-1, -1, -1, -1], "question"),
        ({}, [0, -1, 0, -1], "near-duplicates"),
        ({"metadata": ['{"conversation_id": 5}', "{}"] * 2}, [-1, -1, -1, -1], "conversation"),
    ],
)
def test_what_stands_in_two_splits_is_found(
    columns: dict[str, list[Any]], cluster: list[int], kind: str, parts: int
) -> None:
    columns, question = dict(columns), columns.get("question")
    columns.pop("question", None)
    table = settled(["a", "b", "c", "d"], **columns).sort_by("position").append_column("cluster", pa.array(cluster))
    if question is not None:
        table = table.append_column("question", pa.array(question, pa.int64()))
    assert audited(table, ["train", "train", "train", "test"], parts) == []
    found = audited(table, ["train", "train", "test", "test"], parts)
    assert next((row["kind"], row["count"]) for row in found if row["count"]) == (kind, 1)
    with pytest.raises(RunError, match=f"1 of {kind}.*f.txt:0 in train and f.txt:2 in test share their {kind}"):
        refuse_straddles(found, ["f.txt"])
