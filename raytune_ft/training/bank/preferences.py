"""Trials of a bank that learn what people prefer: from pairs of answers, or from single ones that were rated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from raytune_ft.models.collate import PackedBatch
from raytune_ft.training.bank.criterion import Criterion, Examples, Weights, sums_by_trial, weights_of_each
from raytune_ft.training.bank.layout import Share
from raytune_ft.training.bank.referenced import RatedAnswers, ReferencedRows
from raytune_ft.training.batches import Rows, TokenRows
from raytune_ft.training.config import FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss
from raytune_ft.training.loop import Metrics
from raytune_ft.training.pairs import PairRows
from raytune_ft.training.preference import PAIR_MEASURES, PairTerms, pair_measures, row_sums, row_targets
from raytune_ft.training.ratings import RATED_MEASURES, RatedRows, RatedTerms, rated_measures


class _Referenced(Criterion):
    """A loss of items, known only when all of an item's targets are; shares bring what the base says of them."""

    is_likelihood: ClassVar[bool] = False

    def known_weights(self, shares: Sequence[Share], targets: Tensor, weights: Weights) -> Tensor | None:
        """None: it depends on the losses."""
        return None

    def _graded(
        self, found: Tensor, nll: Tensor, batch: PackedBatch, shares: Sequence[Share], weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `graded`, of [items, measures] that depend on [rows] negative log-likelihoods."""
        items = torch.tensor([self.items(share) for share in shares])
        sums = sums_by_trial(found.detach(), items)
        if weights is None:
            return sums, None
        each = weights_of_each(shares, items, weights).to(nll.device, non_blocking=True)
        (of_rows,) = torch.autograd.grad(found[:, 0], nll, each)
        return sums, of_rows[batch.row_of_target]


class Preferences(_Referenced):
    """Trials make the better of two answers likelier than the worse one, each by its own terms.

    The rows of a pair are the chosen and the rejected one.
    """

    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES
    rows_per_item: ClassVar[int] = 2
    rows_together: ClassVar[int] = 2

    def __init__(self) -> None:
        self._terms: dict[str, PairTerms] = {}

    def refusal(self, config: FineTuningConfig) -> str | None:
        """See `Criterion`."""
        if not isinstance(config, PreferenceConfig):
            return "its trials learn from pairs of answers"
        return "loss_type kto learns from single answers" if config.loss_type is PreferenceLoss.KTO else None

    def admit(self, name: str, config: FineTuningConfig) -> None:
        """See `Criterion`."""
        assert isinstance(config, PreferenceConfig)
        self._terms[name] = PairTerms.of(config)

    def items(self, share: Share) -> int:
        """The pairs."""
        return len(share.rows) // 2

    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Criterion`."""
        pairs = [self.items(share) for share in shares]
        terms = PairTerms.of_each([self._terms[share.name] for share in shares], pairs, losses.device)
        (reference,) = _known(shares, losses.device)
        nll = row_sums(losses, batch).requires_grad_(weights is not None)
        found = pair_measures(nll, row_targets(batch), reference, terms)
        return self._graded(found, nll, batch, shares, weights)


class Ratings(_Referenced):
    """Trials make answers that people liked likelier and others less likely, each by its own terms and its own point.

    An item's rows are the answer and, beside it, its prompt with another one's answer: a trial's point of reference is
    how far its model is from the base on those.
    """

    measures: ClassVar[tuple[str, ...]] = RATED_MEASURES
    rows_per_item: ClassVar[int] = 2
    rows_together: ClassVar[int] = 1

    def __init__(self) -> None:
        self._terms: dict[str, RatedTerms] = {}

    def refusal(self, config: FineTuningConfig) -> str | None:
        """See `Criterion`."""
        rated = isinstance(config, PreferenceConfig) and config.loss_type is PreferenceLoss.KTO
        return None if rated else "its trials learn from rated answers (loss_type kto)"

    def admit(self, name: str, config: FineTuningConfig) -> None:
        """See `Criterion`."""
        assert isinstance(config, PreferenceConfig)
        self._terms[name] = RatedTerms.of(config)

    def items(self, share: Share) -> int:
        """The answers."""
        return len(share.rows)

    def note(self, beside: Share, said: Sequence[float]) -> None:
        """The trial's point is the mean distance from the base; 0 at least."""
        apart = [nats - known[0] for nats, known in zip(said, beside.known, strict=True)]
        self._terms[beside.name] = self._terms[beside.name].at(max(0.0, sum(apart) / len(apart)))

    def told(self, name: str) -> Metrics:
        """The point, as a run alone tells it."""
        return {"kl": self._terms[name].point}

    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Criterion`."""
        rows = [self.items(share) for share in shares]
        terms = RatedTerms.of_each([self._terms[share.name] for share in shares], rows, losses.device)
        reference, liked = _known(shares, losses.device)
        nll = row_sums(losses, batch).requires_grad_(weights is not None)
        found = rated_measures(-nll - reference, liked > 0, terms)
        return self._graded(found, nll, batch, shares, weights)


def criterion_for(config: FineTuningConfig) -> Criterion:
    """What trials with such settings learn."""
    if not isinstance(config, PreferenceConfig):
        return Examples()
    return Ratings() if config.loss_type is PreferenceLoss.KTO else Preferences()


def referenced(rows: TokenRows) -> Rows:
    """Rows as a bank wants them, whose criterion may hold them against the base."""
    if isinstance(rows, RatedRows):
        return RatedAnswers(rows)
    return ReferencedRows(rows) if isinstance(rows, PairRows) else rows


def _known(shares: Sequence[Share], device: torch.device) -> tuple[Tensor, ...]:
    """What is known of the rows of all shares: a [rows] tensor for each number."""
    numbers = torch.tensor([known for share in shares for known in share.known])
    return numbers.to(device, non_blocking=True).unbind(1)
