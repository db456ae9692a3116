"""A shard of rows through a scorer onto storage: what an actor does, whatever runs it.

Every row is kept soon after it is done, so that a killed actor loses seconds of work; an actor that takes a shard up
again asks storage first what is left of it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pyarrow as pa

from raytune_ft.core import errors
from raytune_ft.core.errors import RaytuneError
from raytune_ft.core.records import RECORD_SCHEMA, Record, records_to_table, table_to_records
from raytune_ft.core.refusals import told_in_words
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.kept import GOES_ON, KeptRows, Row, is_answered
from raytune_ft.evaluation.record_files import under_own_id
from raytune_ft.evaluation.scorer import Scorer, load_scorer
from raytune_ft.evaluation.workload import Target, Workload

logger = logging.getLogger("raytune_ft")

SHARD_SCHEMA = pa.schema([*RECORD_SCHEMA, *((name, pa.string()) for name in ("target", "shard", "fault"))])
"""Records with the label of the target that is to answer them, and the name of the shard that they belong to; or, in
place of a shard that could not be read, the error as `fault` (JSON), and no record."""

DONE_SCHEMA = pa.schema(
    [
        ("target", pa.string()),
        ("shard", pa.string()),
        ("answered", pa.int64()),
        ("failed", pa.int64()),
        ("tokens", pa.int64()),
        ("cut_off", pa.int64()),
        ("fault", pa.string()),
    ]
)
"""What became of a shard. `fault` is the error that ended it, as JSON, null where it was worked off."""


def shard_table(records: Sequence[Record], target: str, shard: str) -> Any:
    """A table of `SHARD_SCHEMA`."""
    table = records_to_table(records)
    for value in (target, shard, None):
        name = SHARD_SCHEMA.names[table.num_columns]
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def fault_table(error: RaytuneError, target: str, shard: str) -> Any:
    """A table of `SHARD_SCHEMA` that says why a shard could not be read."""
    return pa.Table.from_pylist([{"target": target, "shard": shard, "fault": _fault(error)}], schema=SHARD_SCHEMA)


def close_shard(shards: pa.Table, kept: KeptRows, target: str, where: Location) -> pa.Table:
    """Writes the rows of each shard (column ``shard``), in order, to ``<shard>.jsonl`` at `where`.

    Returns:
        The shards, with the error that ended this as `fault` (JSON), null where there was none.
    """
    fault = None
    try:
        for shard in shards.column("shard").to_pylist():
            rows = {**kept.failed(target, shard), **kept.answered(target, shard)}
            lines = [json.dumps(under_own_id(row), ensure_ascii=False) + "\n" for _, row in sorted(rows.items())]
            with told_in_words(where, GOES_ON):
                (where / f"{shard}.jsonl").write("".join(lines).encode())
    except RaytuneError as error:
        fault = _fault(error)
    return shards.append_column("fault", pa.array([fault] * shards.num_rows, pa.string()))


_KEEP_ROWS, _KEEP_S = 64, 15.0
TELL_S = 15.0
"""Seconds between an actor's words on a shard that takes long, where there is one actor; with more, each says less."""


class Keeper:
    """Gathers done rows and puts them on storage, a piece at a time; says now and then how far it is."""

    def __init__(self, kept: KeptRows, target: str, shard: str, expected: int, tell_s: float) -> None:
        self._kept, self._place = kept, (target, shard)
        self._rows: list[Row] = []
        self._since = self._told = time.monotonic()
        self._done, self._expected, self._tell_s = 0, expected, tell_s
        self.failed: list[Row] = []

    def take(self, rows: Sequence[Row]) -> None:
        """Takes done rows; a piece is kept when it is large or old enough."""
        self._done += len(rows)
        if time.monotonic() - self._told >= self._tell_s and self._done < self._expected:
            logger.info("%s: %d of %d rows of a shard", self._place[0], self._done, self._expected)
            self._told = time.monotonic()
        self.failed += [row for row in rows if "error" in row]
        self._rows += [row for row in rows if "error" not in row]
        if len(self._rows) >= _KEEP_ROWS or time.monotonic() - self._since > _KEEP_S:
            self.flush()

    def flush(self) -> None:
        """Keeps what was taken."""
        self._kept.keep(*self._place, self._rows)
        self._rows, self._since = [], time.monotonic()


def work_off(
    scorer: Scorer, kept: KeptRows, target: str, shard: str, records: Sequence[Record], *, tell_s: float = TELL_S
) -> dict[str, Any]:
    """Measures what is left of a shard, saying how far it is every so many seconds; its row of `DONE_SCHEMA`."""
    before = kept.answered(target, shard)
    left = [record for record in records if not is_answered(record, before.get(record.position))]
    keeper = Keeper(kept, target, shard, len(left), tell_s)
    if left:
        try:
            scorer.measure(target, left, keeper.take)
        finally:
            keeper.flush()
    kept.keep_failed(target, shard, min(record.position for record in records), keeper.failed)
    all_there = kept.answered(target, shard)
    there = [all_there[record.position] for record in records if record.position in all_there]
    return {
        "target": target,
        "shard": shard,
        "answered": len(there),
        "failed": len(keeper.failed),
        "tokens": sum(row.get("answer_tokens") or 0 for row in there),
        "cut_off": sum(row.get("finish_reason") == "length" for row in there),
        "fault": None,
    }


class ShardActor:
    """A scorer as Ray Data's actors hold it: its faults come back as rows, not as exceptions.

    An exception would leave Ray Data in the middle of its work: a wall of its traceback on the screen, and its actors
    holding their CPUs for as long as anything remembers the exception.
    """

    def __init__(
        self, targets: Sequence[Target], work: Workload, where: str, *, threads: int, concurrency: int, copies: int = 1
    ) -> None:
        """Loads what answers; `copies` is how many such actors there are."""
        self.kept, self.tell_s = KeptRows(Location(where)), TELL_S * copies
        self.fault: RaytuneError | None = None
        try:
            self.scorer = load_scorer(targets, work, threads=threads, concurrency=concurrency)
        except RaytuneError as error:
            self.fault = error  # told with the first rows: what an actor's constructor raises reaches nobody whole

    def __call__(self, table: pa.Table) -> pa.Table:
        """A table of `SHARD_SCHEMA` to one of `DONE_SCHEMA`, one row a shard."""
        done: list[dict[str, Any]] = []
        keys = zip(*(table.column(name).to_pylist() for name in ("target", "shard", "fault")), strict=True)
        start = 0
        for (target, shard, unread), same in groupby(keys):
            if unread is not None:
                done.append({"target": target, "shard": shard, "answered": 0, "failed": 0, "fault": unread})
                break
            size = len(list(same))
            records = table_to_records(table.slice(start, size))
            start += size
            try:
                if self.fault is not None:
                    raise self.fault
                done.append(work_off(self.scorer, self.kept, target, shard, records, tell_s=self.tell_s))
            except RaytuneError as error:
                done.append({"target": target, "shard": shard, "answered": 0, "failed": 0, "fault": _fault(error)})
                break
        return pa.Table.from_pylist(done, schema=DONE_SCHEMA)


def _fault(error: RaytuneError) -> str:
    return json.dumps([type(error).__name__, str(error)])


def fault_in(row: dict[str, Any]) -> RaytuneError | None:
    """The error that the column `fault` of a row tells of; None for a shard that was worked off."""
    if row["fault"] is None:
        return None
    name, message = json.loads(row["fault"])
    return getattr(errors, name)(message)  # type: ignore[no-any-return]
