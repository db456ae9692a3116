"""Which tokens of a padding-free batch belong to which trial."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch, pack
from raytune_ft.training.dropout import batch_keys, row_key


@dataclass(frozen=True)
class Share:
    """Some rows of one trial; `places` are their places in the batch of its step, which dropout depends on.

    `known` is what the loss wants to know of each row besides (see `ReferencedRows`); `together` neighbouring rows
    belong to one item.
    """

    name: str
    rows: Sequence[Encoded]
    seed: int = 0
    step: int = 0
    places: Sequence[int] = ()
    known: Sequence[Sequence[float]] = ()
    together: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of these rows."""
        return sum(len(row.input_ids) for row in self.rows)

    @cached_property
    def supervised(self) -> int:
        """Targets of these rows: supervised tokens with a predecessor."""
        return sum(sum(row.supervised[1:]) for row in self.rows)

    def part(self, first: int, last: int) -> Share:
        """The rows from `first` to before `last`."""
        return self._of(slice(first, last))

    def firsts(self) -> Share:
        """The first row of each item, as an item of its own."""
        return replace(self._of(slice(0, None, self.together)), together=1)

    def seconds(self) -> Share:
        """The second row of each item, as an item of its own."""
        return replace(self._of(slice(1, None, self.together)), together=1)

    def _of(self, mine: slice) -> Share:
        return replace(self, rows=self.rows[mine], places=self.places[mine], known=self.known[mine])


@dataclass(frozen=True)
class Layout:
    """Trials with the number of tokens and targets of each, in the order in which they lie.

    `keys` [tokens] are what dropout masks are made of; None where nothing is dropped.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    keys: Tensor | None

    def segments(self) -> Iterator[tuple[str, int, int]]:
        """Name, first token and end of each trial."""
        ends = list(accumulate(self.tokens, initial=0))
        return zip(self.names, ends[:-1], ends[1:], strict=True)


def lay_out(shares: Sequence[Share], device: torch.device, *, dropout: bool) -> tuple[PackedBatch, Layout]:
    """The rows of all `shares` end to end on `device`, with the layout.

    Args:
        shares: one of each trial, none of them empty.
        device: where the base is.
        dropout: whether any of the trials drops features in this pass.
    """
    batch = pack([row for share in shares for row in share.rows])
    rows = [len(share.rows) for share in shares]
    per_row = torch.bincount(batch.row_of_target, minlength=sum(rows))
    targets = tuple(int(some.sum()) for some in torch.split(per_row, rows))
    keys = _keys(shares, batch).to(device, non_blocking=True) if dropout else None
    names, tokens = tuple(share.name for share in shares), tuple(share.tokens for share in shares)
    return batch.to(device), Layout(names, tokens, targets, keys)


def _keys(shares: Sequence[Share], batch: PackedBatch) -> Tensor:
    rows = [row_key(share.seed, share.step, place) for share in shares for place in share.places]
    return batch_keys(rows, batch)
