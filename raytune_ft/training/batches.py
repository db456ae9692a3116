"""Which rows make up which step: a function of (seed, step) only, the same for any number of workers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import agreeing
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch, group_by_budget, pack_flat
from raytune_ft.training.copies import local_copy

logger = logging.getLogger("raytune_ft")

Batch = TypeVar("Batch")
LABEL = "label"
"""Column that says whether people liked an answer; null where nobody was asked."""
_AT_ONCE = 4096
"""Rows that are looked at together."""


class NoExampleError(DataError):
    """All rows of a split are answers that people disliked."""


class Rows(Protocol):
    """Tokenized rows, read one at a time (`TokenRows`, or a list)."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Encoded: ...


class TokenRows:
    """Tokenized rows of a split, mapped into memory from Parquet files; rows are read when they are used.

    Answers that people disliked (label false) are no examples: they are left out, and counted in `disliked`.
    """

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "supervised")
    """What is read of the files."""

    def __init__(self, files: Sequence[str], cache_dir: str) -> None:
        """Opens the files, wherever they lie.

        Raises:
            NoExampleError: if there is no row but disliked answers.
            ArtifactError: if a file cannot be fetched.
        """
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        here = [local_copy(file) for file in files]
        labelled = LABEL in pq.read_schema(here[0]).names
        columns = [*self.columns, *([LABEL] if labelled and LABEL not in self.columns else [])]
        rows: Any = Dataset.from_parquet(here, columns=columns, cache_dir=cache_dir)
        self.disliked = 0
        self.row_lengths = _longest_of(rows.data)
        """[rows] tokens of each row; of those that belong together, such as a pair's, those of the longer one."""
        if labelled and LABEL not in self.columns:
            liked = pc.fill_null(rows.data.column(LABEL), fill_value=True).to_numpy()
            self.disliked = int(len(liked) - liked.sum())
            if self.disliked == len(liked):
                who = agreeing(len(liked), "its only row is an answer", f"all {len(liked)} rows are answers")
                raise NoExampleError(
                    f"{files[0]}: {who} that people disliked: there is no example to learn from. `raytune-ft align` "
                    "with loss_type: kto learns from such rows"
                )
            if self.disliked:
                rows = rows.select(np.flatnonzero(liked))
                self.row_lengths = self.row_lengths[np.flatnonzero(liked)]
        self._rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Encoded:
        ids, supervised, _ = self.flat([number])
        return Encoded(ids.tolist(), supervised.tolist())

    def packed(self, numbers: Sequence[int]) -> PackedBatch:
        """These rows laid end to end, without a Python object for each token."""
        return pack_flat(*self.flat(numbers))

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Tokens of these rows, which are not read for it."""
        found: list[int] = pc.list_value_length(self._rows[list(numbers)]["input_ids"]).to_pylist()
        return found

    def flat(self, numbers: Sequence[int], prefix: str = "") -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[Any]]:
        """Token ids, which of them are supervised, and the rows' lengths; `prefix` is of the columns' names."""
        table = self._rows[list(numbers)]
        ids, supervised = (table[prefix + name].combine_chunks() for name in ("input_ids", "supervised"))
        return (
            ids.flatten().to_numpy(),
            supervised.flatten().to_numpy(zero_copy_only=False),  # Arrow keeps booleans as bits
            ids.value_lengths().to_numpy(),
        )


class PromptRows(TokenRows):
    """Rows that are to be answered anew; those without an answer may have a `reference`."""

    columns: ClassVar[tuple[str, ...]] = (*TokenRows.columns, "reference")

    def reference(self, number: int) -> str | None:
        """What would be right, in words, where the row says so."""
        found: str | None = self._rows[[number]]["reference"].to_pylist()[0]
        return found

    def unjudged(self) -> list[int]:
        """Numbers of the rows that have neither an answer nor a reference."""
        found: list[int] = []
        for numbers in self.parts():
            unknown = self._rows[list(numbers)]["reference"].is_null().to_numpy()
            if unknown.any():
                _, supervised, lengths = self.flat(numbers)
                answered = np.bitwise_or.reduceat(supervised, np.cumsum(lengths) - lengths)
                found += (numbers.start + np.flatnonzero(unknown & ~answered)).tolist()
        return found

    def read(self, numbers: Sequence[int]) -> list[tuple[Encoded, str | None]]:
        """These rows, each with its reference, read together."""
        ids, supervised, lengths = self.flat(numbers)
        ends = np.cumsum(lengths)
        references = self._rows[list(numbers)]["reference"].to_pylist()
        return [
            (Encoded(ids[end - length : end].tolist(), supervised[end - length : end].tolist()), reference)
            for end, length, reference in zip(ends, lengths, references, strict=True)
        ]

    def parts(self) -> Iterator[range]:
        """The numbers of all rows, of which so many follow each other as are looked at together."""
        return (range(start, min(start + _AT_ONCE, len(self))) for start in range(0, len(self), _AT_ONCE))


def _longest_of(table: Any) -> NDArray[Any]:
    columns = [name for name in table.column_names if name.endswith("input_ids")]
    lengths = [pc.fill_null(pc.list_value_length(table.column(name)), 0).to_numpy() for name in columns]
    return np.asarray(np.maximum.reduce(lengths))


def step_rows(rows: int, batch_size: int, seed: int, *, start: int = 0) -> Iterator[list[int]]:
    """Row numbers of each step after `start`, without end: every epoch is a new order of all rows.

    The last batch of an epoch has the rows that are left, and no row twice.
    """
    per_epoch = -(-rows // batch_size)
    epoch, place = divmod(start, per_epoch)
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        while place < per_epoch:
            yield order[place * batch_size : (place + 1) * batch_size].tolist()
            place += 1
        epoch, place = epoch + 1, 0


def rank_share(rows: Sequence[int], rank: int, world_size: int, micro_batches: int) -> list[list[int]]:
    """The rows of one rank in a step, in `micro_batches` lists (some may be empty in an epoch's last step)."""
    mine = list(rows[rank::world_size])
    return [mine[number::micro_batches] for number in range(micro_batches)]


def within_budget(shares: Sequence[Sequence[int]], lengths: Mapping[int, int], token_budget: int) -> list[list[int]]:
    """The rows of each list in as few lists of at most `token_budget` tokens as it takes; a longer row has its own.

    Args:
        shares: row numbers.
        lengths: tokens of each row, by its number.
        token_budget: in tokens.
    """
    return [
        [share[place] for place in group]
        for share in shares
        for group in group_by_budget([lengths[row] for row in share], token_budget)
    ]


def packed_steps(
    data: TokenRows,
    batch_size: int,
    seed: int,
    *,
    start: int,
    rank: int,
    world_size: int,
    micro_batches: int,
    token_budget: int | None = None,
) -> Iterator[list[PackedBatch]]:
    """The micro-batches of one rank for each step after `start`, without end; all ranks have as many.

    A rank without rows gets a row without targets, so that all ranks take part in every reduction.

    Args:
        data: the rows.
        batch_size: rows of a step, over all ranks.
        seed: of their order.
        start: steps that were made before.
        rank: whose micro-batches.
        world_size: number of ranks.
        micro_batches: into how many parts the rows of a rank are divided.
        token_budget: most tokens of a micro-batch; those that have more are divided further (`within_budget`).
    """
    for rows in step_rows(len(data), batch_size, seed, start=start):
        place = {row: number for number, row in enumerate(rows)}
        shares = rank_share(rows, rank, world_size, micro_batches)
        if token_budget is not None:
            lengths = dict(zip(rows, data.lengths(rows), strict=True))
            everyone = [
                within_budget(rank_share(rows, other, world_size, micro_batches), lengths, token_budget)
                for other in range(world_size)
            ]
            shares = everyone[rank] + [[]] * (max(map(len, everyone)) - len(everyone[rank]))
        yield [
            data.packed(share).placed([place[row] for row in share])
            if share
            else data.packed(rows[:1]).without_targets()
            for share in shares
        ]


def say_disliked(splits: Mapping[str, TokenRows]) -> None:
    """Warns of rows that are left out because people disliked the answer."""
    found = [f"{rows.disliked} {split}" for split, rows in splits.items() if rows.disliked]
    if found:
        logger.warning(
            "%s rows are answers that people disliked: left out, since they are no examples (raytune-ft align with "
            "loss_type: kto learns from them)",
            " and ".join(found),
        )


def one_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the next one is made in a thread of its own while the last one is computed."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        coming = pool.submit(next, batches, end)
        while (batch := coming.result()) is not end:
            coming = pool.submit(next, batches, end)
            yield batch  # type: ignore[misc]


def evaluation_batches(
    data: TokenRows, batch_size: int, rank: int, world_size: int, numbers: Sequence[int] | None = None
) -> Iterator[PackedBatch]:
    """The rows of one rank (of all, or of those with these numbers), in batches; some of them without targets.

    Under ZeRO stage 3 a forward pass gathers weights from all ranks, so all get as many batches.
    """
    numbers = range(len(data)) if numbers is None else numbers
    mine = numbers[rank::world_size]
    longest = -(-len(numbers) // world_size)
    for first in range(0, longest, batch_size):
        some = mine[first : first + batch_size]
        yield data.packed(some) if some else data.packed([0]).without_targets()
