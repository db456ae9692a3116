"""Tables in Ray Data: a function over each block, all rows of a key together, `Blocks` that shuffle, one context."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raytune_ft.core.cluster import Cluster, connect, own_error
from raytune_ft.core.errors import UserError
from raytune_ft.data.blocks import Blocks, Step, key_range, packed, pass_here, reaches, unpacked, within

_TRIES = re.compile(r"\nFailed to .* after \d+/\d+ attempts \(total backoff")


class RayBlocks:
    """`Blocks` in the cluster's memory, shuffled by Ray Data."""

    def __init__(self, dataset: Any, parts: int) -> None:
        self.dataset = dataset
        self.parts = parts

    def _of(self, dataset: Any) -> RayBlocks:
        return RayBlocks(dataset, self.parts)

    def map(self, function: Step, /, **settings: Any) -> RayBlocks:
        """See `Blocks.map`."""
        return self._of(mapped(self.dataset, stepped, step=function, settings=settings))

    def by_key(self, key: str) -> RayBlocks:
        """See `Blocks.by_key`; rows travel in buckets."""
        buckets = mapped(self.dataset, stepped, step=packed, settings={"key": key, "buckets": 4 * self.parts})
        buckets = buckets.materialize()
        if not buckets.count():
            return self._of(buckets)
        return self._of(mapped(buckets.sort("bucket"), stepped, step=unpacked, settings={}))

    def together(self) -> RayBlocks:
        """See `Blocks.together`."""
        return self._of(self.dataset.repartition(1))

    def union(self, other: Blocks) -> RayBlocks:
        """See `Blocks.union`."""
        assert isinstance(other, RayBlocks)
        return self._of(self.dataset.union(other.dataset))

    def kept(self) -> RayBlocks:
        """See `Blocks.kept`."""
        return self._of(self.dataset.materialize())

    def rows(self) -> int:
        """See `Blocks.rows`."""
        return int(self.dataset.count())

    def size(self) -> int:
        """See `Blocks.size`."""
        return int(self.dataset.size_bytes())

    def table(self) -> pa.Table:
        """See `Blocks.table`."""
        return pa.Table.from_pylist(self.dataset.take_all())

    def joined(self, labels: Blocks, key: str, function: Step, /, **settings: Any) -> RayBlocks:
        """Each part fetches only the parts of `labels` whose keys reach into its own range."""
        assert isinstance(labels, RayBlocks)
        found = labels.dataset.materialize()
        if found.num_blocks() > 1:
            found = all_by_key(found, key, self.parts).materialize()
        refs = found.to_arrow_refs()
        ends = ray.get([ray.remote(key_range).remote(ref, key) for ref in refs])
        where = {"refs": refs, "ends": ends, "key": key}
        return self._of(mapped(self.dataset, stepped, step=function, settings=settings, **where))


def spread(tables: Sequence[pa.Table]) -> Any:
    """A Ray Data dataset of the tables, a block each."""
    return ray.data.from_arrow(list(tables))


def stepped(
    rows: pa.Table, *, step: Step, settings: Any, refs: Any = None, ends: Any = None, key: str | None = None
) -> Iterator[pa.Table]:
    """A step over one block, with the tables behind `refs` (those whose `ends` reach into the block's range)."""
    if not rows.num_rows:  # a block that no key fell into: it may have no columns either
        yield rows
        return
    tables = []
    if refs is not None:
        low, high = (key_range(rows, key) if key else None) or (0, 0)
        wanted = [ref for place, ref in enumerate(refs) if ends is None or reaches(ends[place], low, high)]
        found = pa.concat_tables(ray.get(wanted or refs[:1]))
        tables = [within(found, key, low, high) if key else found]
    given = step(rows, *tables, **settings)
    yield from [given] if isinstance(given, pa.Table) else given


def passed(rows: Any, parts: int, function: Any, **settings: Any) -> Any:
    """A pass over `Blocks`: in one task where the rows are one part, else by shuffles."""
    if parts == 1:
        return mapped(rows, pass_here, run=function, settings=settings)
    return function(RayBlocks(rows, parts), **settings).dataset


def mapped(rows: Any, function: Any, **settings: Any) -> Any:
    """A Ray Data dataset with `function`, called with each block as an Arrow table and the settings, still to run."""
    return rows.map_batches(function, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs=settings)


def all_by_key(rows: Any, key: str, partitions: int) -> Any:
    """All rows of one key in one block: all rows in one, or sorted into `partitions` blocks, which splits no key.

    Ray's hash shuffle starts processes of its own for each of its steps, which takes longer than this sort.
    """
    return rows.repartition(1) if partitions == 1 else rows.repartition(partitions).sort(key)


@contextmanager
def ray_data() -> Iterator[Cluster]:
    """The cluster with Ray Data quiet; a mistake of the user's that a task raised comes out as itself."""
    cluster = connect()
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.raise_original_map_exception, context.shuffle_strategy
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    context.shuffle_strategy = ray.data.context.ShuffleStrategy.SORT_SHUFFLE_PULL_BASED
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__module__.startswith("ray._private"):  # its console; the session's log file keeps all
            handler.setLevel(logging.CRITICAL)
    try:
        yield cluster
    except Exception as error:
        mistake = own_error(error)
        if not isinstance(mistake, UserError):
            raise
        # Ray Data appends to the message how often it tried.
        mistake.args = (_TRIES.split(str(mistake), maxsplit=1)[0], *mistake.args[1:])
        raise mistake from None
    finally:
        context.enable_progress_bars, context.raise_original_map_exception, context.shuffle_strategy = before
