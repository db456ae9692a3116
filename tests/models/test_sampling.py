"""Drawn tokens follow the distribution that temperature and nucleus leave, by the seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_ft.models.config import DecodingConfig
from raytune_ft.models.sampling import Sampler, logprobs_of

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def drawn(count: int = 4000, **decoding: float) -> list[float]:
    sampler = Sampler(DecodingConfig(**decoding), "cpu")
    tokens = [sampler.draw(LOGITS) for _ in range(count)]
    return [tokens.count(token) / count for token in range(4)]


def test_greedy_takes_the_likeliest_token():
    sampler = Sampler(DecodingConfig(), "cpu")
    assert sampler.greedy
    assert {sampler.draw(LOGITS) for _ in range(5)} == {0}


def test_the_shares_are_the_probabilities():
    assert drawn(temperature=1.0, seed=1) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_a_temperature_of_a_half_squares_them():
    squares = [0.25, 0.09, 0.0225, 0.0025]
    wanted = [square / sum(squares) for square in squares]
    assert drawn(temperature=0.5, seed=2) == pytest.approx(wanted, abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.01, 1)])
def test_the_nucleus_is_the_fewest_tokens_with_that_probability(top_p: float, kept: int):
    shares = drawn(400, temperature=1.0, top_p=top_p, seed=3)
    assert sum(share > 0 for share in shares) == kept
    assert all(shares[:kept])


def test_no_temperature_is_too_small():
    assert drawn(50, temperature=1e-300, seed=1) == [1, 0, 0, 0]


def test_the_seed_decides_and_others_in_between_do_not():
    one, same, other = (Sampler(DecodingConfig(temperature=1.0, seed=seed), "cpu") for seed in (7, 7, 8))
    first = [one.draw(LOGITS) for _ in range(40)]
    beside = []
    second = []
    for _ in range(40):
        beside.append(other.draw(LOGITS))
        second.append(same.draw(LOGITS))
    assert first == second != beside


def test_log_probabilities_are_of_the_token_with_the_likeliest_beside():
    entries = logprobs_of(torch.stack([LOGITS, LOGITS.flip(0)]), torch.tensor([2, 2]), 2)
    assert [entry.logprob for entry in entries] == pytest.approx([math.log(0.15), math.log(0.3)])
    assert [[token for token, _ in entry.top] for entry in entries] == [[0, 1], [3, 2]]
    assert logprobs_of(LOGITS[None], torch.tensor([0]), 0)[0].top == ()
