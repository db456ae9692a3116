"""Against the integral that it stands for, numbers worked out by hand, and simulations of people who peek."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from raytune_ft.evaluation.always_valid import always_valid_p, always_valid_radius, units_to_tell
from raytune_ft.evaluation.subjects import sample_of, subject_means


def test_the_p_value_is_the_one_worked_out_by_hand() -> None:
    # Variance 0.0004, prior 0.0025: sqrt(0.0029 / 0.0004) * exp(-0.0025 * 0.01 / (2 * 0.0004 * 0.0029))
    # = 2.6926 * exp(-10.7759) = 2.6926 * 2.0896e-5.
    assert always_valid_p(0.1, 0.02, 0.05) == pytest.approx(5.6265e-5, rel=1e-3)
    assert always_valid_p(0.0, 0.02, 0.05) == 1.0


@pytest.mark.parametrize(("difference", "error", "scale"), [(0.1, 0.04, 0.05), (-0.03, 0.01, 0.02), (0.5, 0.2, 0.1)])
def test_the_p_value_is_one_over_the_mixed_likelihood_ratio(difference: float, error: float, scale: float) -> None:
    def mixed(true: float) -> float:
        return stats.norm.pdf(difference, true, error) * stats.norm.pdf(true, 0, scale)

    ratio = integrate.quad(mixed, -3, 3, points=[0, difference])[0] / stats.norm.pdf(difference, 0, error)
    assert always_valid_p(difference, error, scale) == pytest.approx(min(1, 1 / ratio), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_interval_leaves_out_zero_exactly_where_the_p_value_tells(alpha: float) -> None:
    radius = always_valid_radius(0.03, 0.05, alpha=alpha)
    assert always_valid_p(radius * 1.0001, 0.03, 0.05) < alpha < always_valid_p(radius * 0.9999, 0.03, 0.05)


@pytest.mark.parametrize("error", [0.0, math.inf, math.nan])
def test_where_nothing_is_known_of_the_spread_nothing_is_told(error: float) -> None:
    assert always_valid_p(0.5, error, 0.05) == 1.0
    assert always_valid_radius(error, 0.05, alpha=0.05) == math.inf
    assert units_to_tell(0.5, error, 100, 0.05, alpha=0.05) is None
    assert always_valid_p(math.nan, 0.1, 0.05) == 1.0


def looks(rng: np.random.Generator, *, gain: float = 0.0, subjects: int = 500, events: int = 8, times: int = 40):
    """Differences and standard errors as seen while subjects come, and come back, and rate as they are used to."""
    chance = [np.clip(rng.beta(0.6, 0.6, subjects) + shift, 0, 1) for shift in (0.0, gain)]
    order = [rng.permutation(np.repeat(np.arange(subjects), events)) for _ in chance]
    rated = [(rng.random(len(who)) < p[who]).astype(float) for who, p in zip(order, chance, strict=True)]
    for seen in np.linspace(160, subjects * events, times).astype(int):
        samples, naive = [], []
        for who, good in zip(order, rated, strict=True):
            counted = np.arange(len(who)) < seen
            samples.append(sample_of(subject_means(good, counted, who, subjects), share=True))
            naive.append(good[:seen].var() / seen)
        if min(sample.subjects for sample in samples) >= 100:
            error = math.sqrt(sum(sample.variance for sample in samples))
            yield samples[1].mean - samples[0].mean, error, math.sqrt(sum(naive))


def test_of_tests_without_a_difference_that_are_looked_at_40_times_few_are_told_and_of_naive_ones_most() -> None:
    rng = np.random.default_rng(7)
    runs = 200
    always = fixed = of_requests = 0
    for _ in range(runs):
        seen = list(looks(rng))
        always += any(always_valid_p(gap, error, 0.05) <= 0.05 for gap, error, _ in seen)
        fixed += any(2 * stats.norm.sf(abs(gap) / error) <= 0.05 for gap, error, _ in seen)
        of_requests += any(2 * stats.norm.sf(abs(gap) / error) <= 0.05 for gap, _, error in seen)
    assert always / runs <= 0.05
    assert fixed / runs > 0.1, "a test for one look, made at each, is what this guards from"
    assert of_requests / runs > 0.4, "as is taking requests of the same people for independent ones"


@pytest.mark.parametrize("chance", [0.02, 0.6])
def test_many_looks_at_new_subjects_only_tell_no_more_often(chance: float) -> None:
    rng = np.random.default_rng(3)
    runs, told = 400, 0
    for _ in range(runs):
        one, other = (np.cumsum(rng.random(4000) < chance) for _ in range(2))
        for n in np.unique(np.geomspace(100, 4000, 60).astype(int)):
            means = [float(sums[n - 1]) / n for sums in (one, other)]
            # As `sample_of` counts the spread of shares.
            spread = sum(n * m * (1 - m) + m**2 + (1 - m) ** 2 for m in means) / (n - 1) / n
            if always_valid_p(means[1] - means[0], math.sqrt(spread), 0.05) <= 0.05:
                told += 1
                break
    assert told / runs <= 0.05


def test_the_planned_number_of_units_tells_four_times_in_five() -> None:
    # Normal values of spread 1: 1000 units give a standard error of 2 / sqrt(1000).
    error = 2 / math.sqrt(1000)
    needed = units_to_tell(0.1, error, 1000, 0.05, alpha=0.05)
    assert needed is not None and needed > 1000
    at_the_end = 2 / math.sqrt(needed)
    gaps = np.random.default_rng(0).normal(0.1, at_the_end, 4000)
    told = np.mean([always_valid_p(gap, at_the_end, 0.05) <= 0.05 for gap in gaps])
    assert told == pytest.approx(0.8, abs=0.03)
    assert units_to_tell(0.0, error, 1000, 0.05, alpha=0.05) is None
