"""Losses under a frozen head, and the gradient that goes back into the decoder: in chunks, on targets only.

Each chunk's gradient is computed while its logits exist, so that none is computed twice and none is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from raytune_ft.models.chunks import frozen_chunk
from raytune_ft.models.kernels import fused_losses, has_fused_loss


def losses_and_gradient(
    head: nn.Module, states: Tensor, targets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Negative log-likelihoods, and the gradient of their weighted sum.

    Args:
        head: [targets, width] states to [targets, vocabulary] logits; frozen.
        states: [targets, width], detached.
        targets: [targets] token ids.
        weights: [targets] float32, what each target counts; None asks for no gradient.

    Returns:
        [targets] float32 losses in nats, and [targets, width] the gradient of the states.
    """
    rows = frozen_chunk("cuda" if states.is_cuda else "cpu", _outputs(head))
    if len(targets) and has_fused_loss(head, states):
        losses, gradient = fused_losses(head, states, targets, rows, wanted=weights is not None)
        return losses, gradient.mul_(weights.unsqueeze(1)) if weights is not None else None
    losses = torch.empty(len(targets), device=states.device)
    gradient = torch.empty_like(states) if weights is not None else None
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(gradient is not None):
            some = states[part].detach().requires_grad_(gradient is not None)
            chunk = F.cross_entropy(head(some).float(), targets[part], reduction="none")
        losses[part] = chunk.detach()
        if gradient is not None and weights is not None:
            (gradient[part],) = torch.autograd.grad(chunk, some, weights[part])
    return losses, gradient


def summed_loss(head: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    """The sum of the targets' losses under a frozen head, differentiable by the states.

    Args:
        head: as in `losses_and_gradient`.
        states: [targets, width].
        targets: [targets] token ids.
    """
    weights = torch.ones(len(targets), device=states.device)
    losses, gradient = losses_and_gradient(head, states.detach(), targets, weights)
    return _Known.apply(states, losses.sum(), gradient)  # type: ignore[no-any-return, no-untyped-call]


def can_be_summed(head: nn.Module, states: Tensor) -> bool:
    """Whether `summed_loss` takes this head: frozen, held whole, and in a format with fp32's range of exponents."""
    parameters = list(head.parameters())
    return (
        torch.is_grad_enabled()
        and states.requires_grad
        and states.dtype is not torch.float16  # a gradient that is scaled later would round to 0 there
        and not any(parameter.requires_grad or hasattr(parameter, "ds_id") for parameter in parameters)
    )


class _Known(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (known,) = ctx.saved_tensors
        return (known.float() * gradients[0]).to(known.dtype), None, None


def _outputs(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 1 << 15))
