"""Learning from single answers that people liked or disliked (KTO: Ethayarajh et al. 2024, arXiv:2402.01306).

An answer's reward is held against a point of reference: how far the model is from its reference on answers that do not
belong to their prompts, estimated anew for each global batch, without a gradient (equation 8 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.scoring import target_losses
from raytune_ft.training.batches import LABEL, TokenRows
from raytune_ft.training.config_alignment import PreferenceConfig
from raytune_ft.training.loop import Learner, Metrics
from raytune_ft.training.micro_batches import computed_without_gradient
from raytune_ft.training.pairs import Row, packed_rows, rows_apart
from raytune_ft.training.peers import Peers
from raytune_ft.training.preference import row_sums, terms_of_each
from raytune_ft.training.reference import ReferencedLoss, ScoredRows


@dataclass(frozen=True)
class RatedBatch(PackedBatch):
    """Rated answers in one padding-free sequence, and beside them their prompts with answers to other prompts."""

    liked: Tensor
    """[rows] bool."""
    reference: Tensor
    """[rows, 2] float32, log-probabilities of the answers and of the others under the reference model, in nats."""
    others: PackedBatch
    """As many rows: each prompt with the answer of another row."""

    stride: ClassVar[int] = 2

    @property
    def items(self) -> int:
        """What the loss is a mean over: the rows, if they count at all."""
        return self.rows if len(self.targets) else 0

    def part(self, first: int, last: int) -> Self:
        """The rows from `first` to before `last`."""
        mine = slice(first, last)
        return replace(
            super().part(first, last),
            liked=self.liked[mine],
            reference=self.reference[mine],
            others=self.others.part(first, last),
        )


class RatedRows(ScoredRows):
    """Tokenized answers of a split that people liked or disliked; supervised is each row's last answer."""

    columns: ClassVar[tuple[str, ...]] = (*TokenRows.columns, LABEL)

    def packed(self, numbers: Sequence[int]) -> RatedBatch:
        """These rows laid end to end, and beside them each prompt with the answer of the row after it."""
        after = [(number + 1) % len(self) for number in numbers]
        own, next_ones = self._answers(numbers), self._answers(after)
        mixed = [_joined(prompt, answer) for (prompt, _), (_, answer) in zip(own, next_ones, strict=True)]
        batch, others = (packed_rows(rows) for rows in ([_joined(*row) for row in own], mixed))
        return RatedBatch(
            **vars(batch),
            liked=torch.from_numpy(self.liked(numbers)),
            reference=self.known(numbers),
            others=others,
        )

    def both(self, number: int) -> tuple[Encoded, Encoded]:
        """A row and its prompt with the answer of the row after it, as in a batch."""
        (prompt, mine), (_, other) = self._answers([number, (number + 1) % len(self)])
        rows = (_joined(prompt, answer) for answer in (mine, other))
        own, mixed = (Encoded(ids.tolist(), marks.tolist()) for ids, marks in rows)
        return own, mixed

    def liked(self, numbers: Sequence[int]) -> NDArray[np.bool_]:
        """[numbers] which of these answers people liked."""
        found = pc.fill_null(self._rows[list(numbers)][LABEL], fill_value=True).to_numpy(zero_copy_only=False)
        return np.array(found, np.bool_)

    def _answers(self, numbers: Sequence[int]) -> list[tuple[NDArray[Any], Row]]:
        """What stands before the last answer of each row, and from there on with what is supervised."""
        found = []
        for row, marks in rows_apart(*self.flat(numbers)):
            last = int(np.flatnonzero(marks)[-1])
            outside = np.flatnonzero(~marks[:last])
            first = int(outside[-1]) + 1 if len(outside) else 0
            found.append((row[:first], (row[first:], marks[first:])))
        return found


def _joined(prompt: NDArray[Any], answer: Row) -> Row:
    ids, supervised = answer
    return np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), np.bool_), supervised])


@dataclass(frozen=True)
class RatedTerms:
    """What the loss of rated answers is made of: numbers, or [rows] tensors of rows that belong to several runs."""

    beta: Any
    desirable_weight: Any
    undesirable_weight: Any
    point: Any = 0.0
    """Nats that a log-ratio is held against; 0 or more."""

    @classmethod
    def of(cls, config: PreferenceConfig) -> Self:
        """The terms of a run."""
        return cls(config.beta, config.desirable_weight, config.undesirable_weight)

    @classmethod
    def of_each(cls, runs: Sequence[RatedTerms], rows: Sequence[int], device: torch.device) -> Self:
        """The terms of the rows of several runs, which lie together; `rows` says how many each run has."""
        return cls(*terms_of_each(runs, rows, device))

    def at(self, point: float) -> Self:
        """The same with another point."""
        return replace(self, point=point)


