"""Where rows meet model actors: shards of records spread by Ray Data over copies of a model, or over an endpoint."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pyarrow as pa
import ray
import ray.data

from raytune_ft.core import cluster
from raytune_ft.core.cluster import Cluster, own_error
from raytune_ft.core.errors import RaytuneError, RunError, last_line
from raytune_ft.core.grammar import number_of
from raytune_ft.core.placement import Demand, ResourcePlan
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.kept import KeptRows, Row, is_answered
from raytune_ft.evaluation.leakage import UNREADABLE, RowIndex, find_leaks, first_of_each
from raytune_ft.evaluation.prompts import read_shards
from raytune_ft.evaluation.shards import ShardActor, close_shard, fault_in, shard_table
from raytune_ft.evaluation.workload import Target, Workload, grouped

logger = logging.getLogger("raytune_ft")

T = TypeVar("T")


@dataclass
class Account:
    """What became of the rows of a run; it grows with the shards, not with the rows."""

    answered: int = 0
    failed: int = 0
    tokens: int = 0
    cut_off: int = 0
    shards: set[tuple[str, str]] = field(default_factory=set)
    failures: set[tuple[str, str]] = field(default_factory=set)
    """The shards in which rows stay without an answer."""

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row of `DONE_SCHEMA`."""
        self.shards.add((row["target"], row["shard"]))
        if row["failed"]:
            self.failures.add((row["target"], row["shard"]))
        for name in ("answered", "failed", "tokens", "cut_off"):
            setattr(self, name, getattr(self, name) + (row[name] or 0))


_LEAST_ROWS, _MOST_ROWS = 64, 512
"""Rows of a shard: many, since generation sorts them by length, yet some, so that progress shows."""
_READERS = 4
"""Files that are read at the same time."""
_BLOCK_BYTES = 128 << 10
"""Size of Ray Data's blocks of prompts: about a shard."""


def ask(
    records: Sequence[Record],
    targets: Sequence[Target],
    work: Workload,
    kept: KeptRows,
    *,
    num_actors: int | None,
    what: str,
) -> None:
    """Has every target answer the records that it has not answered yet; the rows lie in `kept` afterwards.

    Raises:
        RaytuneError: as `infer`.
    """
    for group in grouped(targets):
        left = {target.label: _left(records, kept.all_answered(target.label)) for target in group}
        rows = sum(map(len, left.values()))
        labels = ", ".join(left)
        if not rows:
            logger.info("%s of %s: found all %d rows of an earlier attempt", what.capitalize(), labels, len(records))
            continue
        connected = cluster.connect()
        copies, size = shares(copies_of(connected, group, num_actors), rows, even=num_actors is not None)
        shards = (
            _shard(records, places[start : start + size], label)
            for label, places in left.items()
            for start in range(0, len(places), size)
        )
        dataset = ray.data.from_arrow_refs(list(map(ray.put, shards)))  # the object store spills, this process cannot
        infer(dataset, group, work, kept, connected, copies=copies, what=f"{what} of {labels}")


def ask_files(
    files: Sequence[Location],
    target: Target,
    work: Workload,
    kept: KeptRows,
    *,
    num_actors: int | None,
    what: str,
) -> Account:
    """Has a target answer every prompt of some files, which are read where the cluster works.

    Raises:
        DataError: if a row is no prompt.
        RaytuneError: as `infer`.
    """
    connected = cluster.connect()
    numbered = [pa.table({"number": [number], "uri": [file.uri]}) for number, file in enumerate(files)]
    dataset = ray.data.from_arrow(numbered)
    # Else a block would gather many shards, and one actor would have to work them all off.
    dataset.context.target_max_block_size = _BLOCK_BYTES
    dataset = dataset.map_batches(
        _read_shards,
        fn_kwargs={"target": target.label},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,  # the models may hold every CPU
        compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(files))),
    )
    return infer(
        dataset,
        [target],
        work,
        kept,
        connected,
        copies=copies_of(connected, [target], num_actors),
        what=what,
    )


def _read_shards(files: pa.Table, target: str) -> Iterator[pa.Table]:
    """As `read_shards`, in a process of Ray's, whose lines the driver says."""
    cluster.report_to_driver()
    yield from read_shards(files, target)


