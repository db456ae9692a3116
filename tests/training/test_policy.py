"""Learning from rewards: advantages by hand, the loss against whole logits, and batches in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.config import Precision
from raytune_ft.models.loading import load_model
from raytune_ft.training.micro_batches import divided
from raytune_ft.training.policy import PolicyLoss, RolloutBatch, advantages_of, estimated_divergence

ROWS = [
    Encoded([1, 40, 50, 60], [False, False, True, True]),
    Encoded([1, 70, 80], [False, True, True]),
    Encoded([1, 90], [False, True]),
]


def rollouts(advantages: list[float], reference: list[float]) -> RolloutBatch:
    return RolloutBatch(**vars(pack(ROWS)), advantages=torch.tensor(advantages), reference=torch.tensor(reference))


def test_advantages_are_distances_from_the_mean_of_the_prompt() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0, 5.0, 5.0, 5.0, 5.0]
    assert advantages_of(rewards, 4, scaled=False).tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]
    # deviation of (1, 0, 0, 0): sqrt((0.75^2 + 3 * 0.25^2) / 3) = 0.5
    assert advantages_of(rewards, 4, scaled=True).tolist() == [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0]
    assert advantages_of([], 4, scaled=True).shape == (0,)


def test_the_divergence_is_never_negative_and_zero_where_both_agree() -> None:
    said, reference = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, -0.5])
    by_hand = [0.0, np.exp(-1) + 1 - 1, np.exp(0.5) - 0.5 - 1]
    assert estimated_divergence(said, reference).tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_weighted_log_probabilities_of_whole_logits(beta, tiny_model: Path) -> None:
    advantages, reference = [1.5, -0.5, 0.25], [-5.0, -6.0, -7.0, -5.5, -6.5]
    ours = load_model(str(tiny_model), precision=Precision.FP32, device="cpu").model
    use_attention(ours, SEGMENTS)
    loss, divergence = PolicyLoss(ours, beta)(rollouts(advantages, reference))
    loss.backward()

    theirs = load_model(str(tiny_model), precision=Precision.FP32, device="cpu").model
    total, apart, told = torch.zeros(()), torch.zeros(()), iter(reference)
    for row, advantage in zip(ROWS, advantages, strict=True):
        said = theirs(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for place, kept in enumerate(row.supervised):
            if not kept:
                continue
            mine = said[place - 1, row.input_ids[place]]
            difference = next(told) - mine
            total = total - advantage * mine + beta * (difference.exp() - difference - 1)
            apart = apart + (difference.exp() - difference - 1).detach()
    total.backward()
    assert divergence.item() == pytest.approx(apart.item() if beta else 0.0, rel=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad, other.grad, atol=1e-5)


def test_parts_of_a_batch_keep_what_belongs_to_their_rows() -> None:
    whole = rollouts([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0, -4.0, -5.0])
    parts = divided([whole], 3)
    assert [part.advantages.tolist() for part in parts] == [[1], [2], [3]]
    assert [part.reference.tolist() for part in parts] == [[-1, -2], [-3, -4], [-5]]
    assert (whole.without_targets().items, len(whole.without_targets().reference)) == (0, 0)
