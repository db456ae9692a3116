"""How like the whole each split is: Jensen–Shannon distances between counts of fields and lengths."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data.config import SPLITS, STRATA
from raytune_ft.data.strata import field_values, length_buckets

Counts = dict[str, dict[str, Counter[str]]]
"""Split -> field -> value -> rows."""
AUDIT_SCHEMA = pa.schema([("kind", pa.string()), ("count", pa.int64()), ("text", pa.string())])
FIELDS = "fields"


def count_fields(rows: pa.Table, stratify_by: str | None) -> pa.Table:
    """One row of kind `FIELDS` with the `Counts` of a table's usable rows (by `folder`) as JSON `text`.

    Counted are length (log2 of the characters), source, label where rows have one, and the field to stratify by.
    """
    rows = rows.filter(pc.is_null(rows.column("reason")))
    fields = {
        "length": [str(bucket) for bucket in length_buckets(rows).tolist()],
        "source": rows.column("source").to_pylist(),
        "label": [None if label is None else str(label) for label in rows.column("label").to_pylist()],
    }
    if stratify_by is not None and stratify_by not in STRATA:
        fields[stratify_by] = field_values(rows, stratify_by)
    folders = rows.column("folder").to_pylist()
    counts: Counts = {}
    for field, values in fields.items():
        for folder, value in zip(folders, values, strict=True):
            if value is not None:
                counts.setdefault(folder, {}).setdefault(field, Counter())[value] += 1
    return pa.table([[FIELDS], [rows.num_rows], [json.dumps(counts)]], schema=AUDIT_SCHEMA)


def added_counts(texts: Iterable[str]) -> Counts:
    """The counts of all parts, from their JSON texts."""
    total: Counts = {}
    for text in texts:
        for split, fields in json.loads(text).items():
            for field, values in fields.items():
                total.setdefault(split, {}).setdefault(field, Counter()).update(values)
    return total


def distances(
    counts: Mapping[str, Mapping[str, Mapping[str, int]]], *, given_test: bool = False
) -> dict[str, dict[str, float]]:
    """Split -> field -> distance of the split's distribution from that of all splits together.

    A test that was given, not drawn, is measured against the others but is no part of the whole. Fields with one value
    are left out: nothing can be far from anything there.
    """
    whole: dict[str, Counter[str]] = {}
    for split, fields in counts.items():
        if split == "test" and given_test:
            continue
        for field, values in fields.items():
            whole.setdefault(field, Counter()).update(values)
    varied = sorted(field for field, values in whole.items() if len(values) > 1)
    return {
        split: {f: jensen_shannon(counts[split][f], whole[f]) for f in varied if f in counts[split]}
        for split in SPLITS
        if split in counts
    }


def jensen_shannon(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    """Jensen–Shannon distance of two counted distributions: 0 where they are the same, 1 where they share no value.

    The square root of the divergence in bits (Endres and Schindelin, 2003).
    """
    names = sorted(set(one) | set(other))
    p, q = (np.array([counts.get(name, 0) for name in names], float) for counts in (one, other))
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2

    def bits(share: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        there = share > 0
        return float((share[there] * np.log2(share[there] / middle[there])).sum())

    return float(np.sqrt(max((bits(p) + bits(q)) / 2, 0.0)))
