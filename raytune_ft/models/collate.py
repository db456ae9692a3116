"""Padding-free batches: rows laid end to end, with what the loss needs to find its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
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

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.input_ids.shape[1]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.cu_seq_lens.shape[0] - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def without_targets(self) -> PackedBatch:
        """The same tokens, none of which counts for the loss."""
        none = self.targets[:0]
        return PackedBatch(self.input_ids, self.position_ids, self.cu_seq_lens, none, none, none)


def pack(rows: Sequence[Encoded]) -> PackedBatch:
    """Lays `rows` end to end.

    The first token of a row has no predecessor and is never a target.
    """
    ids: list[int] = []
    positions: list[int] = []
    starts = [0]
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        start = len(ids)
        ids += row.input_ids
        positions += range(len(row.input_ids))
        for place, supervised in enumerate(row.supervised):
            if supervised and place > 0:
                predictors.append(start + place - 1)
                targets.append(row.input_ids[place])
                owners.append(number)
        starts.append(len(ids))
    return PackedBatch(
        input_ids=torch.tensor([ids], dtype=torch.long),
        position_ids=torch.tensor([positions], dtype=torch.long),
        cu_seq_lens=torch.tensor(starts, dtype=torch.int32),
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        row_of_target=torch.tensor(owners, dtype=torch.long),
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
    return sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
