"""Stages of `prepare`: rows are read and cleaned one by one, then settled group by group; and tokenizing anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import RECORD_SCHEMA
from raytune_ft.core.storage import Location
from raytune_ft.data.cleaning import clean
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.dedup import mark_duplicates
from raytune_ft.data.formats import FormatFault, format_of, renamed, to_record
from raytune_ft.data.readers import SourceRow, read_rows
from raytune_ft.data.rows import ROW_SCHEMA, prompt_hash, short_hash
from raytune_ft.data.shards import write_file
from raytune_ft.data.sources import SourceFile
from raytune_ft.data.split import mark_leaks
from raytune_ft.data.tokenize import add_tokens, chat_for

_BATCH_ROWS = 512


def collect_rows(files: pa.Table, config: DataCollectionConfig) -> Iterator[pa.Table]:
    """Every row of the files (columns of `SourceFile`) as a table of `ROW_SCHEMA`, cleaned, in batches.

    Raises:
        DataError: with file and line, at the first row that is no record, where `on_bad_row` is ``raise``.
    """
    for columns in files.to_pylist():
        file = SourceFile(**columns)
        batch: list[dict[str, Any]] = []
        for row in read_rows(file):
            batch.append(_collected(file, row, config))
            if len(batch) == _BATCH_ROWS:
                yield pa.Table.from_pylist(batch, schema=ROW_SCHEMA)
                batch = []
        yield pa.Table.from_pylist(batch, schema=ROW_SCHEMA)


def _collected(file: SourceFile, row: SourceRow, config: DataCollectionConfig) -> dict[str, Any]:
    place = {"file": file.number, "is_test": file.is_test}
    try:
        if row.values is None:
            raise FormatFault(row.fault)
        values = renamed(row.values, config.columns)
        kind, why = format_of(values.keys(), config.input_format)
        record = to_record(values, kind, source=file.label, position=row.position)
    except FormatFault as fault:
        if config.on_bad_row == "raise":
            where = f"{Location(file.uri)}" + (f":{row.line}" if row.line else f": row {row.position + 1}")
            mend = "Mend the row, or set on_bad_row: reject to leave such rows out."
            raise DataError(f"{where}: {fault}. {mend}") from None
        named = {"source": file.label, "position": row.position, "group": short_hash(f"{file.number}:{row.position}")}
        return {**named, **place, "reason": str(fault), "raw": row.raw, "format": "no record"}
    record, reason = clean(record, config)
    return {**record.to_row(), **place, "reason": reason, "group": prompt_hash(record), "format": f"{kind} ({why})"}


def settle_rows(rows: pa.Table, config: DataCollectionConfig, model: str | None) -> pa.Table:
    """Whole groups of rows with duplicates, leaks from the test and, for a `model`, untrainable rows marked.

    The result is ordered by group, source file and position, whatever the order of `rows`.
    """
    if not rows.num_rows:
        return ROW_SCHEMA.empty_table()  # a block that no key fell into
    rows = rows.sort_by([("group", "ascending"), ("file", "ascending"), ("position", "ascending")])
    if config.drop_duplicates:
        rows = mark_duplicates(rows)
    rows = mark_leaks(rows)
    return rows if model is None else add_tokens(rows, chat_for(model), config.max_length)


def retokenize_files(files: pa.Table, source: str, target: str, model: str, max_length: int) -> pa.Table:
    """Tokenizes each Parquet file in column `path` of the dataset at `source` into one of the same name at `target`.

    Rows that cannot be trained on go to ``rejected/``. Returns a row of counts for each file written.
    """
    counts = []
    for path in files.column("path").to_pylist():
        with Location(source).filesystem.open_input_file((Location(source) / path).path) as stream:
            records = pq.read_table(stream).select(RECORD_SCHEMA.names)
        empty = pa.nulls(records.num_rows, pa.string())
        records = records.append_column("reason", empty).append_column("raw", empty)
        rows = add_tokens(records, chat_for(model), max_length)
        usable = pc.is_null(rows.column("reason"))
        rejected = f"rejected/{path.replace('/', '-')}"
        for name, part in ((path, rows.filter(usable)), (rejected, rows.filter(pc.invert(usable)))):
            if part.num_rows:
                counts.append(write_file(part, Location(target), name))
    return pa.table({"counts": pa.array(counts, pa.string())})
