"""Padding-free batches: rows laid end to end, with what the loss needs to find its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_ft.models.chat import Encoded


@dataclass(frozen=True)
class PackedBatch:
    """Rows in one padding-free sequence.

    A target is a supervised token that has a predecessor; `predictors` are the places whose hidden state predicts it.
    """

    input_ids: Tensor
    """[1, tokens] int64."""
    position_ids: Tensor
    """[1, tokens] int64, from 0 in each row."""
    cu_seq_lens: Tensor
    """[rows + 1] int32, where each row starts, and the number of tokens."""
    predictors: Tensor
    """[targets] int64, places in the sequence."""
    targets: Tensor
    """[targets] int64, token ids."""
    row_of_target: Tensor
    """[targets] int64, the row that each target belongs to."""
    longest: int
    """Tokens of the longest row, which the host need not ask a device for."""
    places: Tensor | None = field(default=None, kw_only=True)
    """[rows] int64, on the CPU: their places among the rows of a training step, if they are of one."""
    stride: ClassVar[int] = 1
    """How many places a unit takes in a step."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.input_ids.shape[1]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.cu_seq_lens.shape[0] - 1

    @property
    def items(self) -> int:
        """What the loss is a mean over: the targets."""
        return len(self.targets)

    @property
    def units(self) -> int:
        """What can be computed apart: the rows."""
        return self.rows

    def part(self, first: int, last: int) -> Self:
        """The units from `first` to before `last`."""
        start, end = int(self.cu_seq_lens[first]), int(self.cu_seq_lens[last])
        mine = (self.row_of_target >= first) & (self.row_of_target < last)
        starts = self.cu_seq_lens[first : last + 1] - start
        return replace(
            self,
            input_ids=self.input_ids[:, start:end],
            position_ids=self.position_ids[:, start:end],
            cu_seq_lens=starts,
            predictors=self.predictors[mine] - start,
            targets=self.targets[mine],
            row_of_target=self.row_of_target[mine] - first,
            longest=int(starts.diff().max()),
            places=None if self.places is None else self.places[first:last],
        )

    def placed(self, places: Sequence[int]) -> Self:
        """The same rows; `places` are those of the units in their step."""
        each = torch.arange(self.rows // max(1, self.units))
        return replace(self, places=(torch.tensor(places)[:, None] * self.stride + each).flatten())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """The same batch on another device."""
        kept = {"longest", "places"}
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if f.name not in kept
        }
        return replace(self, **moved)

    def without_targets(self) -> Self:
        """The same tokens, none of which counts for the loss."""
        none = self.targets[:0]
        return replace(self, predictors=none, targets=none, row_of_target=none)


def pack(rows: Sequence[Encoded]) -> PackedBatch:
    """Lays `rows` end to end.

    The first token of a row has no predecessor and is never a target.
    """
    lengths = np.fromiter((len(row.input_ids) for row in rows), np.int64, len(rows))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(row.input_ids for row in rows), np.int64, total)
    supervised = np.fromiter(chain.from_iterable(row.supervised for row in rows), np.bool_, total)
    return pack_flat(ids, supervised, lengths)


def pack_flat(ids: NDArray[Any], supervised: NDArray[np.bool_], lengths: NDArray[Any]) -> PackedBatch:
    """As `pack`, of rows that lie end to end already: `ids` and `supervised` [tokens], `lengths` [rows]."""
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    owners = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(len(ids)) - starts[owners]
    places = np.flatnonzero(supervised & (positions > 0))
    ids = ids.astype(np.int64)
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seq_lens=torch.from_numpy(starts.astype(np.int32)),
        predictors=torch.from_numpy(places - 1),
        targets=torch.from_numpy(ids[places]),
        row_of_target=torch.from_numpy(owners[places]),
        longest=int(lengths.max(initial=0)),
    )


def group_by_budget(lengths: Sequence[int], token_budget: int, *, padded: bool = False) -> list[list[int]]:
    """Row numbers in groups of at most `token_budget` tokens, longest rows first.

    A row longer than the budget has a group of its own. With `padded`, a group counts as rows x its longest row.
    """
    groups: list[list[int]] = []
    spent = 0
    for number in _longest_first(lengths):
        longest = lengths[groups[-1][0]] if groups else 0
        cost = longest * (len(groups[-1]) + 1) if padded and groups else spent + lengths[number]
        if groups and cost <= token_budget:
            groups[-1].append(number)
            spent += lengths[number]
        else:
            groups.append([number])
            spent = lengths[number]
    return groups


def _longest_first(lengths: Sequence[int]) -> Iterable[int]:
    return sorted(range(len(lengths)), key=lambda number: -lengths[number])
