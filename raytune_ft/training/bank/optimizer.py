"""AdamW over the rows of a matrix, each with its own rates and its own step count."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class RowRates:
    """[rows] float32 settings of each row's AdamW, on the matrix's device."""

    beta1: Tensor
    beta2: Tensor
    epsilon: Tensor
    weight_decay: Tensor
    max_grad_norm: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> RowRates:
        """Settings of `rows` rows that nobody uses yet."""
        return cls(*(torch.zeros(rows, device=device) for _ in fields(cls)))

    def take(self, rows: Tensor) -> RowRates:
        """Those of some rows."""
        return RowRates(*(getattr(self, f.name).index_select(0, rows) for f in fields(self)))


def clip_rows_(gradients: Tensor, limits: Tensor) -> Tensor:
    """Scales each row of `gradients` [rows, size] down to its norm limit, as `clip_grad_norm_` does; the old norms."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
    gradients.mul_((limits / (norms + 1e-6)).clamp_(max=1.0).unsqueeze(1))
    return norms


def adamw_rows_(
    weights: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    steps: Tensor,
    learning_rates: Tensor,
    rates: RowRates,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) for every row, in place; the operations don't grow in number.

    Args:
        weights: [rows, size] float32, as are the gradients and moments.
        gradients: as `weights`.
        exp_avg: as `weights`.
        exp_avg_sq: as `weights`.
        steps: [rows] float32, the number of the step that is made, from 1.
        learning_rates: [rows] float32.
        rates: of these rows.
    """
    weights.mul_((1 - learning_rates * rates.weight_decay).unsqueeze(1))
    exp_avg.lerp_(gradients, (1 - rates.beta1).unsqueeze(1))
    beta2 = rates.beta2.unsqueeze(1)
    exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients * (1 - beta2))
    first = 1 - rates.beta1.double().pow(steps.double())
    second = (1 - rates.beta2.double().pow(steps.double())).sqrt()
    denominator = exp_avg_sq.sqrt().div_(second.float().unsqueeze(1)).add_(rates.epsilon.unsqueeze(1))
    weights.sub_(denominator.reciprocal_().mul_(exp_avg).mul_((learning_rates / first).float().unsqueeze(1)))
