"""Tables in parts, as the passes over all rows see them: in a list here, in the cluster's memory in run.py.

A pass is written once against `Blocks`. Which parts there are, and where they lie, cannot change what it gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.data.shingles import mixed

Step = Callable[..., pa.Table | Iterable[pa.Table]]


class Blocks(Protocol):
    """Rows in parts. Functions get a part as one table and give a table, or several that make up the part."""

    def map(self, function: Step, /, **settings: Any) -> Blocks:
        """Each part passed through `function`, a name of the top level, with `settings`."""

    def by_key(self, key: str) -> Blocks:
        """The rows with all that have one value of `key` in one part."""

    def together(self) -> Blocks:
        """All rows in one part; only for what is known to be small."""

    def union(self, other: Blocks) -> Blocks:
        """The rows of both, of one schema."""

    def kept(self) -> Blocks:
        """The rows computed once, for more than one reader."""

    def rows(self) -> int:
        """How many rows there are."""

    def size(self) -> int:
        """How many bytes they take."""

    def table(self) -> pa.Table:
        """All rows, here; only for a few numbers of each part."""

    def joined(self, labels: Blocks, key: str, function: Step, /, **settings: Any) -> Blocks:
        """Each part passed through `function` with, second, all rows of `labels` whose `key` it may hold.

        The parts of these rows must be ranges of `key`, as `by_key` makes them.
        """


class LocalBlocks:
    """`Blocks` in this process."""

    def __init__(self, parts: Sequence[pa.Table]) -> None:
        self.parts = list(parts)

    def map(self, function: Step, /, **settings: Any) -> LocalBlocks:
        """See `Blocks.map`."""
        return LocalBlocks([as_table(function(part, **settings)) for part in self.parts])

    def by_key(self, key: str) -> LocalBlocks:
        """As many parts as there were, cut where the value of `key` changes."""
        table = self.table()
        if len(self.parts) == 1:
            return LocalBlocks([table])
        table = table.sort_by(key)
        values = table.column(key).to_numpy()
        wanted = [len(values) * number // len(self.parts) for number in range(1, len(self.parts))]
        cuts = [0, *(int(np.searchsorted(values, values[at])) if len(values) else 0 for at in wanted), len(values)]
        return LocalBlocks([table.slice(low, high - low) for low, high in itertools.pairwise(cuts)])

    def together(self) -> LocalBlocks:
        """See `Blocks.together`."""
        return LocalBlocks([self.table()])

    def union(self, other: Blocks) -> LocalBlocks:
        """The parts of both, one by one."""
        assert isinstance(other, LocalBlocks)
        if len(self.parts) == len(other.parts) == 1:
            return LocalBlocks([pa.concat_tables([*self.parts, *other.parts])])
        return LocalBlocks([*self.parts, *other.parts])

    def kept(self) -> LocalBlocks:
        """These: they are computed."""
        return self

    def rows(self) -> int:
        """See `Blocks.rows`."""
        return sum(part.num_rows for part in self.parts)

    def size(self) -> int:
        """See `Blocks.size`."""
        return sum(part.nbytes for part in self.parts)

    def joined(self, labels: Blocks, key: str, function: Step, /, **settings: Any) -> LocalBlocks:
        """See `Blocks.joined`."""
        assert isinstance(labels, LocalBlocks)
        table = labels.table()
        return LocalBlocks([as_table(function(part, table, **settings)) for part in self.parts])

    def table(self) -> pa.Table:
        """See `Blocks.table`."""
        return pa.concat_tables(self.parts)


def as_table(given: pa.Table | Iterable[pa.Table]) -> pa.Table:
    """One table of what a step gave."""
    return given if isinstance(given, pa.Table) else pa.concat_tables(given)


def within(table: pa.Table, key: str, low: int, high: int) -> pa.Table:
    """The rows whose `key` is from `low` to `high`, both included."""
    column = table.column(key)
    return table.filter(pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high)))


def packed(table: pa.Table, key: str, buckets: int) -> pa.Table:
    """The rows by bucket, a hash of their `key` (integers): one row a `bucket`, its rows in Arrow's own bytes.

    Ray Data moves a few large values much faster than it sorts many rows.
    """
    number = (mixed(table.column(key).to_numpy().view(np.uint64)) % np.uint64(buckets)).astype(np.int64)
    table = table.take(np.argsort(number, kind="stable"))
    found, starts = np.unique(np.sort(number), return_index=True)
    pieces = [table.slice(low, high - low) for low, high in itertools.pairwise([*starts, len(number)])]
    return pa.table([pa.array(found), pa.array(map(_as_bytes, pieces), pa.large_binary())], names=["bucket", "rows"])


def _as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def unpacked(table: pa.Table) -> pa.Table:
    """The rows in `packed` buckets; all of a bucket must be in the table."""
    return pa.concat_tables([pa.ipc.open_stream(value.as_buffer()).read_all() for value in table.column("rows")])


def key_range(table: pa.Table, key: str) -> tuple[int, int] | None:
    """The least and the greatest `key` of a table; None if it has no rows."""
    if not table.num_rows:
        return None
    ends = pc.min_max(table.column(key)).as_py()
    return int(ends["min"]), int(ends["max"])


def reaches(ends: tuple[int, int] | None, low: int, high: int) -> bool:
    """Whether a range has keys from `low` to `high`."""
    return ends is not None and ends[0] <= high and ends[1] >= low


def pass_here(table: pa.Table, run: Callable[..., Blocks], settings: dict[str, Any]) -> pa.Table:
    """A pass over `Blocks`, in this process over one part."""
    return run(LocalBlocks([table]), **settings).table()
