"""JSONL and Parquet files of records, whoever wrote them, row by row: none is in memory whole."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import ROLES, Message, Record, plain_metadata
from raytune_ft.core.row_files import rows_of
from raytune_ft.core.storage import Location

logger = logging.getLogger("raytune_ft")

COLUMNS = ("messages", "text", "reference", "tools", "metadata", "choices", "label")
"""Columns of a file that a record is made of."""
HALVES = re.compile("[\ud800-\udfff]")
"""Half a character: one of the two code units that UTF-16 needs for some."""
_SHOWN = frozenset({"id", "messages", "metadata", "choices"})
"""Columns that a record has as they are, its metadata included."""
_OURS = frozenset({"id", "messages", "text", "chosen", "rejected", "source", "position", "metadata"})
"""Columns of the datasets that `prepare` makes; what else these have beside `COLUMNS` was worked out from them."""
_OWN_ID = "id (own)"
"""Where the metadata of a record keep the id that its row came with: `Record.id` tells its content."""


def records_in(file: Location) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        DataError: naming file and row, if the file is of another kind or a row is no record.
    """
    if not file.name.endswith((".jsonl", ".parquet")):
        raise DataError(
            f"{file}: expected a dataset folder or a .jsonl or .parquet file with a `messages` column; "
            "run `raytune-ft prepare` on other formats first"
        )
    return (record_of(row, where) for row, where in rows_in(file))


def rows_in(file: Location, *, whole: bool = False) -> Iterator[tuple[Any, str]]:
    """The rows of a JSONL or Parquet file, each with its place in words.

    Args:
        file: the file.
        whole: whether those of a Parquet file come with all columns but those of bytes, and not just with what a record
            is made of.

    Raises:
        DataError, ArtifactError: as `rows_of`.
    """
    return rows_of(file, partial(_columns, file=file, whole=whole))


def _columns(schema: pa.Schema, file: Location, *, whole: bool) -> list[str]:
    """The columns that are read; says which ones of bytes, which JSON has not, are left out."""
    known = [name for name in (*COLUMNS, "prompt", "id") if name in schema.names]
    if not whole or set(schema.names) >= _OURS:
        return known
    left_out = [column.name for column in schema if _has_bytes(column.type) and column.name not in known]
    if left_out:
        logger.warning("%s: columns of bytes are left out: %s", file, ", ".join(left_out))
    return [name for name in schema.names if name not in left_out]


def _has_bytes(kind: pa.DataType) -> bool:
    if kind.num_fields:
        return any(_has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return any(told(kind) for told in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary))


def with_columns(record: Record, row: Mapping[str, Any], where: str) -> Record:
    """The record, with the row's id and all columns that it does not have otherwise in its metadata.

    A column whose name stands in the row's own ``metadata`` for another value is called ``NAME (column)``.

    Args:
        record: made from the row.
        row: of a file.
        where: its place in words.

    Raises:
        DataError: if a column holds half a character.
    """
    taken = _SHOWN if row.get("messages") else _SHOWN | {"prompt"}
    names = [name for name in (COLUMNS if row.keys() >= _OURS else row) if name not in taken]
    metadata = dict(record.metadata)
    for name, value in _plain({name: row[name] for name in names if _is_given(row.get(name))}, where).items():
        metadata[name if metadata.get(name, value) == value else f"{name} (column)"] = value
    if _is_given(row.get("id")) and row["id"] not in ("", record.id):
        metadata |= _plain({_OWN_ID: row["id"]}, where)
    _refuse_halves([json.dumps(metadata, ensure_ascii=False)], where)
    return replace(record, metadata=metadata)


def under_own_id(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """An answered row under the id that the row of its record came with (see `with_columns`), where it had one."""
    metadata = dict(row.get("metadata") or {})
    if _OWN_ID not in metadata:
        return row
    return {**row, "id": metadata.pop(_OWN_ID), "metadata": metadata}


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)  # noqa: PLR0124 - NaN is not itself


