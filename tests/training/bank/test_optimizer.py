"""Rows of one matrix against torch's AdamW on each row alone."""

from __future__ import annotations

import torch

from raytune_ft.training.bank.optimizer import RowRates, adamw_rows_, clip_rows_


def test_rows_step_as_torchs_adamw_and_clipping_do_one_by_one() -> None:
    torch.manual_seed(0)
    settings = [
        (0.9, 0.999, 1e-8, 0.01, 1.0, 1e-3),
        (0.8, 0.95, 1e-6, 0.3, 0.5, 1e-2),
        (0.0, 0.9, 1e-8, 0.0, 99.0, 0.1),
    ]
    weights = torch.randn(3, 17)
    alone = [torch.nn.Parameter(row.clone()) for row in weights]
    optimizers = [
        torch.optim.AdamW([p], betas=(b1, b2), eps=eps, weight_decay=decay, lr=lr)
        for p, (b1, b2, eps, decay, _, lr) in zip(alone, settings, strict=True)
    ]
    rates = RowRates(*torch.tensor(settings).t()[:5])
    learning_rates = torch.tensor([lr for *_, lr in settings])
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, 6):
        gradients = torch.randn(3, 17)
        wanted = []
        for parameter, row, optimizer, (*_, limit, _lr) in zip(alone, gradients, optimizers, settings, strict=True):
            parameter.grad = row.clone()
            wanted.append(torch.nn.utils.clip_grad_norm_(parameter, limit))
            optimizer.step()
        norms = clip_rows_(gradients, rates.max_grad_norm)
        steps = torch.full((3,), float(step))
        adamw_rows_(weights, gradients, first, second, steps=steps, learning_rates=learning_rates, rates=rates)
        torch.testing.assert_close(norms, torch.stack(wanted))
        torch.testing.assert_close(weights, torch.stack([p.detach() for p in alone]), rtol=1e-5, atol=1e-6)
