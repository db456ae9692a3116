"""The files of a dataset: which rows go into which, in which order, and writing one of them.

Names, content and bytes follow from the rows and settings alone, so a repeated run writes the same files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytune_ft.core.digest import short_hash
from raytune_ft.core.records import RECORD_SCHEMA, REJECTED_SCHEMA
from raytune_ft.core.storage import Location
from raytune_ft.data.rows import TOKEN_FIELDS, reason_name
from raytune_ft.data.split import Cuts, Tally, rank

ROWS_PER_FILE = 16_384


@dataclass(frozen=True)
class Layout:
    """How rows become files: the splits' cuts, the order, and how many files each folder gets."""

    cuts: Cuts
    seed: int
    shuffle: bool
    rows: Mapping[str, int]
    starts: Mapping[int, int]
    total: int

    @classmethod
    def plan(cls, tally: Tally, cuts: Cuts, *, seed: int, shuffle: bool) -> Layout:
        """The layout of rows that were counted in `tally`."""
        rows = {"train": 0, "validation": 0, "test": tally.given_test, "rejected": tally.rejected.total()}
        for stratum, counts in tally.ranks.items():
            for place, count in counts.items():
                rows[cuts.split_of(stratum, place)] += count
        starts, total = {}, 0
        for file, extent in sorted(tally.extents.items()):
            starts[file] = total
            total += extent
        return cls(cuts, seed, shuffle, rows, starts, total)

    def counted(self, counts: Iterable[str]) -> Layout:
        """The layout for other rows, by what `count_folders` said of their blocks."""
        rows = Counter(dict.fromkeys(self.rows, 0))
        for text in counts:
            rows.update(json.loads(text))
        return replace(self, rows=rows)

    def files(self, folder: str) -> int:
        """Number of files in a folder."""
        return -(-self.rows[folder] // ROWS_PER_FILE)

    @property
    def paths(self) -> list[str]:
        """The names of all files."""
        return [_name(folder, number) for folder in self.rows for number in range(self.files(folder))]


def _name(folder: str, number: int) -> str:
    return f"{folder}/{number:05d}.parquet"


def assign_folders(rows: pa.Table, layout: Layout) -> pa.Table:
    """The table with the column `folder`: the split of a row, or ``rejected``."""
    folders = []
    names = ("group", "stratum", "reason", "is_test")
    for group, stratum, reason, is_test in zip(*(rows.column(n).to_pylist() for n in names), strict=True):
        if reason is not None:
            folders.append("rejected")
        else:
            folders.append("test" if is_test else layout.cuts.split_of(stratum, rank(group, layout.seed)))
    return rows.append_column("folder", pa.array(folders, pa.string()))


def count_folders(rows: pa.Table) -> pa.Table:
    """Rows by folder of the table of `assign_folders`, as JSON in one row: the column `counts`."""
    counted = Counter(rows.column("folder").to_pylist()) if rows.num_rows else {}
    return pa.table({"counts": [json.dumps(counted)]})


def assign_files(rows: pa.Table, layout: Layout) -> pa.Table:
    """The table of `assign_folders` with `path` (the file of a row) and `order` (its place, as text that sorts)."""
    paths, orders = [], []
    names = ("id", "folder", "file", "position")
    copies = rows.column("copy").to_pylist() if "copy" in rows.column_names else [0] * rows.num_rows
    columns = (rows.column(n).to_pylist() for n in names)
    for row_id, folder, file, position, copy in zip(*columns, copies, strict=True):
        if layout.shuffle and folder != "rejected":
            order = short_hash(f"{layout.seed}:order:{row_id}" + (f":{copy}" if copy else ""))
            share = int(order, 16) / 2**64
        else:
            index = layout.starts[file] + position
            order, share = f"{index:016d}", index / layout.total
        paths.append(_name(folder, min(int(share * layout.files(folder)), layout.files(folder) - 1)))
        orders.append(order)
    return rows.append_column("path", pa.array(paths, pa.string())).append_column(
        "order", pa.array(orders, pa.string())
    )


def write_files(rows: pa.Table, where: str) -> pa.Table:
    """Writes every file that has rows in the table (each file's rows must all be here); one row of counts a file."""
    counts = []
    for path in sorted(set(rows.column("path").to_pylist())) if rows.num_rows else ():
        part = rows.filter(pc.equal(rows.column("path"), path))
        part = part.sort_by([("order", "ascending"), ("file", "ascending"), ("position", "ascending")])
        counts.append(write_file(part, Location(where), path))
    return pa.table({"counts": pa.array(counts, pa.string())})


def write_file(rows: pa.Table, where: Location, path: str) -> str:
    """Writes one Parquet file in one piece (the same rows give the same bytes); returns its counts as JSON text."""
    tokens = [field for field in TOKEN_FIELDS if field.name in rows.column_names]
    schema = REJECTED_SCHEMA if path.startswith("rejected/") else pa.schema([*RECORD_SCHEMA, *tokens])
    table = rows.select(schema.names).cast(schema).combine_chunks()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=2048)
    (where / path).write(sink.getvalue().to_pybytes())
    return json.dumps(count_rows(rows, path))


def count_rows(table: pa.Table, path: str) -> dict[str, object]:
    """What the account needs to know of the rows of one file."""
    folder = path.partition("/")[0]
    counts: dict[str, object] = {"folder": folder, "rows": table.num_rows}
    if "format" in table.column_names:
        counts["formats"] = Counter(table.column("format").drop_null().to_pylist())
    if "made" in table.column_names:
        counts["made"] = Counter(table.column("made").drop_null().to_pylist())
    if "notes" in table.column_names:
        counts.update(count_notes(table.column("notes")))
    if folder == "rejected":
        counts["reasons"] = Counter(map(reason_name, table.column("reason").to_pylist()))
        counts.pop("remarks", None)  # they are of rows that were used
    elif "input_ids" in table.column_names:
        counts["chat"] = table.column("chat")[0].as_py()
        lengths = pc.list_value_length(table.column("input_ids"))
        counts["tokens"] = pc.sum(lengths).as_py() or 0
        sides = [name for name in ("input_ids", "rejected_input_ids") if name in table.column_names]
        counts["longest"] = max(pc.max(pc.list_value_length(table.column(name))).as_py() or 0 for name in sides)
        flat = pc.list_flatten(table.column("supervised"))
        counts["supervised"] = pc.sum(flat).as_py() or 0
    return counts


def count_notes(notes: pa.ChunkedArray) -> dict[str, Counter[str]]:
    """Rows by what cleaning changed in them, replacements of personal data, and rows by what could not be told,
    is remarked of them, or was kept as metadata alone."""
    kinds = ("changed", "redacted", "undecided", "remarks", "unmade", "metadata")
    found: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for entry in pc.value_counts(notes.drop_null()).to_pylist():
        said = json.loads(entry["values"])
        for name, count in said.get("redacted", {}).items():
            found["redacted"][name] += count * entry["counts"]
            found["changed"][f"redact {name}"] += entry["counts"]
        for kind in ("changed", "undecided", "remarks", "unmade", "metadata"):
            for name in said.get(kind, ()):
                found[kind][name] += entry["counts"]
    return {kind: counter for kind, counter in found.items() if counter}
