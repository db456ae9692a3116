"""Learning from rewards: answers that are better than the others to their prompt become likelier, worse ones less.

The advantage of an answer is its reward's distance from the mean of its prompt's answers, in deviations (GRPO: Shao et
al. 2024, arXiv:2402.03300, section 4.1.1). Each batch of answers gets one step by the model that gave them, so that the
ratio of the policies is 1 and nothing is clipped; the loss is a mean over the answers' tokens of the global batch, so
that no answer's tokens count less for its being long (DAPO: Yu et al. 2025, arXiv:2503.14476, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytune_ft.models.collate import PackedBatch
from raytune_ft.models.scoring import SummedLoss, target_losses


@dataclass(frozen=True)
class RolloutBatch(PackedBatch):
    """Prompts with answers of the model's own in one padding-free sequence; the answers' tokens are the targets."""

    advantages: Tensor
    """[rows] float32, by how much each answer is better than the others to its prompt."""
    reference: Tensor
    """[targets] float32, log-probabilities under the reference model in nats; zeros where none is asked for."""

    def part(self, first: int, last: int) -> Self:
        """The rows from `first` to before `last`."""
        mine = (self.row_of_target >= first) & (self.row_of_target < last)
        return replace(
            super().part(first, last), advantages=self.advantages[first:last], reference=self.reference[mine]
        )

    def without_targets(self) -> Self:
        """The same tokens, none of which counts for the loss."""
        return replace(super().without_targets(), reference=self.reference[:0])


class PolicyLoss(SummedLoss):
    """A model as a module from a `RolloutBatch` to the sums of what `measures` names, over its targets."""

    measures: ClassVar[tuple[str, ...]] = ("loss", "kl")
    is_likelihood: ClassVar[bool] = False

    def __init__(self, model: Any, beta: float) -> None:
        super().__init__(model)
        self.beta = beta

    def forward(self, batch: PackedBatch) -> Tensor:
        """[2] sums over the targets: losses, and divergences from the reference in nats (0 without one)."""
        if not isinstance(batch, RolloutBatch):
            raise TypeError(f"expected a RolloutBatch, got {type(batch).__name__}")
        said = -target_losses(self.parts, batch)
        if not batch.items:
            return torch.stack([said.sum(), said.new_zeros(())])
        ratio = (said - said.detach()).exp()  # 1, with the gradient of the log-probability
        loss = -ratio * batch.advantages[batch.row_of_target]
        divergence = torch.zeros_like(said)
        if self.beta:
            divergence = estimated_divergence(said, batch.reference)
            loss = loss + self.beta * divergence
        return torch.stack([loss.sum(), divergence.detach().sum()])


def estimated_divergence(said: Tensor, reference: Tensor) -> Tensor:
    """[targets] estimates of KL(model || reference) at sampled tokens, never negative (Schulman 2020's k3).

    Args:
        said: [targets] log-probabilities under the model.
        reference: [targets] log-probabilities under the reference.
    """
    difference = reference - said
    return difference.exp() - difference - 1


def advantages_of(rewards: Sequence[float], group: int, *, scaled: bool) -> NDArray[np.float32]:
    """How much better each answer is than the mean of its group, in the group's deviations if `scaled`.

    Args:
        rewards: one for each answer; those to one prompt stand together.
        group: answers to a prompt.
        scaled: whether to divide by the deviation; a group of equals has only zeros either way.
    """
    table = np.asarray(rewards, np.float64).reshape(-1, group)
    apart = table - table.mean(1, keepdims=True)
    if scaled:
        spread = table.std(1, ddof=1, keepdims=True)
        apart = np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 1e-8)
    found: NDArray[np.float32] = apart.reshape(-1).astype(np.float32)
    return found
