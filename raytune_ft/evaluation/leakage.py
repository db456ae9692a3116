"""Test rows that a model was trained on: the same row, a part of one, the same prompt, or nearly the same text.

The test set is small and is indexed whole; the training data is looked through file by file, and nothing of it is
kept but what was found. So near-duplicates are told by the exact Jaccard similarity of their sets of five-word
sequences, without sketches.

System turns do not count: one that all rows share is no leak, and a question is the same one under another. Only within
one prepared dataset a row is not met in one with another system turn: `prepare` has kept equal questions in one split,
but for openings of very many rows ("Summarize this"), which it tells apart by these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.records import RECORD_SCHEMA, Message, Record
from raytune_ft.core.row_files import rows_of
from raytune_ft.core.storage import Location
from raytune_ft.core.words import plain, words_of
from raytune_ft.evaluation.record_files import record_of

WORDS = 5
"""Words of a sequence; a shorter text is one sequence."""
LEAK_SCHEMA = pa.schema(
    [("row", pa.int64()), ("kind", pa.string()), ("similarity", pa.float64()), ("where", pa.string())]
)
"""A test row (by its place), how it was met in the training data, and where the first such row stands."""

PART_WORDS = 13
"""Words of a text of which it counts when they stand inside a longer one (as GPT-3's contamination check has it)."""
KINDS = ("the same row", "a part", "the same prompt", "a near-duplicate")
"""How a test row is met, the plainest first. A part is a row whose turns, all of them, follow one another in a longer
conversation, or whose text stands in a longer text; a prompt is what stands before an answer of a conversation."""
UNREADABLE = "unreadable"
"""The kind of a line that says of a file why it could not be looked into (further)."""
_EXAMPLES = 3
_ARE = frozenset({KINDS[1], KINDS[3]})
"""Kinds that a row is of what it is met in; it has the others in common with it."""


Turn = tuple[str, str, str | None]
"""Role, text and calls of a turn."""


@dataclass(frozen=True)
class RowIndex:
    """The test rows by what makes them recognizable."""

    ids: dict[str, list[int]]
    talks: dict[int, list[int]]
    """Rows by the hash of all their turns, `prompts` by that of what they ask."""
    lengths: frozenset[int]
    """How many turns rows have."""
    prompts: dict[int, list[int]]
    hashes: NDArray[np.uint64]
    """Sorted hashes of all rows' five-word sequences, and `rows`, which row each belongs to."""
    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    texts: tuple[str | None, ...]
    """What rows of `PART_WORDS` words say, in `plain` text; None for shorter ones."""
    systems: tuple[list[str], ...]
    """What rows' system turns say."""
    near: float | None

    @classmethod
    def of(cls, records: Sequence[Record], near: float | None) -> RowIndex:
        """The index of `records`; `near` is the least similarity of a near-duplicate, None looks for none.

        None says that the training rows are of the same prepared dataset: its splits have told prompts on the way of a
        conversation apart, but for openings of very many rows ("Hi"), which do not count then.
        """
        said = [_said(record) for record in records]
        words = [words_of(text) for text in said]
        sequences = [sequence_hashes(found) for found in words]
        hashes = np.concatenate([*sequences, np.empty(0, np.uint64)])
        rows = np.repeat(np.arange(len(sequences)), [len(found) for found in sequences])
        order = np.argsort(hashes, kind="stable")
        talks = [_turns(record) for record in records]
        return cls(
            ids=_places(record.id for record in records),
            talks=_places(_hash(talk) if talk else None for talk in talks),
            lengths=frozenset(len(talk) for talk in talks if talk),
            prompts=_places(map(prompt_hash, records)),
            hashes=hashes[order],
            rows=rows[order],
            sizes=np.array([len(found) for found in sequences], np.int64),
            texts=tuple(plain(t) if len(w) >= PART_WORDS else None for t, w in zip(said, words, strict=True)),
            systems=tuple(map(_system, records)),
            near=near,
        )

    def met_by(self, record: Record) -> Iterator[tuple[int, str, float]]:
        """The test rows that a training row gives away, each once, how, and how similar they are."""
        met: set[int] = set()
        own = _system(record)
        for kind, row, similarity in self._met(record):
            told_apart = self.near is None and self.systems[row] not in ([], own)
            if row not in met and not told_apart:
                met.add(row)
                yield row, kind, similarity

    def _met(self, record: Record) -> Iterator[tuple[str, int, float]]:
        talk, said = _turns(record), _said(record)
        alike = list(self._alike(words_of(said)))
        yield from ((KINDS[0], row, 1.0) for row in self.ids.get(record.id, ()))
        windows = (talk[at : at + size] for size in self.lengths for at in range(len(talk) - size + 1))
        yield from ((KINDS[1], row, 1.0) for turns in windows for row in self.talks.get(_hash(turns), ()))
        yield from ((KINDS[1], row, 1.0) for row in self._inside(said, [row for row, whole, _ in alike if whole]))
        asked = {prompt_hash(record)}
        if self.near is not None:
            asked |= {_asked(talk[:at]) for at in _ends_of_prompts(talk)}
        yield from ((KINDS[2], row, 1.0) for key in asked if key is not None for row in self.prompts.get(key, ()))
        for row, _, similarity in alike:
            if self.near is not None and similarity >= self.near:
                yield KINDS[3], row, similarity

    def _alike(self, words: Sequence[str]) -> Iterator[tuple[int, bool, float]]:
        """Rows that share a sequence with a text: which, whether they share all they have, and the similarity."""
        own = sequence_hashes(words)
        starts, ends = (np.searchsorted(self.hashes, own, side) for side in ("left", "right"))
        places = [self.rows[start:end] for start, end in zip(starts, ends, strict=True) if end > start]
        if not places:
            return
        rows, shared = np.unique(np.concatenate(places), return_counts=True)
        similarity = shared / (self.sizes[rows] + len(own) - shared)
        whole = shared == self.sizes[rows]
        yield from zip(rows.tolist(), whole.tolist(), similarity.tolist(), strict=True)

    def _inside(self, said: str, rows: Sequence[int]) -> Iterator[int]:
        """Those of the rows whose text stands in another."""
        text = plain(said) if rows else ""
        yield from (row for row in rows if (part := self.texts[row]) is not None and part in text)


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
        if leak["kind"] in _ARE
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


def sequence_hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes of the distinct five-word sequences of a text."""
    last = max(1, len(words) - WORDS + 1) if words else 0
    sequences = {" ".join(words[place : place + WORDS]) for place in range(last)}
    return np.array([xxhash.xxh64_intdigest(text.encode()) for text in sequences], np.uint64)


def prompt_hash(record: Record) -> int | None:
    """A hash of all that is asked, whatever the case, the width and the blanks; None where nothing is."""
    return _asked([_turn(turn) for turn in record.prompt if turn.role != "system"])


def _said(record: Record) -> str:
    """What a record asks and answers; system turns do not count."""
    turns = [turn.content for turn in (*record.messages, *record.chosen) if turn.role != "system"]
    return "\n".join([*turns, record.text or "", record.reference or ""])


def _system(record: Record) -> list[str]:
    return [plain(turn.content) for turn in record.messages if turn.role == "system"]


def _turns(record: Record) -> list[Turn]:
    """The turns of a conversation, of a preference those of the better answer; system turns do not count."""
    return [_turn(turn) for turn in (*record.messages, *record.chosen) if turn.role != "system"]


def _turn(turn: Message) -> Turn:
    return turn.role, plain(turn.content), turn.tool_calls


def _ends_of_prompts(talk: Sequence[Turn]) -> Iterator[int]:
    """How many turns each prompt of a conversation has: those before each answer, or all where it ends with none."""
    yield from (at for at, turn in enumerate(talk) if turn[0] == "assistant")
    if talk and talk[-1][0] != "assistant":
        yield len(talk)


def _asked(talk: Sequence[Turn]) -> int | None:
    asked = [text for _, text, _ in talk]
    return _hash(asked) if any(asked) else None


def _hash(value: Any) -> int:
    return xxhash.xxh64_intdigest(json.dumps(value).encode())


def _places(keys: Iterable[Any]) -> dict[Any, list[int]]:
    """Where each key stands; nothing stands for None."""
    found: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        if key is not None:
            found.setdefault(key, []).append(place)
    return found


def _training_records(file: Location) -> Iterator[tuple[int, Record]]:
    ours = file.name.endswith(".parquet")
    for number, (row, where) in enumerate(rows_of(file, _record_columns), 1):
        yield number, Record.from_row(row) if ours else record_of(row, where)


def _record_columns(schema: pa.Schema) -> list[str]:
    return [name for name in RECORD_SCHEMA.names if name in schema.names]


def _short(record: Record) -> str:
    text = record.prompt[-1].content if record.prompt else record.text or ""
    return repr(text if len(text) <= 60 else text[:57] + "...")
