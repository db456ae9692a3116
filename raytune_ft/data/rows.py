"""The row between the stages of `prepare`: a record with its reason of rejection, if any, and what sorting needs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pyarrow as pa

from raytune_ft.core.digest import short_hash
from raytune_ft.core.records import REJECTED_SCHEMA, Record

TOKEN_FIELDS = (
    pa.field("input_ids", pa.list_(pa.int32())),
    pa.field("supervised", pa.list_(pa.bool_())),
    pa.field("rejected_input_ids", pa.list_(pa.int32())),
    pa.field("rejected_supervised", pa.list_(pa.bool_())),
)
"""Columns that a dataset prepared for a model has beside the record's; a preference's first two are those of its prompt
with the chosen answer, the last two those with the rejected one (null in other rows)."""

ROW_SCHEMA = pa.schema(
    [
        *REJECTED_SCHEMA,
        pa.field("group", pa.string()),
        pa.field("format", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("is_test", pa.bool_()),
        pa.field("notes", pa.string()),
    ]
)
"""`group` is the hash of what is asked (rows of one group never straddle splits), `format` the row's format and how
that was told, `file` the number of the source file, `is_test` whether it is one of `test_sources`, `notes`
JSON text of what cleaning changed (`Cleaned.notes`), null where nothing."""

UNANSWERED = "a prompt without an answer"
"""Why a row that asks and does not answer is rejected, or, where such rows are kept, what is remarked of it."""

RAW_TEXT = "read as raw text, without its column"
"""How the remark begins of a text that may have been meant as one part of an example."""
_MOST_COLUMNS = 16


def mark(table: pa.Table, reasons: Sequence[str | None]) -> pa.Table:
    """The table with `reasons` set on rows that had none; rows that were rejected before keep their reason."""
    before: list[str | None] = table.column("reason").to_pylist()
    merged = [new if old is None else old for old, new in zip(before, reasons, strict=True)]
    return table.set_column(table.schema.get_field_index("reason"), "reason", pa.array(merged, pa.string()))


def with_remarks(table: pa.Table, remarks: Sequence[str | None]) -> pa.Table:
    """The table with `remarks` added to the JSON in `notes`, for the account; without that column as it is."""
    places = [place for place, remark in enumerate(remarks) if remark is not None]
    if not places or "notes" not in table.column_names:
        return table
    notes: list[str | None] = table.column("notes").to_pylist()
    for place in places:
        notes[place] = remarked(notes[place], remarks[place])
    return table.set_column(table.schema.get_field_index("notes"), "notes", pa.array(notes, pa.string()))


def remarked(notes: str | None, remark: str | None) -> str | None:
    """The JSON in a row's `notes` with a remark added."""
    return _added(notes, "remarks", remark)


def renamed_to(notes: str | None, names: Sequence[str]) -> str | None:
    """The JSON in a row's `notes` with the standard names that columns of the row were given."""
    return json.dumps({**json.loads(notes or "{}"), "renamed": names}, sort_keys=True) if names else notes


def kept_aside(notes: str | None, columns: Sequence[str]) -> str | None:
    """The JSON in a row's `notes` with the columns that became metadata alone; of many, the first by name."""
    if not columns:
        return notes
    named = [*columns[:_MOST_COLUMNS], *(["others"] if len(columns) > _MOST_COLUMNS else [])]
    return json.dumps({**json.loads(notes or "{}"), "metadata": named}, sort_keys=True)


def changed_by(notes: str | None, step: str | None) -> str | None:
    """The JSON in a row's `notes` with a step that changed the row added."""
    return _added(notes, "changed", step)


def _added(notes: str | None, key: str, item: str | None) -> str | None:
    if item is None:
        return notes
    said = json.loads(notes or "{}")
    return json.dumps({**said, key: [*said.get(key, ()), item]}, sort_keys=True)


def prompt_hash(record: Record) -> str:
    """What rows that ask the same have in common: 16 hex digits over the prompt's turns, or over a raw text."""
    turns = [[m.role, m.content, m.tool_calls] for m in record.prompt]
    return short_hash(json.dumps(turns or record.text, ensure_ascii=False))


def reason_name(reason: str) -> str:
    """What a reason is counted under: its part before the colon, so that counts stay few."""
    return reason.partition(":")[0]
