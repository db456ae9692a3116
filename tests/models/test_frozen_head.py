"""Losses in chunks, with the gradient that autograd would give for the whole."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.models import chunks
from raytune_ft.models.frozen_head import can_be_summed, losses_and_gradient, summed_loss


def test_chunked_losses_and_gradient_are_those_of_autograd_on_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(chunks, "LEAST", 16)
    monkeypatch.setitem(chunks.CHUNK_LOGITS, "cpu", 16 * 40)
    head = torch.nn.Linear(12, 40, bias=False).requires_grad_(False)
    states, targets, weights = torch.randn(50, 12, requires_grad=True), torch.randint(0, 40, (50,)), torch.rand(50)
    whole = torch.nn.functional.cross_entropy(head(states), targets, reduction="none")
    (wanted,) = torch.autograd.grad((whole * weights).sum(), states)
    found, gradient = losses_and_gradient(head, states.detach(), targets, weights)
    torch.testing.assert_close(found, whole.detach())
    torch.testing.assert_close(gradient, wanted)
    assert losses_and_gradient(head, states.detach(), targets, None)[1] is None


def test_a_summed_loss_has_the_gradient_of_the_plain_one_whatever_it_is_scaled_by() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(12, 40).requires_grad_(False)
    states, targets = torch.randn(9, 12, requires_grad=True), torch.randint(0, 40, (9,))
    plain = torch.nn.functional.cross_entropy(head(states), targets, reduction="sum") * 0.3
    (wanted,) = torch.autograd.grad(plain, states)
    found = summed_loss(head, states, targets) * 0.3
    (gradient,) = torch.autograd.grad(found, states)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, wanted)


def test_a_batch_without_targets_sums_to_zero_and_still_reaches_the_states() -> None:
    head = torch.nn.Linear(12, 40).requires_grad_(False)
    states = torch.randn(5, 12, requires_grad=True)
    loss = summed_loss(head, states[:0], torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert float(loss.detach()) == 0
    assert states.grad is not None
    assert not states.grad.any()


def test_only_a_frozen_whole_head_in_a_wide_format_is_taken() -> None:
    head, states = torch.nn.Linear(12, 40), torch.randn(5, 12, requires_grad=True)
    assert not can_be_summed(head, states)
    head.requires_grad_(False)
    assert can_be_summed(head, states)
    assert not can_be_summed(head, states.detach())
    assert not can_be_summed(head, states.detach().half().requires_grad_(True))
    with torch.no_grad():
        assert not can_be_summed(head, states)
