"""Losses of a pass, and the gradient that goes back into the decoder: per trial, in chunks, on targets only.

The head is frozen, so each chunk's gradient is computed while its logits exist, and none is computed twice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

CHUNK_LOGITS = 1 << 21
"""Logits that exist at the same time."""


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
    losses = torch.empty(len(targets), device=states.device)
    gradient = torch.empty_like(states) if weights is not None else None
    rows = max(16, CHUNK_LOGITS // max(1, _outputs(head)))
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(gradient is not None):
            some = states[part].detach().requires_grad_(gradient is not None)
            chunk = F.cross_entropy(head(some).float(), targets[part], reduction="none")
        losses[part] = chunk.detach()
        if gradient is not None and weights is not None:
            (gradient[part],) = torch.autograd.grad(chunk, some, weights[part])
    return losses, gradient


def sums_by_trial(losses: Tensor, counts: Tensor) -> Tensor:
    """[trials] float64: the sum over each trial's targets, which lie together; one trial's NaN stays its own."""
    return torch.segment_reduce(losses.double(), "sum", lengths=counts, initial=0.0)


def _outputs(head: nn.Module) -> int:
    return int(getattr(head, "out_features", 1 << 15))
