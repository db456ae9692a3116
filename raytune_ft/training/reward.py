"""Reward models, trained on pairs by the Bradley-Terry model: the chosen answer's reward is to be the higher one.

The chance that a person prefers one answer to another is the sigmoid of the difference of their rewards (Bradley and
Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.rewarding import RewardParts, row_rewards
from raytune_ft.models.scoring import SummedLoss
from raytune_ft.training.pairs import PairBatch


class RewardLoss(SummedLoss):
    """A reward model as a module from a `PairBatch` to the sums of what `measures` names, over its pairs."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "reward_accuracy", "reward_margin", "chosen_reward")
    is_likelihood: ClassVar[bool] = False
    writes_text: ClassVar[bool] = False

    def __init__(self, model: Any, center_rewards_weight: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.model = model
        self._scored = (RewardParts.of(model),)  # in a tuple, so that the halves are not registered twice
        self._weight = center_rewards_weight

    def forward(self, batch: PackedBatch) -> Tensor:
        """[4] sums over the pairs: losses, pairs ranked right, margins, rewards of the chosen."""
        if not isinstance(batch, PairBatch):
            raise TypeError(f"expected a PairBatch, got {type(batch).__name__}")
        rewards = row_rewards(self._scored[0], batch)
        if not batch.items:
            return torch.stack([rewards.sum() * 0.0] + [rewards.new_zeros(())] * 3)
        chosen, rejected = rewards.view(-1, 2).unbind(1)
        margins = chosen - rejected
        loss = -F.logsigmoid(margins) + self._weight * (chosen + rejected) ** 2
        parts = [(margins > 0).float(), margins, chosen]
        return torch.stack([loss.sum(), *(part.detach().sum() for part in parts)])