RATED_MEASURES = ("loss", "reward_accuracy")


def rated_measures(ratios: Tensor, liked: Tensor, terms: RatedTerms) -> Tensor:
    """[rows, 2] of each answer what `RATED_MEASURES` names: its loss, and whether it is on the right side of the point.

    Args:
        ratios: [rows] log-ratios of the model to its reference, in nats.
        liked: [rows] bool.
        terms: of the loss.
    """
    right = (ratios.detach() > terms.point) == liked
    return torch.stack([rated_loss(ratios, liked, terms), right.float()], 1)


class RatedLoss(ReferencedLoss):
    """A model as a module from a `RatedBatch` to the sums of what `measures` names, over its rows.

    A reward is beta times how many nats likelier an answer is than under the reference model.
    """

    measures: ClassVar[tuple[str, ...]] = RATED_MEASURES
    point: float = 0.0
    """Nats that a log-ratio is held against."""

    def forward(self, batch: PackedBatch) -> Tensor:
        """[2] sums over the rows: losses, and rows on the right side of the point of reference."""
        if not isinstance(batch, RatedBatch):
            raise TypeError(f"expected a RatedBatch, got {type(batch).__name__}")
        losses = target_losses(self.parts, batch)
        if not batch.items:
            return torch.stack([losses.sum(), losses.new_zeros(())])
        ratios = -row_sums(losses, batch) - batch.reference[:, 0]
        return rated_measures(ratios, batch.liked, RatedTerms.of(self.config).at(self.point)).sum(0)

    def log_probabilities(self, batch: RatedBatch) -> Tensor:
        """[rows * 2] of each answer and of the other one to its prompt, in nats."""
        both = [-row_sums(target_losses(self.parts, rows), rows) for rows in (batch, batch.others)]
        return torch.stack(both, 1).reshape(-1)

    def distances(self, batch: RatedBatch) -> Tensor:
        """[rows] how many nats likelier the others are than under the reference model."""
        return -row_sums(target_losses(self.parts, batch.others), batch.others) - batch.reference[:, 1]


def rated_loss(ratios: Tensor, liked: Tensor, terms: RatedTerms) -> Tensor:
    """KTO's loss of each answer: how far its value is from the best that it can have.

    Args:
        ratios: [rows] log-ratios of the model to its reference, in nats.
        liked: [rows] bool.
        terms: of the loss.
    """
    apart = terms.beta * (ratios - terms.point)
    good = terms.desirable_weight * (1 - torch.sigmoid(apart))
    bad = terms.undesirable_weight * (1 - torch.sigmoid(-apart))
    return torch.where(liked, good, bad)


@dataclass
class RatedLearner:
    """A learner that sets the point of reference before each step and each evaluation, over all ranks' rows."""

    learner: Learner
    loss: RatedLoss
    peers: Peers
    evaluation: Callable[[], Iterable[Any]]

    def step(self, batch: Sequence[RatedBatch], step: int) -> Metrics:
        """Makes an optimizer step, and tells the point as ``kl``."""
        self.loss.point = self._point(batch)
        return {**self.learner.step(batch, step), "kl": self.loss.point}

    def evaluate(self) -> Metrics:
        """The learner's own evaluation, against the point of the validation split."""
        self.loss.point = self._point(self.evaluation())
        return self.learner.evaluate()

    def _point(self, batches: Iterable[RatedBatch]) -> float:
        sums = torch.zeros(2, dtype=torch.float64)
        may_split = self.loss.config.zero_stage < 3
        for batch, parts in computed_without_gradient(self.loss, self._distance, batches, may_split=may_split):
            if batch.items:
                sums += torch.stack([torch.stack(parts).sum(), torch.tensor(float(batch.items))])
        total, count = map(float, self.peers.total(sums).tolist())
        return max(0.0, total / max(1.0, count))

    def _distance(self, batch: Any) -> Tensor:
        return self.loss.distances(batch.to(self.peers.device)).double().sum().cpu()
