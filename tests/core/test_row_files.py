from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.row_files import rows_of
from raytune_ft.core.storage import Location


def test_rows_of_json_lines_and_of_parquet_say_where_they_stand(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text('{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), table)
    assert list(rows_of(Location.at(lines))) == [({"a": 1}, f"{lines}:1"), ({"a": 2}, f"{lines}:3")]
    assert list(rows_of(Location.at(table))) == [
        ({"a": 1, "b": "x"}, f"{table}, row 1"),
        ({"a": 2, "b": "y"}, f"{table}, row 2"),
    ]
    assert [row for row, _ in rows_of(Location.at(table), lambda schema: schema.names[1:])] == [{"b": "x"}, {"b": "y"}]


def test_a_line_that_is_no_json_and_a_file_that_is_no_parquet_are_named(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text('{"a": 1}\n{"a": \n', encoding="utf-8")
    table.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"a\.jsonl:2: is not valid JSON"):
        list(rows_of(Location.at(lines)))
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet"):
        list(rows_of(Location.at(table)))
    with pytest.raises(ArtifactError, match="there is no such file"):
        list(rows_of(Location.at(tmp_path / "c.jsonl")))
