"""What a pass's losses mean for each trial."""

from __future__ import annotations

import math

import pytest
import torch

from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.training.bank.criterion import Examples
from raytune_ft.training.bank.layout import Share
from raytune_ft.training.bank.preferences import Preferences, Ratings, criterion_for
from raytune_ft.training.config import DistillationConfig, FineTuningConfig
from raytune_ft.training.config_alignment import PreferenceConfig, RewardConfig

COMMON = {"model_path": "m", "dataset_path": "d", "output_dir": "o"}


def row(tokens: int) -> Encoded:
    return Encoded(list(range(tokens)), [True] * tokens)


def share(name: str, *tokens: int, reference: tuple[float, ...] = ()) -> Share:
    return Share(name, [row(count) for count in tokens], known=[(nats,) for nats in reference])


def test_a_trials_sum_takes_in_its_own_targets_only() -> None:
    shares = [share("a", 3), share("b"), share("c", 2), share("d", 2)]
    batch = pack([row for some in shares for row in some.rows])
    losses = torch.tensor([1.0, 2.0, torch.nan, 4.0])
    sums, later = Examples().graded(losses, batch, shares, torch.tensor([2, 0, 1, 1]), {})
    assert sums[[0, 1, 3]].tolist() == [[3.0], [0.0], [4.0]]
    assert sums[2].isnan() and later is None


def test_pairs_are_weighed_by_their_own_trials_terms() -> None:
    """By hand: the log-ratios of trial a are 1 and -1, its loss -log sigmoid(2 * beta); those of b are 4 and 1, its
    loss (4 / 2 - 1 / 1 - 1 / (2 * beta))^2, with answers of two tokens and one."""
    pairs = Preferences()
    pairs.admit("a", PreferenceConfig(**COMMON, beta=0.5))
    pairs.admit("b", PreferenceConfig(**COMMON, beta=1.0, loss_type="ipo"))
    shares = [share("a", 2, 2, reference=(-3.0, -1.0)), share("b", 3, 2, reference=(-6.0, -2.0))]
    batch = pack([row for some in shares for row in some.rows])
    losses = torch.tensor([2.0, 2.0, 0.5, 1.5, 1.0])
    sums, each = pairs.graded(losses, batch, shares, torch.tensor([2, 3]), {"a": 0.5, "b": 1.0})
    sigmoid = 1 / (1 + math.exp(-1))
    assert sums[0].tolist() == pytest.approx([-math.log(sigmoid), 1.0, 1.0, 0.5, 2.0], abs=1e-6)
    assert sums[1].tolist() == pytest.approx([0.25, 1.0, 3.0, 4.0, 1.0], abs=1e-6)
    slope = 0.5 * (1 - sigmoid)  # beta * (1 - sigmoid) a nat, and each pair of a counts a half
    assert each is not None
    assert each.tolist() == pytest.approx([0.5 * slope, -0.5 * slope, -0.5, -0.5, 1.0], abs=1e-6)
    assert pairs.graded(losses, batch, shares, torch.tensor([2, 3]), None)[1] is None


def test_a_pair_that_is_no_number_stays_with_its_trial() -> None:
    pairs = Preferences()
    for name in "ab":
        pairs.admit(name, PreferenceConfig(**COMMON))
    shares = [share("a", 2, 2, reference=(torch.nan, 0.0)), share("b", 2, 2, reference=(0.0, 0.0))]
    batch = pack([row for some in shares for row in some.rows])
    sums, each = pairs.graded(torch.ones(4), batch, shares, torch.tensor([2, 2]), {"a": 1.0, "b": 1.0})
    assert each is not None and sums[0, 0].isnan() and each[:2].isnan().all()
    assert sums[1].isfinite().all() and each[2:].isfinite().all()


def test_an_answers_loss_is_held_against_its_own_trials_point() -> None:
    """By hand: what stands beside is 3 and -1 nats above the base for trial a, 1 at the mean, and below it for b."""
    ratings = Ratings()
    ratings.admit("a", PreferenceConfig(**COMMON, loss_type="kto", beta=1.0))
    ratings.admit("b", PreferenceConfig(**COMMON, loss_type="kto", beta=2.0, undesirable_weight=0.5))
    whole = Share("a", [row(2)] * 4, known=[(-3.0, 1.0), (-5.0, 1.0), (-1.0, 0.0), (-2.0, 0.0)], together=2)
    learned, beside = ratings.divided(whole)
    assert beside is not None and (learned.known, beside.known) == (whole.known[::2], whole.known[1::2])
    ratings.note(beside, [-2.0, -3.0])
    ratings.note(Share("b", [row(2)], known=[(-1.0, 1.0)]), [-4.0])
    assert (ratings.told("a"), ratings.told("b")) == ({"kl": 1.0}, {"kl": 0.0})
    shares = [learned, Share("b", [row(2)], known=[(-1.0, 0.0)])]
    batch = pack([row for some in shares for row in some.rows])
    sums, each = ratings.graded(torch.tensor([2.0, 1.0, 1.0]), batch, shares, torch.tensor([2, 1]), {"a": 0.5, "b": 1})
    # Log-ratios: 1 (liked) and 0 (disliked) against a point of 1; 0 (disliked) against 0.
    below = 1 / (1 + math.exp(1))
    assert sums[0].tolist() == pytest.approx([0.5 + (1 - 1 / (1 + math.exp(-1))), 1.0], abs=1e-6)
    assert sums[1].tolist() == pytest.approx([0.25, 1.0], abs=1e-6)
    assert each is not None
    assert each.tolist() == pytest.approx([0.5 * 0.25, -0.5 * below * (1 - below), -0.5 * 2 * 0.25], abs=1e-6)


def test_a_trial_that_learns_something_else_is_refused() -> None:
    examples, pairs = FineTuningConfig(**COMMON), PreferenceConfig(**COMMON)
    teacher = DistillationConfig(**COMMON, teacher_path="t")
    rated = PreferenceConfig(**COMMON, loss_type="kto")
    assert Examples().refusal(examples) is None and Preferences().refusal(pairs) is None
    assert Examples().refusal(teacher) == "distillation computes a teacher beside it"
    assert Examples().refusal(RewardConfig(**COMMON)) == "its trials learn from examples"
    assert Preferences().refusal(examples) == "its trials learn from pairs of answers"
    assert Preferences().refusal(rated) == "loss_type kto learns from single answers"
    assert Ratings().refusal(pairs) == "its trials learn from rated answers (loss_type kto)"
    for config, kind in ((examples, Examples), (pairs, Preferences), (rated, Ratings)):
        assert type(criterion_for(config)) is kind and criterion_for(config).refusal(config) is None
