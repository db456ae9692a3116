"""Preferences as batches: the chosen and the rejected row of each pair, with what the starting model says of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from raytune_ft.core.errors import DataError
from raytune_ft.core.grammar import agreeing, number_of
from raytune_ft.core.storage import Location
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch, pack_flat
from raytune_ft.training.batches import LABEL, TokenRows
from raytune_ft.training.reference import ScoredRows

REJECTED = "rejected_"
"""What the columns of a pair's rejected row begin with; the chosen one's are those of any row."""


_REJECTED_IDS = REJECTED + "input_ids"


@dataclass(frozen=True)
class PairBatch(PackedBatch):
    """Pairs in one padding-free sequence: row 2i is the chosen one of pair i, row 2i + 1 the rejected one."""

    reference: Tensor
    """[rows] float32, log-probability of each row's targets under the reference model, in nats."""

    stride: ClassVar[int] = 2

    @property
    def items(self) -> int:
        """What the loss is a mean over: the pairs, if they count at all."""
        return self.units if len(self.targets) else 0

    @property
    def units(self) -> int:
        """What can be computed apart: the pairs."""
        return self.rows // 2

    def part(self, first: int, last: int) -> Self:
        """The pairs from `first` to before `last`."""
        return replace(super().part(2 * first, 2 * last), reference=self.reference[2 * first : 2 * last])


class PairRows(ScoredRows):
    """Tokenized preferences of a split; a row alone is the chosen one.

    Supervised are the tokens of the two answers. Turns before them, which both rows have, count for nothing.
    """

    columns: ClassVar[tuple[str, ...]] = (*TokenRows.columns, *(REJECTED + name for name in TokenRows.columns))

    def packed(self, numbers: Sequence[int]) -> PairBatch:
        """These pairs laid end to end."""
        chosen, rejected = (rows_apart(*self.flat(numbers, prefix)) for prefix in ("", REJECTED))
        pairs = [_answers_only(*pair) for pair in zip(chosen, rejected, strict=True)]
        batch = packed_rows([row for pair in pairs for row in pair])
        return PairBatch(**vars(batch), reference=self.known(numbers).reshape(-1))

    def both(self, number: int) -> tuple[Encoded, Encoded]:
        """The chosen and the rejected row of a pair, as in a batch."""
        rows = (rows_apart(*self.flat([number], prefix))[0] for prefix in ("", REJECTED))
        chosen, rejected = (Encoded(ids.tolist(), marks.tolist()) for ids, marks in _answers_only(*rows))
        return chosen, rejected

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Tokens of both rows of these pairs."""
        table = self._rows[list(numbers)]
        both = (pc.list_value_length(table[prefix + "input_ids"]) for prefix in ("", REJECTED))
        found: list[int] = pc.add(*both).to_pylist()
        return found


Row = tuple[NDArray[Any], NDArray[np.bool_]]
"""Token ids and which of them are supervised."""


def packed_rows(rows: Sequence[Row]) -> PackedBatch:
    """Lays rows end to end."""
    ids, supervised = zip(*rows, strict=True)
    return pack_flat(np.concatenate(ids), np.concatenate(supervised), np.array([len(row) for row in ids]))


def rows_apart(ids: NDArray[Any], supervised: NDArray[np.bool_], lengths: NDArray[Any]) -> list[Row]:
    """The rows of what `TokenRows.flat` gives."""
    ends = np.cumsum(lengths)[:-1]
    return list(zip(np.split(ids, ends), np.split(supervised, ends), strict=True))


def _answers_only(chosen: Row, rejected: Row) -> tuple[Row, Row]:
    """The pair without supervised turns that end before the first token in which its rows differ."""
    shorter = min(len(chosen[0]), len(rejected[0]))
    differing = np.flatnonzero(chosen[0][:shorter] != rejected[0][:shorter])
    shared = int(differing[0]) if len(differing) else shorter
    # A turn that the difference stands in begins behind the last token before it that is not supervised.
    outside = np.flatnonzero(~(chosen[1][:shared] & rejected[1][:shared]))
    begins = int(outside[-1]) + 1 if len(outside) else 0
    return _from(chosen, begins), _from(rejected, begins)


def _from(row: Row, begins: int) -> Row:
    ids, supervised = row
    return ids, supervised & (np.arange(len(ids)) >= begins)


def refuse_unrated(splits: dict[str, list[str]], dataset: str) -> None:
    """Checks that every row of a dataset is an answer that people liked or disliked; arguments as `refuse_unpaired`.

    Raises:
        DataError: with the number of rows that have no label.
    """
    missing, rows = _missing(splits, LABEL)
    if missing:
        raise DataError(
            f"{dataset}: {missing} of {number_of(rows, 'row')} {agreeing(missing, 'is', 'are')} not rated (no label). "
            "loss_type: kto needs answers "
            "with label true or false, or feedback with a rating; prepare such records apart, or take loss_type: dpo "
            "for pairs"
        )


def refuse_unpaired(splits: dict[str, list[str]], dataset: str) -> None:
    """Checks, by the files' footers, that every row of a dataset is a preference.

    Args:
        splits: Parquet files of each split.
        dataset: what the message calls it.

    Raises:
        DataError: with the number of rows that have no rejected answer.
    """
    single, rows = _missing(splits, _REJECTED_IDS)
    if single:
        raise DataError(
            f"{dataset}: {single} of {number_of(rows, 'row')} "
            f"{agreeing(single, 'is no preference', 'are no preferences')} (no rejected answer). Every row needs a "
            "prompt, a chosen and a rejected answer; prepare such records apart (input_format: preference)"
        )


def _missing(splits: dict[str, list[str]], wanted: str) -> tuple[int, int]:
    """Rows without a value in a column, and all rows, of all splits."""
    found = [_missing_of(Location.at(name), wanted) for files in splits.values() for name in files]
    return sum(missing for missing, _ in found), sum(rows for _, rows in found)


def _missing_of(file: Location, wanted: str) -> tuple[int, int]:
    with pq.ParquetFile(file.path, filesystem=file.filesystem) as opened:
        footer = opened.metadata
        names = opened.schema_arrow.names
        if wanted == _REJECTED_IDS and "rejected" in names and "input_ids" not in names:  # prepared for no model yet
            parts = opened.iter_batches(columns=["rejected"])
            return sum(part.column(0).to_pylist().count([]) for part in parts), footer.num_rows
        if wanted not in names:
            return footer.num_rows, footer.num_rows
        place = next(n for n in range(footer.num_columns) if footer.schema.column(n).path.split(".")[0] == wanted)
        groups = [footer.row_group(n).column(place).statistics for n in range(footer.num_row_groups)]
        if all(found is not None and found.has_null_count for found in groups):
            return sum(found.null_count for found in groups), footer.num_rows
        parts = opened.iter_batches(columns=[wanted])  # written without statistics
        return sum(part.column(0).null_count for part in parts), footer.num_rows
