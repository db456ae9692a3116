"""Stages of `prepare`: rows are read and cleaned one by one, then settled group by group; and tokenizing anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import DataError
from raytune_ft.core.records import RECORD_SCHEMA
from raytune_ft.core.storage import Location
from raytune_ft.data.additions import moved_spans, with_reasoning, with_system_prompt
from raytune_ft.data.cleaning import clean
from raytune_ft.data.config import DataCollectionConfig, OverLength
from raytune_ft.data.conversations import without_filled_nulls
from raytune_ft.data.corrections import Correction, correct
from raytune_ft.data.dedup import mark_conflicts, mark_duplicates
from raytune_ft.data.formats import (
    FormatFault,
    NothingToLearnError,
    format_of_row,
    only_metadata,
    passed_over,
    renamed,
    to_record,
)  # fmt: skip
from raytune_ft.data.groups import with_nodes
from raytune_ft.data.readers import SourceRow, read_rows
from raytune_ft.data.redaction import redact_text
from raytune_ft.data.rows import (
    RAW_TEXT,
    ROW_SCHEMA,
    changed_by,
    kept_aside,
    prompt_hash,
    remarked,
    renamed_to,
)  # fmt: skip
from raytune_ft.data.shards import write_file, write_files
from raytune_ft.data.sources import COLUMNAR, SourceFile
from raytune_ft.data.split import mark_leaks
from raytune_ft.data.strata import with_strata
from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for, split_rows

_BATCH_ROWS = 512
_BATCH_CHARACTERS = 16 << 20


def collect_rows(
    files: pa.Table, config: DataCollectionConfig, corrections: Mapping[str, Correction] | None = None
) -> Iterator[pa.Table]:
    """Every row of the files (columns of `SourceFile`) as a table of `ROW_SCHEMA`, cleaned and corrected, in batches.

    Raises:
        DataError: with file and line, at the first row that is no record, where `on_bad_row` is ``raise``, and where a
            correction does not fit its row.
    """
    for columns in files.to_pylist():
        file = SourceFile(**columns)
        batch: list[dict[str, Any]] = []
        characters = 0
        for row in read_rows(file):
            batch.append(_collected(file, row, config, corrections or {}))
            characters += _characters(batch[-1])
            if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
                yield pa.Table.from_pylist(batch, schema=ROW_SCHEMA)
                batch, characters = [], 0
        yield pa.Table.from_pylist(batch, schema=ROW_SCHEMA)


def _characters(row: dict[str, Any]) -> int:
    turns = (*row.get("messages", ()), *row.get("chosen", ()), *row.get("rejected", ()))
    texts = (row.get("text"), row.get("raw"), row.get("metadata"), row.get("tools"))
    return sum(len(turn["content"]) for turn in turns) + sum(len(text) for text in texts if text)


def _collected(
    file: SourceFile, row: SourceRow, config: DataCollectionConfig, corrections: Mapping[str, Correction]
) -> dict[str, Any]:
    given = [standard for standard, name in config.columns.items() if row.values and name in row.values]
    try:
        if row.values is None:
            raise FormatFault(row.fault)
        values = renamed(row.values, config.columns)
        if file.kind in COLUMNAR:
            values = without_filled_nulls(values)
        kind, why = format_of_row(values, config.input_format)
        record = to_record(values, kind, source=file.label, position=row.position)
    except FormatFault as fault:
        if config.on_bad_row == "raise" and not isinstance(fault, NothingToLearnError):
            where = f"{Location(file.uri)}" + (f":{row.line}" if row.line else f": row {row.position + 1}")
            mend = "Mend the row, or set on_bad_row: reject to leave such rows out."
            raise DataError(f"{where}: {fault}. {mend}") from None
        return {**_no_record(file, row, str(fault), config), "notes": renamed_to(None, given)}
    aside = only_metadata(values, record)
    doubtful = passed_over(aside, kind) if config.input_format is None else None
    record = with_system_prompt(record, config.system_prompt)
    cleaned = clean(record, config)
    shaped, remark = with_reasoning(cleaned.record, config)
    refused = remark if config.on_reasoning_fault == "reject" else None
    reason = cleaned.reason or moved_spans(record, cleaned.record) or refused
    notes = remarked(renamed_to(cleaned.notes, given), remark if reason is None else None)
    notes = kept_aside(notes, aside)
    if reason is None:
        notes = remarked(notes, doubtful and f"{RAW_TEXT} {doubtful!r}")
        shaped, done = correct(shaped, corrections)
        notes = changed_by(notes, done)
    row_of = {"group": prompt_hash(shaped), "format": f"{kind} ({why})", "notes": notes, "reason": reason}
    return {**shaped.to_row(), "file": file.number, "is_test": file.is_test, **row_of}


def _no_record(file: SourceFile, row: SourceRow, reason: str, config: DataCollectionConfig) -> dict[str, Any]:
    """A row that is rejected as it was read."""
    raw = row.raw
    if config.redact:
        reason, raw = (redact_text(text, config.redact, Counter()) for text in (reason, raw))
    return {
        "source": file.label,
        "position": row.position,
        "group": short_hash(f"{file.number}:{row.position}"),
        "file": file.number,
        "is_test": file.is_test,
        "reason": reason,
        "raw": raw,
        "format": "no record",
    }


def settle_rows(rows: pa.Table, config: DataCollectionConfig, model: str | None, policy: TokenPolicy) -> pa.Table:
    """Whole groups of rows with duplicates, leaks from the test and, for a `model`, untrainable rows marked.

    Added are the columns `conflicting`, `stratum`, `prompt`, `place` and `node`. The result is ordered by group, source
    file and position, whatever the order of `rows`.
    """
    if not rows.num_rows:
        return ROW_SCHEMA.empty_table()  # a block that no key fell into
    rows = rows.sort_by([("group", "ascending"), ("file", "ascending"), ("position", "ascending")])
    if config.drop_duplicates:
        rows = mark_duplicates(rows)
    rows = mark_conflicts(mark_leaks(rows), drop=config.conflicting_answers == "drop")
    if model is not None:
        rows = add_tokens(rows, chat_for(model, policy.template), policy)
    return with_nodes(with_strata(rows, config.stratify_by))


def write_rows(rows: pa.Table, where: str, model: str | None, policy: TokenPolicy) -> pa.Table:
    """As `write_files`, with rows that are too long in pieces; pieces that cannot be trained on go to ``rejected/``."""
    if model is not None and policy.over_length is OverLength.SPLIT and rows.num_rows:
        rows = split_rows(rows, chat_for(model, policy.template), policy)
        paths = zip(rows.column("path").to_pylist(), rows.column("reason").to_pylist(), strict=True)
        moved = [path if reason is None else _rejected_path(path) for path, reason in paths]
        rows = rows.set_column(rows.column_names.index("path"), "path", pa.array(moved, pa.string()))
    return write_files(rows, where)


def _rejected_path(path: str) -> str:
    return path if path.startswith("rejected/") else f"rejected/{path.replace('/', '-')}"


def retokenize_files(files: pa.Table, source: str, target: str, model: str, policy: TokenPolicy) -> pa.Table:
    """Tokenizes each Parquet file in column `path` of the dataset at `source` into one of the same name at `target`.

    Rows that cannot be trained on go to ``rejected/``. Returns a row of counts for each file written.
    """
    counts = []
    for path in files.column("path").to_pylist():
        with Location(source).filesystem.open_input_file((Location(source) / path).path) as stream:
            records = pq.read_table(stream).select(RECORD_SCHEMA.names).cast(RECORD_SCHEMA)
        empty = pa.nulls(records.num_rows, pa.string())
        for name in ("reason", "raw", "notes"):
            records = records.append_column(name, empty)
        tested = pa.array([path.startswith("test/")] * records.num_rows, pa.bool_())
        records = records.append_column("is_test", tested)
        chat = chat_for(model, policy.template)
        rows = split_rows(add_tokens(records, chat, policy), chat, policy)
        usable = pc.is_null(rows.column("reason"))
        parts = ((path, rows.filter(usable)), (_rejected_path(path), rows.filter(pc.invert(usable))))
        for name, part in parts:
            if part.num_rows:
                counts.append(write_file(part, Location(target), name))
    return pa.table({"counts": pa.array(counts, pa.string())})
