"""What the trials of a bank learn from: examples, or pairs of answers; how a pass's losses become those of its trials.

A criterion knows nothing of adapters: it sees the loss of every target, and says how much each counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import PackedBatch
from raytune_ft.training.bank.layout import Share
from raytune_ft.training.batches import Rows
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss
from raytune_ft.training.preference import PAIR_MEASURES, PairTerms, pair_measures, row_sums, row_targets

Weights = Mapping[str, float]
"""What each item of a trial counts, by the trial's name."""


class Criterion(ABC):
    """What the trials of one bank make smaller."""

    measures: ClassVar[tuple[str, ...]]
    """What a step and an evaluation are measured by, the loss first; each is a mean over the batch's items."""
    is_likelihood: ClassVar[bool]
    """Whether the loss is the mean negative log-likelihood of tokens, which has a perplexity."""
    rows_per_item: ClassVar[int]
    """Rows that belong together; they lie one after the other."""

    @abstractmethod
    def refusal(self, config: FineTuningConfig) -> str | None:
        """Why a trial with these settings learns something else; None if it doesn't."""

    @abstractmethod
    def admit(self, name: str, config: FineTuningConfig) -> None:
        """Takes note of what a trial's loss is made of."""

    @abstractmethod
    def items(self, rows: Sequence[Encoded]) -> int:
        """What the loss of these rows is a mean over."""

    @abstractmethod
    def known_weights(self, shares: Sequence[Share], targets: Tensor, weights: Weights) -> Tensor | None:
        """[all targets] what each target's loss counts, if that is known before the losses are.

        Args:
            shares: of the trials in a pass.
            targets: [trials] how many targets each has, on the CPU.
            weights: see `Weights`.
        """

    @abstractmethod
    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the losses of a pass mean for its trials.

        Args:
            losses: [all targets] negative log-likelihoods in nats, without a gradient.
            batch: the rows of all `shares`, end to end.
            shares: of the trials in the pass.
            targets: as for `known_weights`.
            weights: see `Weights`; None asks for no gradient.

        Returns:
            [trials, measures] float64 sums over each trial's items, in which one trial's NaN stays its own; and
            [all targets] what each target's loss counts, unless that was known before, or no gradient is asked for.
        """


class Examples(Criterion):
    """Trials make supervised tokens likelier."""

    measures: ClassVar[tuple[str, ...]] = ("loss",)
    is_likelihood: ClassVar[bool] = True
    rows_per_item: ClassVar[int] = 1

    def refusal(self, config: FineTuningConfig) -> str | None:
        """See `Criterion`."""
        if isinstance(config, DistillationConfig):
            return "distillation computes a teacher beside it"
        return None if type(config) is FineTuningConfig else "its trials learn from examples"

    def admit(self, name: str, config: FineTuningConfig) -> None:
        """See `Criterion`: all trials have the same loss."""

    def items(self, rows: Sequence[Encoded]) -> int:
        """The supervised tokens."""
        return supervised_in(rows)

    def known_weights(self, shares: Sequence[Share], targets: Tensor, weights: Weights) -> Tensor | None:
        """See `Criterion`: every token of a trial counts as much."""
        return torch.repeat_interleave(torch.tensor([weights[share.name] for share in shares]), targets)

    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Criterion`."""
        return _sums_by_trial(losses.unsqueeze(1), targets), None


class Preferences(Criterion):
    """Trials make the better of two answers likelier than the worse one, each by its own terms.

    The rows of a pair are the chosen and the rejected one; shares bring what the base says of both.
    """

    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES
    is_likelihood: ClassVar[bool] = False
    rows_per_item: ClassVar[int] = 2

    def __init__(self) -> None:
        self._terms: dict[str, PairTerms] = {}

    def refusal(self, config: FineTuningConfig) -> str | None:
        """See `Criterion`."""
        if not isinstance(config, PreferenceConfig):
            return "its trials learn from pairs of answers"
        if config.loss_type is PreferenceLoss.KTO:
            return "loss_type kto learns from single answers"
        return None

    def admit(self, name: str, config: FineTuningConfig) -> None:
        """See `Criterion`."""
        assert isinstance(config, PreferenceConfig)
        self._terms[name] = PairTerms.of(config)

    def items(self, rows: Sequence[Encoded]) -> int:
        """The pairs."""
        return len(rows) // 2

    def known_weights(self, shares: Sequence[Share], targets: Tensor, weights: Weights) -> Tensor | None:
        """None: it depends on both answers' losses."""
        return None

    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Criterion`."""
        pairs = [len(share.rows) // 2 for share in shares]
        terms = PairTerms.of_each([self._terms[share.name] for share in shares], pairs, losses.device)
        reference = torch.tensor([nats for share in shares for nats in share.reference])
        nll = row_sums(losses, batch).requires_grad_(weights is not None)
        found = pair_measures(nll, row_targets(batch), reference.to(losses.device, non_blocking=True), terms)
        sums = _sums_by_trial(found.detach(), torch.tensor(pairs))
        if weights is None:
            return sums, None
        each = torch.repeat_interleave(torch.tensor([weights[share.name] for share in shares]), torch.tensor(pairs))
        (of_rows,) = torch.autograd.grad(found[:, 0], nll, each.to(losses.device, non_blocking=True))
        return sums, of_rows[batch.row_of_target]


class Pairs(Protocol):
    """Preferences, read one at a time (`PairRows`)."""

    def __len__(self) -> int: ...

    def pair(self, number: int, /) -> tuple[Encoded, Encoded]:
        """The chosen and the rejected row of a pair."""


class RowsOfPairs:
    """The rows of pairs one by one, 2i and 2i + 1 those of pair i; and what the base says of those looked up so far."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._last: tuple[int, tuple[Encoded, Encoded]] | None = None
        self._said = np.full(2 * len(pairs), np.nan, np.float32)

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __getitem__(self, number: int) -> Encoded:
        last, (pair, place) = self._last, divmod(number, 2)
        if last is None or last[0] != pair:
            last = self._last = pair, self._pairs.pair(pair)
        return last[1][place]

    def unknown(self, numbers: Iterable[int]) -> list[int]:
        """Those of these rows of which is not known what the base says, each once."""
        return [number for number in dict.fromkeys(numbers) if np.isnan(self._said[number])]

    def learn(self, numbers: Sequence[int], said: Sequence[float]) -> None:
        """Takes note of log-probabilities of rows under the base, in nats."""
        self._said[list(numbers)] = said

    def said_of(self, numbers: Sequence[int]) -> list[float]:
        """Log-probabilities of these rows under the base, in nats."""
        found: list[float] = self._said[list(numbers)].tolist()
        return found


def said_of(rows: Rows, numbers: Sequence[int]) -> Sequence[float]:
    """What the base says of these rows, where that was looked up."""
    return rows.said_of(numbers) if isinstance(rows, RowsOfPairs) else ()


def supervised_in(rows: Sequence[Encoded]) -> int:
    """Targets of these rows: supervised tokens with a predecessor."""
    return sum(sum(row.supervised[1:]) for row in rows)


def _sums_by_trial(found: Tensor, counts: Tensor) -> Tensor:
    """[trials, measures] float64: sums over each trial's items, which lie together; one trial's NaN stays its own."""
    counts = counts.to(found.device, non_blocking=True)
    return torch.segment_reduce(found.double(), "sum", lengths=counts, initial=0.0)
