"""Which split a row falls into: told by a hash of seed and group, so that blocks and workers cannot change it.

Groups are ranked by hash within their stratum; the lowest ranks are the test, the next the validation. Where the cuts
lie is decided from counts per stratum and rank, at most a million numbers however many rows there are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from raytune_ft.core.digest import short_hash
from raytune_ft.data.rows import mark, reason_name

GUIDE = {"train": (0.80, 0.90), "validation": (0.10, 0.15), "test": (0.05, 0.10)}
"""Shares that the guide recommends."""

_TOLERANCE = 0.005
_RANK_DIGITS = 3


@dataclass
class Tally:
    """Counts that the split needs: usable rows of `sources` per stratum and rank, those of the test files, rejected.

    `extents` is the highest position plus one of each source file, `conflicting` the usable rows whose prompt has
    another answer elsewhere, `examples` one whole reason of each name that `rejected` counts.
    """

    ranks: dict[int, Counter[int]] = field(default_factory=dict)
    given_test: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    extents: dict[int, int] = field(default_factory=dict)
    conflicting: int = 0
    examples: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The counts as text, to travel in a table."""
        ranks = [[stratum, list(counts.items())] for stratum, counts in self.ranks.items()]
        extents = list(self.extents.items())
        return json.dumps([ranks, self.given_test, self.rejected, extents, self.conflicting, self.examples])

    @property
    def usable(self) -> int:
        """Rows that fall into the splits by their rank."""
        return sum(counts.total() for counts in self.ranks.values())

    def __str__(self) -> str:
        rejected = ", ".join(f"{count} {reason}" for reason, count in self.rejected.most_common())
        common = [self.examples[name] for name, _ in self.rejected.most_common(1)]
        example = f" (such as {common[0]!r})" if common else ""
        return f"{self.usable} usable for the splits, rejected: {rejected or 'none'}{example}"

    def reject(self, reason: str) -> None:
        """Counts a rejected row."""
        name = reason_name(reason)
        self.rejected[name] += 1
        self.examples[name] = min(reason, self.examples.get(name, reason))

    def add(self, text: str) -> None:
        """Adds the counts of another tally, given as its `to_json`."""
        ranks, given_test, rejected, extents, conflicting, examples = json.loads(text)
        for stratum, counts in ranks:
            self.ranks.setdefault(stratum, Counter()).update(dict(counts))
        self.given_test += given_test
        self.conflicting += conflicting
        self.rejected.update(rejected)
        for name, reason in examples.items():
            self.examples[name] = min(reason, self.examples.get(name, reason))
        for file, extent in extents:
            self.extents[file] = max(self.extents.get(file, 0), extent)


def tally_rows(rows: pa.Table, seed: int) -> pa.Table:
    """One row with the `Tally` of a table, in a column ``tally``."""
    tally = Tally()
    names = ("group", "stratum", "reason", "is_test", "file", "position", "conflicting")
    for group, stratum, reason, is_test, file, position, conflicting in _columns(rows, *names):
        tally.extents[file] = max(tally.extents.get(file, 0), position + 1)
        if reason is not None:
            tally.reject(reason)
            continue
        tally.conflicting += conflicting
        if is_test:
            tally.given_test += 1
        else:
            tally.ranks.setdefault(stratum, Counter())[rank(group, seed)] += 1
    return pa.table({"tally": [tally.to_json()]})


def _columns(rows: pa.Table, *names: str) -> Iterable[tuple[Any, ...]]:
    return zip(*(rows.column(name).to_pylist() for name in names), strict=True)


def rank(group: str, seed: int) -> int:
    """Rank of a group, 0 to 4,095, uniform over groups and another for each seed."""
    return int(short_hash(f"{seed}:{group}")[:_RANK_DIGITS], 16)


@dataclass(frozen=True)
class Cuts:
    """In a stratum, ranks below its first cut are the test, from there below the second the validation.

    The rest is trained on, and so are a stratum without cuts and ranks of a stratum that are `passed_over`.
    """

    by_stratum: Mapping[int, tuple[int, int]]
    passed_over: Mapping[int, frozenset[int]] = field(default_factory=dict)

    def split_of(self, stratum: int, place: int) -> str:
        """The split of a rank in a stratum."""
        if place in self.passed_over.get(stratum, ()):
            return "train"
        test, validation = self.by_stratum.get(stratum, (0, 0))
        return "test" if place < test else "validation" if place < validation else "train"


def find_cuts(ranks: Mapping[int, Mapping[int, int]], *, test_split: float, validation_split: float) -> Cuts:
    """The cuts that come nearest to the wanted shares in each stratum, and in all together.

    What one stratum, taken whole groups at a time, gets too much or too little of, the next makes up for; the large
    ones come first, since the small ones can make up for most. Ranks of more than twice as many rows as a split wants
    are trained on, whatever their place: else such a group would keep those behind it out of the other splits.

    Args:
        ranks: usable rows per stratum and rank.
        test_split: wanted share for the test.
        validation_split: wanted share for validation.
    """
    cuts, passed_over = {}, {}
    seen = tested = validated = 0
    for stratum, counts in sorted(ranks.items(), key=lambda item: (-sum(item[1].values()), item[0])):
        seen += sum(counts.values())
        wanted_test = int(seen * test_split + 0.5) - tested
        wanted = int(seen * validation_split + 0.5) - validated
        most = 2 * min((rows for rows in (wanted_test, wanted) if rows > 0), default=0)
        fitting = {place: count for place, count in counts.items() if count <= most}
        test = _cut(fitting, wanted_test)
        below_test = _below(fitting, test)
        both = max(test, _cut(fitting, below_test + max(wanted, 0)))
        tested += below_test
        validated += _below(fitting, both) - below_test
        cuts[stratum] = (test, both)
        large = frozenset(place for place in counts if place < both and place not in fitting)
        if large:
            passed_over[stratum] = large
    return Cuts(cuts, passed_over)


def _below(counts: Mapping[int, int], cut: int) -> int:
    return sum(count for place, count in counts.items() if place < cut)


def _cut(ranks: Mapping[int, int], wanted: int) -> int:
    if wanted <= 0:
        return 0
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
