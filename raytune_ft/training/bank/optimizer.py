"""AdamW of each trial in a bank, at its own rates; clipping of all at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from raytune_ft.training.bank.slot import SlotSettings


def clip_rows_(gradients: Tensor, limits: Tensor) -> Tensor:
    """Scales each row of `gradients` [rows, size] down to its norm limit, as `clip_grad_norm_` does; the old norms."""
    norms: Tensor = torch.linalg.vector_norm(gradients, dim=1)
    gradients.mul_((limits / (norms + 1e-6)).clamp_(max=1.0).unsqueeze(1))
    return norms


@torch.no_grad()
def adamw_(  # noqa: PLR0917 - the tensors of one step, all of one shape
    weights: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    steps: Tensor,
    settings: SlotSettings,
    learning_rate: float,
) -> None:
    """One step of torch's fused AdamW (Loshchilov and Hutter, 2019), in place, without waiting for the device.

    Args:
        weights: any shape, float32, as are the gradients and moments.
        gradients: as `weights`.
        exp_avg: as `weights`.
        exp_avg_sq: as `weights`.
        steps: float32 number of steps made so far, which is counted up.
        settings: betas, epsilon and weight decay.
        learning_rate: of this step.
    """
    beta1, beta2 = settings.betas
    adamw(
        [weights],
        [gradients],
        [exp_avg],
        [exp_avg_sq],
        [],
        [steps],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=learning_rate,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
    )
