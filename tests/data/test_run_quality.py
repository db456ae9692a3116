from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data import run
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.run import prepare

pytestmark = pytest.mark.ray

GOOD, BAD = ["lovely", "great", "superb", "charming", "pleasant"], ["awful", "boring", "dull", "weak", "poor"]
WRONG = 31


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    rows = []
    for number in range(120):
        words = GOOD if number % 2 else BAD
        said = ", ".join(words[place] for place in (number % 5, (number * 7 + 1) % 5, number % 3))
        asked = f"Describe the film number {number}: {said}."
        rows.append({"instruction": asked, "output": "good" if number % 2 and number != WRONG else "bad"})
    (tmp_path / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"sources": [str(tmp_path / "reviews.jsonl")], "near_duplicates": "keep", "shuffle": True}


def test_suspects_are_flagged_exported_corrected_and_merged_back(
    settings: dict[str, Any], tmp_path: Path, ray_cluster: object
) -> None:
    first = prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "first"))).local()
    (line,) = [json.loads(text) for text in (first / "suspects.jsonl").read_text().splitlines()]
    assert (line["answer"], line["corrected"]) == ("bad", "")
    flagged = [
        row for split in ("train", "validation", "test") for row in _rows(first, split) if "suspect" in row["metadata"]
    ]
    assert [row["id"] for row in flagged] == [line["id"]]
    (tmp_path / "mine.jsonl").write_text(json.dumps({**line, "corrected": "good"}))
    corrections = {"corrections": str(tmp_path / "mine.jsonl")}
    second = prepare(DataCollectionConfig(**settings, **corrections, output_path=str(tmp_path / "second")))
    assert second.numbers["changed"] == {"correction": 1}
    assert "suspects.jsonl" not in second.manifest.files
    (tmp_path / "mine.jsonl").write_text(json.dumps({**line, "id": "0" * 16, "corrected": "good"}))
    with pytest.raises(DataError, match="1 of 1 row is in no source: 0000000000000000"):
        prepare(DataCollectionConfig(**settings, **corrections, output_path=str(tmp_path / "third")))


def test_variants_are_of_the_training_split_bounded_and_the_same_in_any_blocks(
    settings: dict[str, Any], tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["augmentation"] = {"ratio": 0.5, "kinds": ["wording", "characters"]}
    whole = prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "whole")))
    numbers = whole.numbers
    assert 30 <= numbers["rows_made"] <= 0.5 * (numbers["rows_train"] - numbers["rows_made"])
    assert numbers["rows_in"] + numbers["rows_made"] == numbers["rows_out"] + numbers["rows_rejected"]
    tags = {
        split: sum("augmented_from" in row["metadata"] for row in _rows(whole.local(), split))
        for split in ("train", "test")
    }
    assert tags == {"train": numbers["rows_made"], "test": 0}
    monkeypatch.setattr(run, "_FEW_ROWS", 0)
    parts = prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "parts")))
    assert parts.manifest.files == whole.manifest.files


def test_a_missed_threshold_leaves_an_unfinished_folder_with_the_report(
    settings: dict[str, Any], tmp_path: Path, ray_cluster: object
) -> None:
    settings["quality"] = {"min_rows": 500}
    with pytest.raises(DataError, match=r"min_rows: training rows is .*, wanted at least 500"):
        prepare(DataCollectionConfig(**settings, output_path=str(tmp_path / "out")))
    assert (tmp_path / "out/quality.html").exists()
    assert not (tmp_path / "out/manifest.json").exists()


def _rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [row for file in sorted((folder / split).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
