"""Clipping and steps of each trial against torch's AdamW and clipping on each alone."""

from __future__ import annotations

import torch

from raytune_ft.training.bank.optimizer import adamw_, clip_rows_
from raytune_ft.training.bank.slot import SlotSettings

KINDS = [((0.9, 0.999), 1e-8, 0.01, 1.0, 1e-3), ((0.8, 0.95), 1e-6, 0.3, 0.5, 1e-2), ((0.0, 0.9), 1e-8, 0.0, 99.0, 0.1)]


def test_rows_step_as_torchs_adamw_and_clipping_do_one_by_one() -> None:
    torch.manual_seed(0)
    settings = [
        SlotSettings((), 1, 1.0, 0.0, betas=betas, epsilon=eps, weight_decay=decay, max_grad_norm=limit)
        for betas, eps, decay, limit, _ in KINDS
    ]
    weights = torch.randn(3, 17)
    alone = [torch.nn.Parameter(row.clone()) for row in weights]
    optimizers = [
        torch.optim.AdamW([p], betas=betas, eps=eps, weight_decay=decay, lr=lr, fused=False, foreach=False)
        for p, (betas, eps, decay, _, lr) in zip(alone, KINDS, strict=True)
    ]
    first, second, steps = torch.zeros_like(weights), torch.zeros_like(weights), torch.zeros(3)
    for _ in range(5):
        gradients = torch.randn(3, 17)
        wanted = []
        for parameter, row, optimizer, (*_, limit, _lr) in zip(alone, gradients, optimizers, KINDS, strict=True):
            parameter.grad = row.clone()
            wanted.append(torch.nn.utils.clip_grad_norm_(parameter, limit))
            optimizer.step()
        blocks = [gradients[:, :5].clone(), gradients[:, 5:].clone().view(3, 3, 4)]
        norms = clip_rows_(blocks, torch.tensor([one.max_grad_norm for one in settings]))
        gradients = torch.cat([block.flatten(1) for block in blocks], dim=1)
        steps += 1
        torch.testing.assert_close(norms, torch.stack(wanted))
        for row, (*_, lr) in enumerate(KINDS):
            mine = ([numbers[row]] for numbers in (weights, gradients, first, second))
            adamw_(*mine, steps[row], settings[row], lr)
        torch.testing.assert_close(weights, torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)
