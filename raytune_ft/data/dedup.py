"""Exact duplicates: of rows with the same record id, the first by source and position stays."""

from __future__ import annotations

import pyarrow as pa

from raytune_ft.data.rows import mark


def mark_duplicates(table: pa.Table) -> pa.Table:
    """The table with a reason on every row whose content an earlier usable row has.

    Rows of one content must all be in the table, ordered by source and position.
    """
    first: dict[str, str] = {}
    reasons: list[str | None] = []
    columns = (table.column(name).to_pylist() for name in ("id", "reason", "source", "position"))
    for row_id, rejected, source, position in zip(*columns, strict=True):
        if rejected is None and row_id in first:
            reasons.append(f"duplicate: of {first[row_id]}")
            continue
        if rejected is None:
            first[row_id] = f"{source}:{position}"
        reasons.append(None)
    return mark(table, reasons)
