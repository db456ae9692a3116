"""AdamW of each trial in a bank, at its own rates; clipping of all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytune_ft.training.bank.slot import SlotSettings


def clip_rows_(gradients: Sequence[Tensor], limits: Tensor) -> Tensor:
    """Scales the gradients of each row down to its norm limit, as `clip_grad_norm_` does.

    Args:
        gradients: blocks [rows, ...], which belong together row by row.
        limits: [rows].

    Returns:
        [rows], the norms before.
    """
    norms: Tensor = torch.stack([torch.linalg.vector_norm(block.flatten(1), dim=1) for block in gradients]).norm(dim=0)
    factors = (limits / (norms + 1e-6)).clamp_(max=1.0)
    for block in gradients:
        block.mul_(factors.view(-1, *[1] * (block.dim() - 1)))
    return norms


@torch.no_grad()
def adamw_(  # noqa: PLR0917 - the tensors of one step, block by block of equal shapes
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    settings: SlotSettings,
    learning_rate: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) by torch's fused kernel, in place.

    Args:
        weights: blocks of any shape, float32, as are gradients and moments.
        gradients: as `weights`.
        exp_avg: as `weights`.
        exp_avg_sq: as `weights`.
        steps: float32, the number of this step, from 1.
        settings: betas, epsilon and weight decay.
        learning_rate: of this step.
    """
    beta1, beta2 = settings.betas
    torch._fused_adamw_(
        weights,
        gradients,
        exp_avg,
        exp_avg_sq,
        [],
        [steps] * len(weights),
        lr=learning_rate,
        beta1=beta1,
        beta2=beta2,
        weight_decay=settings.weight_decay,
        eps=settings.epsilon,
        amsgrad=False,
        maximize=False,
    )
