"""Learning from preferences without a reward model: how much likelier the better answer became than the worse one.

Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7) and identity preference optimization
(Azar et al. 2023, arXiv:2310.12036, equation 17), over padding-free pairs. What the reference model says of both
answers is computed once, by the model before its first step: no second model is in memory while training.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.scoring import target_losses
from raytune_ft.training.config_alignment import PreferenceLoss
from raytune_ft.training.pairs import PairBatch
from raytune_ft.training.reference import ReferencedLoss


class PairwiseLoss(ReferencedLoss):
    """A model as a module from a `PairBatch` to the sums of what `measures` names, over its pairs.

    A reward is beta times how many nats likelier an answer is than under the reference model.
    """

    measures: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin", "chosen_reward", "chosen_nll")

    def forward(self, batch: PackedBatch) -> Tensor:
        """[5] sums over the pairs: losses, pairs ranked right, margins, rewards and mean token losses of the chosen."""
        if not isinstance(batch, PairBatch):
            raise TypeError(f"expected a PairBatch, got {type(batch).__name__}")
        losses = target_losses(self.parts, batch)
        if not batch.items:
            return torch.stack([losses.sum()] + [losses.new_zeros(())] * 4)
        nll, tokens = row_sums(losses, batch), _counts(batch)
        chosen, rejected = (-nll - batch.reference).view(-1, 2).unbind(1)
        config = self.config
        mean_nll = (nll / tokens).view(-1, 2)[:, 0]
        if config.loss_type is PreferenceLoss.IPO:
            means = ((-nll - batch.reference) / tokens).view(-1, 2)
            loss = identity_loss(means[:, 0] - means[:, 1], config.beta)
        else:
            loss = direct_loss(chosen - rejected, config.beta, config.label_smoothing)
        loss = loss + config.chosen_nll_weight * mean_nll
        margins = config.beta * (chosen - rejected)
        parts = [loss, (margins > 0).float(), margins, config.beta * chosen, mean_nll]
        return torch.stack([parts[0].sum(), *(part.detach().sum() for part in parts[1:])])

    def log_probabilities(self, batch: PackedBatch) -> Tensor:
        """[rows] of each row's targets, in nats."""
        return -row_sums(target_losses(self.parts, batch), batch)


def direct_loss(differences: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of each pair; smoothed, a pair counts as turned round with that probability (cDPO).

    Args:
        differences: [pairs] how many nats the log-ratio of the chosen answer is above that of the rejected one.
        beta: how strongly the model is held to its reference.
        label_smoothing: share of the pairs that are taken to be turned round.
    """
    right, wrong = F.logsigmoid(beta * differences), F.logsigmoid(-beta * differences)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def identity_loss(differences: Tensor, beta: float) -> Tensor:
    """IPO's loss of each pair, the squared distance of the mean log-ratios' difference from 1 / (2 beta).

    Args:
        differences: [pairs], as in `direct_loss`, of log-ratios that are means over their tokens.
        beta: how strongly the model is held to its reference.
    """
    return (differences - 1 / (2 * beta)) ** 2


def row_sums(losses: Tensor, batch: PackedBatch) -> Tensor:
    """[rows] sums of the targets' losses."""
    return losses.new_zeros(batch.rows).index_add(0, batch.row_of_target, losses)


def _counts(batch: PackedBatch) -> Tensor:
    return torch.bincount(batch.row_of_target, minlength=batch.rows).clamp(min=1)
