"""Learning from preferences without a reward model: how much likelier the better answer became than the worse one.

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7) and identity preference optimization
(Azar et al. 2023, arXiv:2310.12036, equation 17), over padding-free pairs. What the reference model says of both
answers is computed once, by the model before its first step: no second model is in memory while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.scoring import target_losses
from raytune_ft.training.config_alignment import PreferenceConfig, PreferenceLoss
from raytune_ft.training.pairs import PairBatch
from raytune_ft.training.reference import ReferencedLoss


@dataclass(frozen=True)
class PairTerms:
    """What the loss of pairs is made of: numbers, or [pairs] tensors of pairs that belong to several runs."""

    beta: float | Tensor
    label_smoothing: float | Tensor
    chosen_nll_weight: float | Tensor
    identity: bool | Tensor
    """Whether the loss is that of identity preference optimization."""

    @classmethod
    def of(cls, config: PreferenceConfig) -> Self:
        """The terms of a run."""
        identity = config.loss_type is PreferenceLoss.IPO
        return cls(config.beta, config.label_smoothing, config.chosen_nll_weight, identity)

    @classmethod
    def of_each(cls, runs: Sequence[PairTerms], pairs: Sequence[int], device: torch.device) -> Self:
        """The terms of the pairs of several runs, which lie together; `pairs` says how many each run has."""
        beta, smoothing, weight, identity = terms_of_each(runs, pairs, device)
        return cls(beta, smoothing, weight, identity > 0)


def terms_of_each(runs: Sequence[Any], items: Sequence[int], device: torch.device) -> tuple[Tensor, ...]:
    """[items] for each number of some runs' terms: of all their items, which lie together."""
    numbers = torch.tensor([[float(value) for value in vars(terms).values()] for terms in runs])
    each = torch.repeat_interleave(numbers, torch.tensor(items), dim=0)
    return each.to(device, non_blocking=True).unbind(1)


PAIR_MEASURES = ("loss", "reward_accuracy", "reward_margin", "chosen_reward", "chosen_nll")


def pair_measures(nll: Tensor, tokens: Tensor, reference: Tensor, terms: PairTerms) -> Tensor:
    """[pairs, 5] of each pair what `PAIR_MEASURES` names; only the loss has a gradient.

    A reward is beta times how many nats likelier an answer is than under the reference model.

    Args:
        nll: [2 * pairs] negative log-likelihoods of the chosen and the rejected answer of each pair, in nats.
        tokens: [2 * pairs] their tokens.
        reference: [2 * pairs] their log-probabilities under the reference model, in nats.
        terms: of the loss.
    """
    ratios = -nll - reference
    chosen, rejected = ratios.view(-1, 2).unbind(1)
    mean_nll = (nll / tokens).view(-1, 2)[:, 0]
    loss = _pair_losses(chosen - rejected, (ratios / tokens).view(-1, 2), terms) + terms.chosen_nll_weight * mean_nll
    margins = terms.beta * (chosen - rejected)
    others = ((margins > 0).float(), margins, terms.beta * chosen, mean_nll)
    return torch.stack([loss, *(measure.detach() for measure in others)], 1)


def _pair_losses(differences: Tensor, means: Tensor, terms: PairTerms) -> Tensor:
    identity = terms.identity
    if isinstance(identity, Tensor) or identity:
        by_identity = identity_loss(means[:, 0] - means[:, 1], terms.beta)
        if not isinstance(identity, Tensor):
            return by_identity
    direct = direct_loss(differences, terms.beta, terms.label_smoothing)
    return torch.where(identity, by_identity, direct) if isinstance(identity, Tensor) else direct


class PairwiseLoss(ReferencedLoss):
    """A model as a module from a `PairBatch` to the sums of what `measures` names, over its pairs."""

    measures: ClassVar[tuple[str, ...]] = PAIR_MEASURES

    def forward(self, batch: PackedBatch) -> Tensor:
        """[5] sums over the pairs: losses, pairs ranked right, margins, rewards and mean token losses of the chosen."""
        if not isinstance(batch, PairBatch):
            raise TypeError(f"expected a PairBatch, got {type(batch).__name__}")
        losses = target_losses(self.parts, batch)
        if not batch.items:
            return torch.stack([losses.sum()] + [losses.new_zeros(())] * 4)
        nll, tokens = row_sums(losses, batch), row_targets(batch)
        return pair_measures(nll, tokens, batch.reference, PairTerms.of(self.config)).sum(0)

    def log_probabilities(self, batch: PackedBatch) -> Tensor:
        """[rows] of each row's targets, in nats."""
        return -row_sums(target_losses(self.parts, batch), batch)


def direct_loss(differences: Tensor, beta: float | Tensor, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """DPO's loss of each pair; smoothed, a pair counts as turned round with that probability (cDPO).

    Args:
        differences: [pairs] how many nats the log-ratio of the chosen answer is above that of the rejected one.
        beta: how strongly the model is held to its reference.
        label_smoothing: share of the pairs that are taken to be turned round.
    """
    right, wrong = F.logsigmoid(beta * differences), F.logsigmoid(-beta * differences)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def identity_loss(differences: Tensor, beta: float | Tensor) -> Tensor:
    """IPO's loss of each pair, the squared distance of the mean log-ratios' difference from 1 / (2 beta).

    Args:
        differences: [pairs], as in `direct_loss`, of log-ratios that are means over their tokens.
        beta: how strongly the model is held to its reference.
    """
    return (differences - 1 / (2 * beta)) ** 2


def row_sums(losses: Tensor, batch: PackedBatch) -> Tensor:
    """[rows] sums of the targets' losses."""
    return losses.new_zeros(batch.rows).index_add(0, batch.row_of_target, losses)


def row_targets(batch: PackedBatch) -> Tensor:
    """[rows] how many targets each row has; 1 where it has none."""
    rows = batch.row_of_target
    # Not by bincount, which asks the device for the highest number.
    return rows.new_zeros(batch.rows).index_add_(0, rows, torch.ones_like(rows)).clamp_(min=1)
