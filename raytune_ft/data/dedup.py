"""Rows of one prompt: exact duplicates, of which the first by source and position stays, and conflicting answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.core.records import Record
from raytune_ft.data.rows import mark


def mark_duplicates(table: pa.Table) -> pa.Table:
    """The table with a reason on every row of `sources` whose content an earlier usable row has.

    Rows of one content must all be in the table, ordered by source and position. Rows of `test_sources` stay as often
    as they are there.
    """
    first: dict[str, str] = {}
    reasons: list[str | None] = []
    columns = (table.column(name).to_pylist() for name in ("id", "reason", "is_test", "source", "position"))
    for row_id, rejected, is_test, source, position in zip(*columns, strict=True):
        if rejected is None and row_id in first and not is_test:
            reasons.append(f"duplicate: of {first[row_id]}")
            continue
        if rejected is None:
            first.setdefault(row_id, f"{source}:{position}")
        reasons.append(None)
    return mark(table, reasons)


def mark_conflicts(table: pa.Table, *, drop: bool) -> pa.Table:
    """The table with a column `conflicting`: whether another usable row answers the same prompt differently.

    Case and whitespace make no difference. Preferences and rows with a label are left out: there, several answers
    to a prompt are meant. All rows of a `group` must be in the table.

    Args:
        table: of `ROW_SCHEMA`.
        drop: gives conflicting rows a reason, too.
    """
    answers: dict[str, set[tuple[str, str]]] = {}
    asked: list[tuple[int, str]] = []
    for place, group, answer in _answers(table):
        answers.setdefault(group, set()).add(answer)
        asked.append((place, group))
    counts: list[int] = [0] * table.num_rows
    for place, group in asked:
        counts[place] = len(answers[group])
    table = table.append_column("conflicting", pa.array([count > 1 for count in counts], pa.bool_()))
    reasons = [f"conflicting answers: {count} to one prompt" if drop and count > 1 else None for count in counts]
    return mark(table, reasons)


def _answers(table: pa.Table) -> Iterator[tuple[int, str, tuple[str, str]]]:
    """Place, group and answer of the rows that could conflict: those of a group with more than one usable row."""
    usable = [place for place, reason in enumerate(table.column("reason").to_pylist()) if reason is None]
    groups = table.column("group").take(pa.array(usable, pa.int64()))
    sizes = {item["values"]: item["counts"] for item in pc.value_counts(groups).to_pylist()}
    places = [place for place, group in zip(usable, groups.to_pylist(), strict=True) if sizes[group] > 1]
    rows: list[Mapping[str, Any]] = table.take(pa.array(places, pa.int64())).to_pylist()
    for place, row in zip(places, rows, strict=True):
        record = Record.from_row(row)
        if record.answer is not None and not record.chosen and record.label is None:
            calls = record.messages[-1].tool_calls or ""
            yield place, row["group"], (" ".join(record.answer.casefold().split()), calls)
