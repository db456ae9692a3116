"""What the trials of a bank learn: how the losses of a pass become those of its trials.

A criterion knows nothing of adapters: it sees the loss of every target, and says how much each counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from raytune_ft.models.collate import PackedBatch
from raytune_ft.training.bank.layout import Share
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.loop import Metrics

Weights = Mapping[str, float]
"""What each item of a trial counts, by the trial's name."""


class Criterion(ABC):
    """What the trials of one bank make smaller."""

    measures: ClassVar[tuple[str, ...]]
    """What a step and an evaluation are measured by, the loss first; each is a mean over the batch's items."""
    is_likelihood: ClassVar[bool]
    """Whether the loss is the mean negative log-likelihood of tokens, which has a perplexity."""
    rows_per_item: ClassVar[int]
    """Rows of an item; they lie one after the other."""
    rows_together: ClassVar[int]
    """How many of them a pass must hold together."""

    @abstractmethod
    def refusal(self, config: FineTuningConfig) -> str | None:
        """Why a trial with these settings learns something else; None if it doesn't."""

    @abstractmethod
    def admit(self, name: str, config: FineTuningConfig) -> None:
        """Takes note of what a trial's loss is made of."""

    @abstractmethod
    def items(self, share: Share) -> int:
        """What the loss of these rows, which are learned from, is a mean over."""

    @property
    def looks_beside(self) -> bool:
        """Whether only the first row of an item is learned from, and something has to be known of the second before."""
        return self.rows_per_item > self.rows_together

    def divided(self, share: Share) -> tuple[Share, Share | None]:
        """What of a trial's rows is learned from, and of what has to be known before how likely its model finds it."""
        return (share.firsts(), share.seconds()) if self.looks_beside else (share, None)

    def note(self, beside: Share, said: Sequence[float]) -> None:
        """Takes note of what a trial's model says of what stands beside its rows: log-probabilities, in nats."""
        raise NotImplementedError(f"{type(self).__name__} looks at nothing beside what is learned from")

    def told(self, name: str) -> Metrics:
        """What else a step of a trial tells."""
        return {}

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
    rows_together: ClassVar[int] = 1

    def refusal(self, config: FineTuningConfig) -> str | None:
        """See `Criterion`."""
        if isinstance(config, DistillationConfig):
            return "distillation computes a teacher beside it"
        return None if type(config) is FineTuningConfig else "its trials learn from examples"

    def admit(self, name: str, config: FineTuningConfig) -> None:
        """See `Criterion`: all trials have the same loss."""

    def items(self, share: Share) -> int:
        """The supervised tokens."""
        return share.supervised

    def known_weights(self, shares: Sequence[Share], targets: Tensor, weights: Weights) -> Tensor | None:
        """See `Criterion`: every token of a trial counts as much."""
        return weights_of_each(shares, targets, weights)

    def graded(
        self, losses: Tensor, batch: PackedBatch, shares: Sequence[Share], targets: Tensor, weights: Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `Criterion`."""
        return sums_by_trial(losses.unsqueeze(1), targets), None


def weights_of_each(shares: Sequence[Share], counts: Tensor, weights: Weights) -> Tensor:
    """[all] what each counts of whatever the trials have `counts` [trials] of, on the CPU."""
    return torch.repeat_interleave(torch.tensor([weights[share.name] for share in shares]), counts)


def sums_by_trial(found: Tensor, counts: Tensor) -> Tensor:
    """[trials, measures] float64: sums over each trial's items, which lie together; one trial's NaN stays its own."""
    counts = counts.to(found.device, non_blocking=True)
    # Of one dimension each, which CUDA sums in parallel; of two, it gives each segment to a single thread.
    columns = [column.double().contiguous() for column in found.unbind(1)]
    # Unsafe: the counts are not checked, for which the host would have to wait.
    sums = [torch.segment_reduce(column, "sum", lengths=counts, initial=0.0, unsafe=True) for column in columns]
    return torch.stack(sums, 1)
