"""Which split a row falls into: told by a hash of seed and prompt, so that blocks and workers cannot change it.

Groups (rows that ask the same) are ranked by hash; the lowest ranks are the test, the next the validation. Where the
cuts lie is decided from counts per rank, at most 65,536 numbers however many rows there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raytune_ft.data.rows import mark, reason_name, short_hash

GUIDE = {"train": (0.80, 0.90), "validation": (0.10, 0.15), "test": (0.05, 0.10)}
"""Shares that the guide recommends."""

_TOLERANCE = 0.005


@dataclass
class Tally:
    """Counts that the split needs: usable rows of `sources` per rank, those of the test files, rejected by reason.

    `extents` is the highest position plus one of each source file.
    """

    ranks: Counter[int] = field(default_factory=Counter)
    given_test: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    extents: dict[int, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """The counts as text, to travel in a table."""
        return json.dumps([list(self.ranks.items()), self.given_test, self.rejected, list(self.extents.items())])

    def __str__(self) -> str:
        rejected = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        return f"{self.ranks.total()} usable for the splits, rejected: {rejected or 'none'}"

    def add(self, text: str) -> None:
        """Adds the counts of another tally, given as its `to_json`."""
        ranks, given_test, rejected, extents = json.loads(text)
        self.ranks.update(dict(ranks))
        self.given_test += given_test
        self.rejected.update(rejected)
        for file, extent in extents:
            self.extents[file] = max(self.extents.get(file, 0), extent)


def tally_rows(rows: pa.Table, seed: int) -> pa.Table:
    """One row with the `Tally` of a table, in a column ``tally``."""
    tally = Tally()
    for group, reason, is_test, file, position in _columns(rows, "group", "reason", "is_test", "file", "position"):
        tally.extents[file] = max(tally.extents.get(file, 0), position + 1)
        if reason is not None:
            tally.rejected[reason_name(reason)] += 1
        elif is_test:
            tally.given_test += 1
        else:
            tally.ranks[rank(group, seed)] += 1
    return pa.table({"tally": [tally.to_json()]})


def _columns(rows: pa.Table, *names: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(rows.column(name).to_pylist() for name in names), strict=True)


def rank(group: str, seed: int) -> int:
    """Rank of a group, 0 to 65,535, uniform over groups and another for each seed."""
    return int(short_hash(f"{seed}:{group}")[:4], 16)


@dataclass(frozen=True)
class Cuts:
    """Ranks below `test` are the test split, from there below `validation` the validation, the rest is trained on."""

    test: int
    validation: int

    def split_of(self, place: int) -> str:
        """The split of a rank."""
        return "test" if place < self.test else "validation" if place < self.validation else "train"


def find_cuts(ranks: Mapping[int, int], *, test_split: float, validation_split: float) -> Cuts:
    """The cuts that come nearest to the wanted shares of all rows.

    Args:
        ranks: usable rows per rank.
        test_split: wanted share for the test.
        validation_split: wanted share for validation.
    """
    total = sum(ranks.values())
    test = _cut(ranks, int(total * test_split + 0.5))
    both = _cut(ranks, int(total * test_split + 0.5) + int(total * validation_split + 0.5))
    return Cuts(test, max(test, both))


def _cut(ranks: Mapping[int, int], wanted: int) -> int:
    below = 0
    for place in sorted(ranks):
        if below >= wanted:
            return place
        after = below + ranks[place]
        if after >= wanted:
            return place + 1 if after - wanted <= wanted - below else place
        below = after
    return max(ranks, default=-1) + 1


def mark_leaks(rows: pa.Table) -> pa.Table:
    """The table with a reason on every row of `sources` whose prompt also stands in `test_sources`.

    Rows of one prompt must all be in the table.
    """
    tested = {
        group for group, reason, is_test in _columns(rows, "group", "reason", "is_test") if is_test and reason is None
    }
    reasons = [
        "prompt is in test_sources" if group in tested and not is_test else None
        for group, is_test in _columns(rows, "group", "is_test")
    ]
    return mark(rows, reasons)


def departures(rows: Mapping[str, int]) -> list[str]:
    """What to warn about: shares outside the guide's ranges.

    Args:
        rows: usable rows per split that was drawn from `sources`.
    """
    total = sum(rows.values())
    found = []
    for split, count in rows.items():
        low, high = GUIDE[split]
        share = count / total
        if not low - _TOLERANCE <= share <= high + _TOLERANCE:
            found.append(f"{split} is {share:.1%} of the rows; the guide recommends {low:.0%} to {high:.0%}")
    return found
