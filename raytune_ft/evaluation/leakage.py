"""Test rows that a model was trained on: the same row, the same prompt, or nearly the same text.

The test set is small and is indexed whole; the training data is looked through file by file, and nothing of it is
kept but what was found. So near-duplicates are told by the exact Jaccard similarity of their sets of five-word
sequences, without sketches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.records import RECORD_SCHEMA, Record
from raytune_ft.core.storage import Location
from raytune_ft.core.words import words_of
from raytune_ft.evaluation.record_files import json_rows, record_of

WORDS = 5
"""Words of a sequence; a shorter text is one sequence."""
LEAK_SCHEMA = pa.schema(
    [("row", pa.int64()), ("kind", pa.string()), ("similarity", pa.float64()), ("where", pa.string())]
)
"""A test row (by its place), how it was met in the training data, and where the first such row stands."""

KINDS = ("the same row", "the same prompt", "a near-duplicate")
UNREADABLE = "unreadable"
"""The kind of a line that says of a file why it could not be looked into (further)."""
_EXAMPLES = 3


@dataclass(frozen=True)
class RowIndex:
    """The test rows by what makes them recognizable."""

    ids: dict[str, int]
    prompts: dict[int, int]
    hashes: NDArray[np.uint64]
    """Sorted hashes of all rows' five-word sequences, and `rows`, which row each belongs to."""
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    near: float | None

    @classmethod
    def of(cls, records: Sequence[Record], near: float | None) -> RowIndex:
        """The index of `records`; `near` is the least similarity of a near-duplicate, None looks for none."""
        sequences = [sequence_hashes(record) for record in records] if near is not None else []
        hashes = np.concatenate([*sequences, np.empty(0, np.uint64)])
        rows = np.repeat(np.arange(len(sequences)), [len(found) for found in sequences])
        order = np.argsort(hashes, kind="stable")
        prompts = {key: place for place, record in enumerate(records) if (key := prompt_hash(record)) is not None}
        sizes = np.array([len(found) for found in sequences], np.int64)
        return cls({r.id: place for place, r in enumerate(records)}, prompts, hashes[order], rows[order], sizes, near)

    def met_by(self, record: Record) -> Iterator[tuple[int, str, float]]:
        """The test rows that a training row gives away, how, and how similar they are."""
        same = self.ids.get(record.id)
        if same is not None:
            yield same, KINDS[0], 1.0
        key = prompt_hash(record)
        asked = self.prompts.get(key) if key is not None else None
        if asked is not None and asked != same:
            yield asked, KINDS[1], 1.0
        if self.near is None:
            return
        own = sequence_hashes(record)
        starts, ends = (np.searchsorted(self.hashes, own, side) for side in ("left", "right"))
        places = [self.rows[start:end] for start, end in zip(starts, ends, strict=True) if end > start]
        if places:
            rows, shared = np.unique(np.concatenate(places), return_counts=True)
            similarity = shared / (self.sizes[rows] + len(own) - shared)
            for row, value in zip(rows.tolist(), similarity.tolist(), strict=True):
                if value >= self.near and row not in (same, asked):
                    yield row, KINDS[2], value


def find_leaks(files: pa.Table, index: RowIndex) -> pa.Table:
    """What the training rows of some files (column ``uri``) give away of the test rows (`LEAK_SCHEMA`).

    A file of another format than ours has a line of the kind `UNREADABLE`, with the reason as its place.
    """
    found: dict[int, dict[str, Any]] = {}
    unread = []
    for uri in files.column("uri").to_pylist():
        try:
            for number, record in _training_records(Location(uri)):
                for row, kind, similarity in index.met_by(record):
                    there = found.get(row)
                    if there is None or KINDS.index(kind) < KINDS.index(there["kind"]):
                        where = f"{Location(uri)}, row {number}"
                        found[row] = {"row": row, "kind": kind, "similarity": similarity, "where": where}
        except (ArtifactError, DataError) as error:
            unread.append({"row": None, "kind": UNREADABLE, "similarity": None, "where": str(error)})
    return pa.Table.from_pylist([*found.values(), *unread], schema=LEAK_SCHEMA)


def first_of_each(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each test row, the plainest, in the order of the rows."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["where"])):
        best.setdefault(row["row"], row)
    return [best[number] for number in sorted(best)]


def leak_words(leaks: Sequence[dict[str, Any]], records: Sequence[Record], label: str) -> str:
    """How many test rows leaked, how, and examples."""
    kinds = [f"{sum(leak['kind'] == kind for leak in leaks)} as {kind}" for kind in KINDS]
    kinds = [words for words in kinds if not words.startswith("0 ")]
    examples = "; ".join(
        f"row {leak['row'] + 1} ({_short(records[leak['row']])}) is {leak['kind']} of {leak['where']}"
        if leak["kind"] == KINDS[2]
        else f"row {leak['row'] + 1} ({_short(records[leak['row']])}) has {leak['kind']} in {leak['where']}"
        for leak in leaks[:_EXAMPLES]
    )
    return f"{len(leaks)} of {len(records)} rows are in what {label} was trained on ({', '.join(kinds)}): {examples}"


def refuse_leaks(leaks: Sequence[dict[str, Any]], records: Sequence[Record], label: str) -> None:
    """Stops an evaluation on rows that a model was trained on.

    Raises:
        DataError: with count and examples, if there are any.
    """
    if leaks:
        raise DataError(
            f"{leak_words(leaks, records, label)}. Evaluate on other rows, or set allow_leak: true; the report then "
            "says so."
        )


def sequence_hashes(record: Record) -> NDArray[np.uint64]:
    """Hashes of the distinct five-word sequences of what a record asks and answers; system turns do not count."""
    turns = [turn.content for turn in (*record.messages, *record.chosen) if turn.role != "system"]
    words = words_of("\n".join([*turns, record.text or "", record.reference or ""]))
    last = max(1, len(words) - WORDS + 1) if words else 0
    sequences = {" ".join(words[place : place + WORDS]) for place in range(last)}
    return np.array([xxhash.xxh64_intdigest(text.encode()) for text in sequences], np.uint64)


def prompt_hash(record: Record) -> int | None:
    """A hash of the words of all that is asked, whatever the case and the blanks; None where nothing is."""
    asked = [" ".join(turn.content.lower().split()) for turn in record.prompt if turn.role != "system"]
    return xxhash.xxh64_intdigest(json.dumps(asked).encode()) >> 1 if any(asked) else None


def _training_records(file: Location) -> Iterator[tuple[int, Record]]:
    if file.name.endswith(".parquet"):
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            columns = [name for name in RECORD_SCHEMA.names if name in parquet.schema_arrow.names]
            number = 0
            for batch in parquet.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, Record.from_row(row)
    else:
        for number, (row, where) in enumerate(json_rows(file), 1):
            yield number, record_of(row, where)


def _short(record: Record) -> str:
    text = record.prompt[-1].content if record.prompt else record.text or ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