def record_of(row: Any, where: str) -> Record:
    """A row of a file as a record.

    Raises:
        DataError: naming `where` and what is wrong.
    """
    if not isinstance(row, dict) or not any(row.get(name) for name in ("messages", "text")):
        raise DataError(f"{where}: has neither `messages` nor `text`; run `raytune-ft prepare` on other formats first")
    text, reference, turns = row.get("text"), row.get("reference"), row.get("messages") or []
    for name, value in (("text", text), ("reference", reference)):
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: `{name}` must be text (got {value!r})")
    if not isinstance(turns, list):
        raise DataError(f"{where}: `messages` must be a list of messages (got {turns!r})")
    messages = tuple(_message(turn, where) for turn in turns)
    tools, metadata = _json_text(row.get("tools"), f"{where}: `tools`"), _metadata(row.get("metadata"), where)
    if row.get("choices") is not None:
        metadata = {**metadata, "choices": _choices(row["choices"], where)}
    label = row["label"] if isinstance(row.get("label"), bool) else None  # other files have labels of other kinds
    _refuse_halves(
        [text, reference, tools, *(part for turn in messages for part in (turn.content, turn.tool_calls))], where
    )
    _refuse_halves([json.dumps(metadata, ensure_ascii=False)], where)
    return Record(messages=messages, text=text, label=label, reference=reference, tools=tools, metadata=metadata)


def _refuse_halves(texts: Iterable[str | None], where: str) -> None:
    """Refuses half characters, which JSON can escape (``\\ud83d``) and UTF-8, so any file or tokenizer, cannot say."""
    for text in texts:
        found = HALVES.search(text or "")
        if found is not None:
            raise DataError(
                f"{where}: holds half a character ({found.group()!a}, a lone surrogate), which no text can; mend the "
                "row, or leave it out"
            )


def _message(turn: Any, where: str) -> Message:
    wanted = f"{where}: a message needs a role ({', '.join(ROLES)}) and a content that is text"
    if not isinstance(turn, dict):
        raise DataError(f"{wanted} (got {turn!r})")
    calls = _json_text(turn.get("tool_calls"), f"{where}: `tool_calls`")
    content = "" if turn.get("content") is None and calls else turn.get("content")
    if turn.get("role") not in ROLES or not isinstance(content, str):
        raise DataError(f"{wanted} (got {turn!r})")
    said = Message(turn["role"], content, calls)
    if said.role == "tool":
        answered, tool = (_name(turn.get(name), f"{where}: `{name}`") for name in ("tool_call_id", "name"))
        return replace(said, tool_call_id=answered, name=tool)
    if said.role == "assistant" and turn.get("weight") is not None:
        if turn["weight"] not in (0, 1):
            raise DataError(f"{where}: `weight` must be 0 (does not count) or 1 (got {turn['weight']!r:.60})")
        return replace(said, weight=None if turn["weight"] else 0)
    return said


def _name(value: Any, what: str) -> str | None:
    """Which call a tool's turn answers, or which tool it comes from; None where it does not say."""
    if not isinstance(value, str | None):
        raise DataError(f"{what} must be text (got {value!r:.60})")
    return value or None


def _metadata(value: Any, where: str) -> dict[str, Any]:
    """Of a row of ours JSON text, of others a mapping."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        found = value
    if found is not None and not isinstance(found, dict):
        raise DataError(f"{where}: `metadata` must be a mapping of fields (got {value!r:.60})")
    return _plain(found or {}, where)


def _plain(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return plain_metadata(fields)
    except ValueError as error:
        raise DataError(f"{where}: the metadata hold {error}; mend the row, or leave it out") from None


def _choices(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(choice, str) for choice in value):
        raise DataError(f"{where}: `choices` must be a list of two texts or more (got {value!r:.60})")
    return value


def _json_text(value: Any, what: str) -> str | None:
    """A value as JSON text; text stays as it is.

    Raises:
        DataError: if text is no JSON, or a number is infinite or NaN, which JSON cannot say.
    """
    if value in (None, ""):
        return None if value is None else ""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
        written = json.dumps(parsed, ensure_ascii=False, default=str, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} must be JSON ({error}); mend the row, or leave it out (got {value!r:.60})") from None
    return value if isinstance(value, str) else written
