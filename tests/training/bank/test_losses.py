"""Losses in chunks, with the gradient that autograd would give for the whole."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.training.bank import losses
from raytune_ft.training.bank.losses import losses_and_gradient, sums_by_trial


def test_chunked_losses_and_gradient_are_those_of_autograd_on_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 16 * 40)
    head = torch.nn.Linear(12, 40, bias=False).requires_grad_(False)
    states, targets, weights = torch.randn(50, 12, requires_grad=True), torch.randint(0, 40, (50,)), torch.rand(50)
    whole = torch.nn.functional.cross_entropy(head(states), targets, reduction="none")
    (wanted,) = torch.autograd.grad((whole * weights).sum(), states)
    found, gradient = losses_and_gradient(head, states.detach(), targets, weights)
    torch.testing.assert_close(found, whole.detach())
    torch.testing.assert_close(gradient, wanted)
    assert losses_and_gradient(head, states.detach(), targets, None)[1] is None


def test_a_trials_sum_takes_in_its_own_targets_only() -> None:
    sums = sums_by_trial(torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([2, 0, 1, 1]))
    assert sums[[0, 1, 3]].tolist() == [3.0, 0.0, 4.0]
    assert sums[2].isnan()