def on_worker(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` gives on a worker of the cluster, with a GPU where there are any.

    Raises:
        RaytuneError: that `function` raises, as it said it.
    """
    connected = cluster.connect()
    remote: Any = ray.remote(num_cpus=1, num_gpus=1 if connected.gpus else 0)(function)
    with cluster.own_errors():
        return ray.get(remote.remote(*arguments))  # type: ignore[no-any-return]


def over_on_worker(function: Callable[..., T], *arguments: Any, chunks: Iterable[Any]) -> T:
    """What `function` gives on a worker (see `on_worker`) for its arguments and an iterator over chunks of data.

    The chunks go there one by one: neither here nor there are all of them in a process's memory.
    """
    cluster.connect()
    references = [ray.put(chunk) for chunk in chunks]
    found: T = on_worker(_over, function, arguments, references)
    return found


def _over(function: Callable[..., Any], arguments: Sequence[Any], references: Sequence[Any]) -> Any:
    return function(*arguments, map(ray.get, references))


def leaks_in(files: Sequence[Location], index: RowIndex) -> tuple[list[dict[str, Any]], list[str]]:
    """What the training rows of some files give away of the indexed test rows, one entry a test row; and why some of
    the files could not be looked into."""
    cluster.connect()
    dataset = ray.data.from_arrow([pa.table({"uri": [file.uri]}) for file in files])
    looked = dataset.map_batches(find_leaks, fn_args=(index,), batch_size=1, batch_format="pyarrow", num_cpus=1)
    with cluster.own_errors():
        tables = [table.to_pylist() for table in looked.iter_batches(batch_size=None, batch_format="pyarrow")]
    found = [row for rows in tables for row in rows]
    leaks = first_of_each([row for row in found if row["kind"] != UNREADABLE])
    return leaks, sorted(row["where"] for row in found if row["kind"] == UNREADABLE)


def close_shards(shards: Sequence[str], kept: KeptRows, target: Target, where: Location) -> None:
    """Writes the rows of each shard, in order, into a file of their own at `where`.

    Raises:
        ArtifactError: if storage does not take them.
    """
    cluster.connect()
    dataset = ray.data.from_arrow([pa.table({"shard": [shard]}) for shard in shards])
    closed = dataset.map_batches(
        close_shard, fn_args=(kept, target.label, where), batch_size=16, batch_format="pyarrow", num_cpus=0.5
    )
    faults = [
        fault_in(row)
        for table in closed.iter_batches(batch_size=None, batch_format="pyarrow")
        for row in table.select(["fault"]).to_pylist()
    ]
    for fault in filter(None, faults):
        raise fault


def shares(copies: int, rows: int, *, even: bool) -> tuple[int, int]:
    """How many actors, and how many rows a shard has; no actor without rows.

    Args:
        copies: actors that there may be.
        rows: to share.
        even: whether every actor is to have work, however few rows there are.
    """
    size = min(max(math.ceil(rows / copies), _LEAST_ROWS), _MOST_ROWS)
    if even:
        size = min(size, math.ceil(rows / copies))
    return min(copies, math.ceil(rows / size)), size


def _left(records: Sequence[Record], there: Mapping[int, Row]) -> Sequence[int]:
    """The places of the records that are not answered yet."""
    return array("q", (place for place, record in enumerate(records) if not is_answered(record, there.get(place))))


def _shard(records: Sequence[Record], places: Sequence[int], target: str) -> pa.Table:
    """A shard of the records at some places."""
    return shard_table([replace(records[place], position=place) for place in places], target, f"{places[0]:09d}")


def copies_of(connected: Cluster, targets: Sequence[Target], wanted: int | None) -> int:
    """Actors for a group of targets: for models as many as asked for, or as there are GPUs, or one less than CPUs.

    An endpoint needs one, since its requests wait on the network.
    """
    if targets[0].is_endpoint:
        return wanted or 1
    return wanted or int(connected.gpus or max(1, connected.cpus - 1))


class ModelActor(ShardActor):
    """A `ShardActor` in a process of Ray's, whose lines the driver says."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        cluster.report_to_driver()
        super().__init__(*given, **settings)


def infer(
    dataset: Any,
    targets: Sequence[Target],
    work: Workload,
    kept: KeptRows,
    connected: Cluster,
    *,
    copies: int,
    what: str,
) -> Account:
    """Sends every shard through the actors; the rows lie in `kept` afterwards.

    A killed actor is started again, and goes on with what is left of its shard.

    Args:
        dataset: a Ray dataset of `SHARD_SCHEMA`.
        targets: one of `workload.grouped`'s groups.
        work: what each row is to come back with.
        kept: where rows are kept.
        connected: the cluster.
        copies: actors.
        what: the run, for messages.

    Raises:
        ClusterError: if the cluster cannot place the actors.
        RaytuneError: what an actor refuses, in its own words.
        RunError: if the actors fail otherwise.
    """
    remote = targets[0].is_endpoint
    gpus = 1 if connected.gpus and not remote else 0
    threads = 1 if remote else max(1, int(connected.cpus // copies))
    connected.admit(ResourcePlan(what, (Demand("client" if remote else "model", copies, 1, gpus, threads),)))
    concurrency = max(1, work.endpoint.concurrency // copies)
    dataset.context.raise_original_map_exception = True
    outcome = dataset.map_batches(
        ModelActor,
        fn_constructor_args=(targets, work, kept.where.uri),
        fn_constructor_kwargs={"threads": threads, "concurrency": concurrency, "copies": copies},
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=copies),
        num_cpus=1,
        num_gpus=gpus,
    )
    return _accounted(outcome, what)


def _accounted(outcome: Any, what: str) -> Account:
    """Runs what was planned, and counts the rows as they come."""
    account = Account()
    fault: RaytuneError | None = None
    try:
        # A batch that is fetched ahead would hold back the news of the one before.
        for table in outcome.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                fault = fault or fault_in(row)
                account.add(row)
            if fault is not None:
                break  # the other shards would be worked off for a run that has failed
            failed = f", {account.failed} without an answer" if account.failed else ""
            logger.info("%s: %s%s", what.capitalize(), number_of(account.answered, "row"), failed)
    except Exception as error:  # noqa: BLE001 - whatever Ray wraps a fault in: it is unwrapped and raised again
        fault = own_error(error)
        if fault is None:
            fault = RunError(f"{what} failed: {last_line(error)}")
    if fault is not None:
        # Raised here, so that it does not hold Ray's exception, nor that the actors with their CPUs.
        raise fault
    return account
