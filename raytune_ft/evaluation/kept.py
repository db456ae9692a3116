"""Answered rows on storage: what is there is never computed again, whoever computed it and with how many actors.

Rows are kept in pieces, one object each, put in one piece; a row is in the piece that is named by the first of its
rows. Rows that could not be answered are kept apart, to be told, and asked again by the next run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.records import Record
from raytune_ft.core.refusals import told_in_words
from raytune_ft.core.spool import Places
from raytune_ft.core.storage import Location

PIECES = "pieces"
"""The folder of an unfinished run's rows."""
GOES_ON = "Then the same command goes on from what is there."
"""What becomes of them where storage took no more."""
Row = dict[str, Any]


@dataclass(frozen=True)
class KeptRows:
    """The rows of a run, by target and shard."""

    where: Location

    def keep(self, target: str, shard: str, rows: Sequence[Row]) -> None:
        """Puts rows on storage; all of one shard, none of them there already.

        Raises:
            ArtifactError: if storage does not take them.
        """
        if rows:
            first = min(row["position"] for row in rows)
            with told_in_words(self.where, GOES_ON):
                (self._folder(target, shard) / f"{first:012d}.jsonl").write(_lines(rows))

    def keep_failed(self, target: str, shard: str, first: int, rows: Sequence[Row]) -> None:
        """Puts rows without an answer on storage, in the place of an earlier attempt at those from `first` on.

        Raises:
            ArtifactError: if storage does not take them.
        """
        where = self.where / "unanswered" / folder_name(target) / shard / f"{first:012d}.jsonl"
        if rows:
            with told_in_words(self.where, GOES_ON):
                where.write(_lines(rows))
        elif where.exists():
            where.delete()

    def answered(self, target: str, shard: str) -> dict[int, Row]:
        """The answered rows of a shard by their position."""
        return _by_position(self._folder(target, shard))

    def all_answered(self, target: str) -> Mapping[int, Row]:
        """The answered rows of every shard by their position, on this machine's disk."""
        return Places(_rows_in(self.where / "answered" / folder_name(target)))

    def all_failed(self, target: str) -> Mapping[int, Row]:
        """The rows without an answer by their position, on disk; what is answered by now may be among them."""
        return Places(_rows_in(self.where / "unanswered" / folder_name(target)))

    def failed(self, target: str, shard: str) -> dict[int, Row]:
        """The rows of a shard without an answer by their position; what is answered by now may be among them."""
        return _by_position(self.where / "unanswered" / folder_name(target) / shard)

    def delete(self) -> None:
        """Removes all of them."""
        self.where.delete()

    def _folder(self, target: str, shard: str) -> Location:
        return self.where / "answered" / folder_name(target) / shard


def is_answered(record: Record, row: Row | None) -> bool:
    """Whether a kept row is what became of this record, and not of one that stood in its place before."""
    return row is not None and row["id"] == record.id


def folder_name(label: str) -> str:
    """A label as the name of a file or folder; labels that differ have names that do."""
    name = re.sub(r"^\.+|[^A-Za-z0-9._-]+", "-", label)
    if name == label:
        return name
    return f"{name}-{hashlib.sha256(label.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def _by_position(folder: Location) -> dict[int, Row]:
    return {row["position"]: row for row in _rows_in(folder)}


def _rows_in(folder: Location) -> Iterator[Row]:
    return (row for name in folder.files() for row in _parsed((folder / name).read()))


def _parsed(content: bytes) -> Iterator[Row]:
    return (json.loads(line) for line in content.decode().split("\n") if line)


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
