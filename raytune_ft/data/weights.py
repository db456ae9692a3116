"""How often the training split has a row: told by its id, the weight of its source and the seed alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.core.digest import short_hash
from raytune_ft.core.errors import DataError
from raytune_ft.data.rows import mark
from raytune_ft.data.sources import SourceFile, pattern_of, source_uri

CAUSE = "source weight"
"""What rows are counted under that a weight leaves out, or makes again."""


def copies(row_id: str, weight: float, seed: int) -> int:
    """How many copies of a row go out: the weight's whole part, and one more for as many rows as its fraction says.

    Of a weight below 1 that is the same as keeping a share of the rows; a higher weight keeps all that a lower keeps.
    """
    whole = int(weight)
    fraction = weight - whole
    share = int(short_hash(f"{seed}:copies:{row_id}"), 16) / 2**64
    return whole + (share < fraction)


def file_weights(files: Sequence[SourceFile], source_weights: Mapping[str, float]) -> dict[int, float]:
    """Number of each source file that has a weight, and the weight.

    Raises:
        DataError: if a weight is for no file of `sources`, or two are for the same.
    """
    found: dict[int, tuple[str, float]] = {}
    for source, weight in source_weights.items():
        matches = _matches(source)
        numbers = [file.number for file in files if not file.is_test and matches.fullmatch(file.uri)]
        if not numbers:
            raise DataError(f"source_weights: {source} is none of the sources, nor a file among them")
        for number in numbers:
            if number in found:
                raise DataError(f"source_weights: {found[number][0]} and {source} both give a weight to one file")
            found[number] = (source, weight)
    return {number: weight for number, (_, weight) in sorted(found.items())}


def _matches(source: str) -> re.Pattern[str]:
    """Matches the URIs of a source's files: its own, those below a folder, the shards of a hub's dataset."""
    if source.startswith("hf:"):
        return re.compile(re.escape(source_uri(source)) + r"#.*")
    uri, question, query = source_uri(source).partition("?") if "://" in source else (source_uri(source), "", "")
    return re.compile(pattern_of(uri) + r"(?:/.*)?" + re.escape(question + query))


def apply_weights(rows: pa.Table, weights: Mapping[int, float], seed: int) -> pa.Table:
    """The table with each usable row as often as `copies` says, and the column `copy`: 0 for the first, then 1, 2, ...

    Rows of which none is left stay once, with a reason. Rejected rows, rows of files without a weight, and rows of
    `test_sources` stay as they are. To be called on the rows of the training split, with the columns `id`, `file`,
    `reason` and `is_test`; the order is kept and copies follow their first.
    """
    counts, reasons = [], []
    names = ("id", "file", "reason", "is_test")
    for row_id, file, reason, is_test in zip(*(rows.column(name).to_pylist() for name in names), strict=True):
        weight = weights.get(file) if reason is None and not is_test else None
        count = 1 if weight is None else copies(row_id, weight, seed)
        counts.append(max(count, 1))
        reasons.append(None if count else f"{CAUSE}: {weight:g} leaves it out")
    places = np.repeat(np.arange(rows.num_rows), counts)
    starts = np.repeat(np.cumsum(counts) - counts, counts) if counts else places
    numbers = np.arange(len(places)) - starts
    return mark(rows, reasons).take(pa.array(places, pa.int64())).append_column("copy", pa.array(numbers, pa.int32()))


def weigh_training_rows(rows: pa.Table, weights: Mapping[int, float], seed: int) -> pa.Table:
    """The table of `assign_folders` with the training split's rows as often as their source's weight says.

    Copies carry ``made``, as other rows that no source had do; rows that a weight leaves out go to ``rejected``.
    """
    trains = pc.equal(rows.column("folder"), "train")
    others = rows.filter(pc.invert(trains))
    weighed = apply_weights(rows.filter(trains), weights, seed)
    is_copy = pc.greater(weighed.column("copy"), 0)
    nothing = pa.scalar(None, pa.string())
    for name in ("format", "notes"):  # said of the first, and counted once
        if name in weighed.column_names:
            values = pc.if_else(is_copy, nothing, weighed.column(name))
            weighed = weighed.set_column(weighed.column_names.index(name), name, values)
    folders = pc.if_else(pc.is_valid(weighed.column("reason")), "rejected", weighed.column("folder"))
    weighed = weighed.set_column(weighed.column_names.index("folder"), "folder", folders)
    others = others.append_column("copy", pa.array([0] * others.num_rows, pa.int32()))
    both = pa.concat_tables([others, weighed.select(others.column_names)])
    made = pc.if_else(pc.greater(both.column("copy"), 0), pa.scalar(CAUSE), nothing)
    return both.append_column("made", made)
