from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.records import Message, Record, records_to_table, table_to_records
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DatasetFormat
from raytune_ft.data.export import export_splits
from raytune_ft.data.formats import detect, to_record
from raytune_ft.data.readers import read_rows
from raytune_ft.data.sources import find_files
from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for

HARD = 'line\nline\r\ntab\t"quotes", comma; 🎉 漢字 é null None \\ \u2028 <b>'
RECORDS = [
    Record(
        messages=(Message("system", HARD), Message("user", HARD), Message("assistant", f" {HARD}\n")),
        metadata={"nested": {"list": [1, 2.5, None, True]}, "text": HARD, "empty": "", "🎉": "key"},
        reference=HARD,
        tools='[{"name": "f"}]',
    ),
    Record(messages=(Message("user", "5"), Message("assistant", "1e3")), reference="007", label=True),
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


@pytest.mark.parametrize("output_format", list(DatasetFormat))
def test_columns_of_an_export_are_equal_with_tokens_and_nulls(
    tiny_model: Path, tmp_path: Path, output_format: DatasetFormat
) -> None:
    usable = [record for record in RECORDS if not record.tools and not any(m.tool_calls for m in record.messages)]
    rows = records_to_table(usable).append_column("reason", pa.nulls(len(usable), pa.string()))
    rows = add_tokens(rows, chat_for(str(tiny_model)), TokenPolicy(500)).drop_columns(["reason", "chat"])
    exported = datasets.Dataset(rows)
    folder = Path(export_splits({"train": exported}, Location.at(tmp_path / "out"), output_format).path)
    cache = str(tmp_path / "cache")
    if output_format is DatasetFormat.HUGGINGFACE:
        again = datasets.load_from_disk(str(folder / "train"))
    elif output_format is DatasetFormat.PARQUET:
        again = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=cache)
    elif output_format is DatasetFormat.JSONL:
        again = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1]]
    else:
        again = list(_csv_rows(folder / "train.csv", exported.column_names))
    assert exported["rejected_input_ids"][-1] is None
    assert exported["rejected_input_ids"][2] is not None
    assert [dict(row) for row in again] == [dict(row) for row in exported]


def _csv_rows(path: Path, columns: list[str]) -> Iterator[dict[str, object]]:
    """As the format says: cells that are no text hold JSON, and an empty cell is null."""
    plain = {"id", "text", "reference", "tools", "source", "metadata"}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            assert list(row) == columns
            yield {
                key: (cell or None if key != "source" else cell) if key in plain else json.loads(cell or "null")
                for key, cell in row.items()
            }


def test_an_export_is_found_again_and_overwrites_nothing_else(split: object, tmp_path: Path) -> None:
    target = Location.at(tmp_path / "out")
    export_splits({"train": split}, target, DatasetFormat.JSONL)
    written = (tmp_path / "out/train.jsonl").stat().st_mtime_ns
    export_splits({"train": split}, target, DatasetFormat.JSONL)
    assert (tmp_path / "out/train.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ArtifactError, match="holds something else"):
        export_splits({"test": split}, target, DatasetFormat.JSONL)
    assert not (tmp_path / "out/test.jsonl").exists()
