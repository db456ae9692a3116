"""Strata: what kind of row each is, so that every split gets its share of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import meant
from raytune_ft.data.config import STRATA, DataCollectionConfig
from raytune_ft.data.shingles import Places, row_texts

MOST_STRATA = 256
"""Most values that a field to stratify by may have: counts per stratum are kept in one place."""
_SOURCES = 16
_SHORTEST, _LONGEST = 4, 19
_INNER = "metadata"
_LOOKED_AT, _NAMES, _SHOWN = 100, 50, 8


def with_strata(rows: pa.Table, stratify_by: str | None) -> pa.Table:
    """The table with a column `stratum`, one for all rows of a `group`: that of its first usable row, else its first.

    Rows of one group must be together, the first first.

    Raises:
        DataError: if the field to stratify by has more than `MOST_STRATA` values.
    """
    if stratify_by is None:
        return rows.append_column("stratum", pa.array(np.zeros(rows.num_rows, np.int64)))
    strata = _strata(rows, stratify_by)
    first = _first_of_groups(rows)
    return rows.append_column("stratum", pa.array(strata[first]))


def _strata(rows: pa.Table, stratify_by: str) -> Places:
    if stratify_by == "source":
        return _hashed(rows.column("source").to_pylist())
    if stratify_by == "length":
        return length_buckets(rows)
    if stratify_by == "length_and_source":
        # Past 16 files, several share a stratum: their number is bounded, that of files is not.
        return np.asarray(length_buckets(rows) * _SOURCES + rows.column("file").to_numpy() % _SOURCES)
    values = field_values(rows, stratify_by)
    strata = _hashed(values)
    refuse_many(strata.tolist(), stratify_by)
    return strata


def refuse_many(strata: Iterable[int], stratify_by: str | None) -> None:
    """Refuses a field that tells nearly every row apart.

    Raises:
        DataError: if there are more than `MOST_STRATA`.
    """
    count = len(set(strata))
    if count > MOST_STRATA:
        raise DataError(
            f"stratify_by: {stratify_by!r} has more than {MOST_STRATA} values (found {count}): name a field with few, "
            "such as a topic or a label, or set it to length_and_source"
        )


def length_buckets(rows: pa.Table) -> Places:
    """log2 of the characters of each row's turns, rounded down, from 4 (and shorter) to 19 (and longer)."""
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(row_texts(rows))).to_numpy().astype(np.float64)
    return np.asarray(np.clip(np.log2(np.maximum(lengths, 1)), _SHORTEST, _LONGEST).astype(np.int64))


def field_values(rows: pa.Table, field: str) -> list[str]:
    """The value of a metadata field of each row as text; empty where a row has none.

    A source's own column `metadata` lies inside the metadata; its fields count as well.
    """
    metadata = rows.column("metadata")
    # Looked for as text first: most rows of most sources need no parsing.
    has = pc.match_substring(metadata, json.dumps(field, ensure_ascii=False)).fill_null(False).to_pylist()
    values = []
    for text, present in zip(metadata.to_pylist(), has, strict=True):
        value = _field(json.loads(text), field) if present else None
        values.append("" if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True))
    return values


def _field(metadata: dict[str, Any], field: str) -> Any:
    inner = metadata.get(_INNER)
    return inner[field] if field not in metadata and isinstance(inner, dict) and field in inner else metadata.get(field)


def seen_names(rows: pa.Table, fields: Sequence[str]) -> pa.Table:
    """One row, JSON in the column `seen`: what some row of the table has of the names that settings name.

    Those are the `fields` of the metadata and the standard names that `columns` gave; with them go names of the
    metadata, a few, for messages.
    """
    texts = rows.column("metadata").drop_null()
    notes = pc.unique(rows.column("notes").drop_null()).to_pylist()
    names: set[str] = set()
    for metadata in map(json.loads, texts.slice(0, _LOOKED_AT).to_pylist()):
        inner = metadata.get(_INNER)
        names |= metadata.keys() | (inner.keys() if isinstance(inner, dict) else set())
    seen = {
        "records": len(texts),
        "fields": [field for field in fields if any(field_values(rows, field))],
        "columns": sorted({name for note in notes for name in json.loads(note).get("renamed", ())}),
        "names": sorted(names)[:_NAMES],
    }
    return pa.table({"seen": [json.dumps(seen)]})


def named_fields(config: DataCollectionConfig) -> dict[str, str]:
    """The settings that name a metadata field which must be in some row, and the field."""
    named = {"stratify_by": config.stratify_by, "group_by": config.group_by}
    usual = {*STRATA, type(config).model_fields["group_by"].default, None}
    return {setting: field for setting, field in named.items() if field is not None and field not in usual}


def refuse_absent(seen: Iterable[str], config: DataCollectionConfig) -> None:
    """Refuses fields and columns that the settings name and no row has, by what `seen_names` said of its tables.

    Raises:
        DataError: naming the setting, and what was probably meant.
    """
    found = [json.loads(text) for text in seen]
    if not any(one["records"] for one in found):
        return  # which is said elsewhere
    fields, columns, names = ({name for one in found for name in one[key]} for key in ("fields", "columns", "names"))
    for setting, field in named_fields(config).items():
        if field not in fields:
            there = f"there are, among others, {', '.join(sorted(names)[:_SHOWN])}" if names else "it has no fields"
            raise DataError(f"{setting}: no row has {field!r} in its metadata ({there}){meant(field, names, 0.5)}")
    for standard, name in config.columns.items():
        if standard not in columns:
            raise DataError(f"columns.{standard}: no row of the sources has a column {name!r}{meant(name, names, 0.5)}")


def _hashed(values: list[str]) -> Places:
    known = {value: xxhash.xxh64_intdigest(value.encode()) >> 1 for value in set(values)}
    return np.array([known[value] for value in values], np.int64)


def _first_of_groups(rows: pa.Table) -> Places:
    """For each row the place of the first usable row of its group, or of its first row if none is usable."""
    group = rows.column("group").combine_chunks().dictionary_encode().indices.to_numpy()
    unusable = pc.is_valid(rows.column("reason")).to_numpy().astype(np.int8)
    order = np.lexsort((np.arange(len(group)), unusable, group))
    _, starts = np.unique(group[order], return_index=True)
    return np.asarray(order[starts][group])
