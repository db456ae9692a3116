from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.records import RECORD_SCHEMA, REJECTED_SCHEMA, Message, Record
from raytune_ft.data import shards
from raytune_ft.data.rows import ROW_SCHEMA, prompt_hash
from raytune_ft.data.shards import Layout, assign_files, assign_folders, count_folders, count_rows, write_files
from raytune_ft.data.split import Tally, find_cuts, tally_rows
from raytune_ft.data.weights import weigh_training_rows


def table_of(count: int) -> pa.Table:
    """`count` conversations, every fifth rejected."""
    rows = []
    for number in range(count):
        record = Record(messages=(Message("user", f"Q{number}"), Message("assistant", "A")), position=number)
        reason = "too long: 9 tokens" if number % 5 == 4 else None
        rows.append({**record.to_row(), "reason": reason, "group": prompt_hash(record), "file": 0, "is_test": False})
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
    zeros = pa.array([0] * count, pa.int64())
    return table.append_column("stratum", zeros).append_column("conflicting", zeros.cast(pa.bool_()))


def layout_of(table: pa.Table, *, shuffle: bool) -> Layout:
    tally = Tally()
    tally.add(tally_rows(table, 0).column("tally")[0].as_py())
    return Layout.plan(tally, find_cuts(tally.ranks, test_split=0.1, validation_split=0.1), seed=0, shuffle=shuffle)


def read(folder: Path, split: str) -> list[int]:
    return [
        p for file in sorted((folder / split).iterdir()) for p in pq.read_table(file).column("position").to_pylist()
    ]


def test_remarks_count_where_a_row_was_used(tmp_path: Path) -> None:
    notes = pa.array([json.dumps({"remarks": ["so"], "metadata": ["topic"]})] * 2, pa.string())
    rows = pa.table({"reason": ["late: by 2", None], "notes": notes})
    used, rejected = count_rows(rows, "train/0"), count_rows(rows.slice(0, 1), "rejected/0")
    assert (used["remarks"], used["metadata"]) == ({"so": 2}, {"topic": 2})
    assert "remarks" not in rejected
    assert (rejected["metadata"], rejected["reasons"]) == ({"topic": 1}, {"late": 1})


@pytest.mark.parametrize("shuffle", [True, False])
def test_files_are_the_same_however_the_rows_came_in(
    tmp_path: Path, shuffle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 8)
    table = table_of(50)
    layout = layout_of(table, shuffle=shuffle)
    backwards = table.take(list(range(49, -1, -1)))
    for name, rows in (("one", table), ("other", backwards)):
        write_files(assign_files(assign_folders(rows, layout), layout), str(tmp_path / name))
    one, other = (
        {p.relative_to(tmp_path / n).as_posix(): p.read_bytes() for p in (tmp_path / n).rglob("*.parquet")}
        for n in ("one", "other")
    )
    assert one == other
    assert sorted(one) == sorted(layout.paths)
    assert len(layout.paths) == 4 + 1 + 1 + 2  # 32, 4 and 4 usable rows and 10 rejected, in files of about 8
    train = read(tmp_path / "one", "train")
    assert len(train) == 32
    assert (train == sorted(train)) is not shuffle
    assert read(tmp_path / "one", "rejected") == list(range(4, 50, 5))


def test_columns_are_the_contracts_and_counts_are_of_what_was_written(tmp_path: Path) -> None:
    table = table_of(5)
    layout = layout_of(table, shuffle=True)
    counts = write_files(assign_files(assign_folders(table, layout), layout), str(tmp_path))
    assert pq.read_schema(tmp_path / "train/00000.parquet").equals(RECORD_SCHEMA)
    assert pq.read_schema(tmp_path / "rejected/00000.parquet").equals(REJECTED_SCHEMA)
    found = {count["folder"]: count for count in map(json.loads, counts.column("counts").to_pylist())}
    assert found["rejected"]["reasons"] == {"too long": 1}
    assert sum(count["rows"] for count in found.values()) == 5


def test_files_are_as_many_as_the_rows_need_after_weights_moved_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_FILE", 8)
    table = table_of(50)
    table = table.filter(pc.is_null(table.column("reason")))  # nothing is rejected before
    layout = layout_of(table, shuffle=True)
    rows = weigh_training_rows(assign_folders(table, layout), {0: 0.5}, seed=0)
    counts = [count_folders(part).column("counts")[0].as_py() for part in (rows.slice(0, 9), rows.slice(9))]
    layout = layout.counted(counts)
    folders = rows.column("folder").to_pylist()
    assert layout.rows == {name: folders.count(name) for name in ("train", "validation", "test", "rejected")}
    paths = set(assign_files(rows, layout).column("path").to_pylist())
    assert paths == set(layout.paths)
    assert sum(path.startswith("rejected/") for path in paths) == -(-folders.count("rejected") // 8) > 1
    assert json.loads(count_folders(table.slice(0, 0)).column("counts")[0].as_py()) == {}
