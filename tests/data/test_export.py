from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.records import Message, Record, records_to_table, table_to_records
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DatasetFormat
from raytune_ft.data.export import export_splits
from raytune_ft.data.formats import detect, to_record
from raytune_ft.data.readers import read_rows
from raytune_ft.data.sources import find_files

RECORDS = [
    Record(messages=(Message("user", 'é "x", y\n'), Message("assistant", "A")), metadata={"topic": "x"}, position=4),
    Record(
        messages=(Message("user", "Q"),), chosen=(Message("assistant", "A"),), rejected=(Message("assistant", "B"),)
    ),
    Record(messages=(Message("user", "Q"), Message("assistant", "", "[]")), label=False),
    Record(text="raw", reference="r"),
]


@pytest.fixture
def split() -> object:
    return datasets.Dataset(records_to_table(RECORDS))


@pytest.mark.parametrize("output_format", [DatasetFormat.JSONL, DatasetFormat.CSV, DatasetFormat.PARQUET])
def test_what_is_exported_reads_back_as_the_same_records(
    split: object, tmp_path: Path, output_format: DatasetFormat
) -> None:
    folder = export_splits({"train": split}, Location.at(tmp_path / "out"), output_format)
    (file,) = find_files([(folder / f"train.{output_format}").uri])
    again = [
        to_record(row.values or {}, detect(row.values or {})[0], source="", position=record.position)
        for row, record in zip(read_rows(file), RECORDS, strict=True)
    ]
    assert again == RECORDS


@pytest.mark.parametrize("output_format", [DatasetFormat.JSONL, DatasetFormat.HUGGINGFACE])
def test_datasets_loads_an_export_equal(split: object, tmp_path: Path, output_format: DatasetFormat) -> None:
    folder = Path(export_splits({"train": split}, Location.at(tmp_path / "out"), output_format).path)
    if output_format is DatasetFormat.HUGGINGFACE:
        again = datasets.load_from_disk(str(folder / "train"))
    else:
        again = datasets.Dataset.from_json(str(folder / "train.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert [Record.from_row(row) for row in again] == table_to_records(records_to_table(RECORDS))


def test_an_export_is_found_again_and_overwrites_nothing_else(split: object, tmp_path: Path) -> None:
    target = Location.at(tmp_path / "out")
    export_splits({"train": split}, target, DatasetFormat.JSONL)
    written = (tmp_path / "out/train.jsonl").stat().st_mtime_ns
    export_splits({"train": split}, target, DatasetFormat.JSONL)
    assert (tmp_path / "out/train.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ArtifactError, match="holds something else"):
        export_splits({"test": split}, target, DatasetFormat.JSONL)
    assert not (tmp_path / "out/test.jsonl").exists()
