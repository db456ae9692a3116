"""Numbers worked out by hand, and the claim that repeating one's requests adds no knowledge of people."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raytune_ft.evaluation.subjects import quantile_interval, sample_of, subject_means


def test_a_subject_counts_once_by_the_mean_of_its_requests_that_count() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    subject = np.array([0, 0, 1, 2, 3])
    counted = np.array([True, True, True, False, True])
    found = subject_means(values, counted, subject, 5)
    assert found[:2].tolist() == [0.5, 1.0]
    assert found[3] == 0.0
    assert np.isnan(found[[2, 4]]).all(), "without a request that counts there is no value"


def test_the_variance_of_shares_counts_two_imaginary_subjects() -> None:
    # Mean 0.75; squared distances 3 * 0.0625 + 0.5625 = 0.75, of the imaginary two 0.5625 + 0.0625 = 0.625;
    # (0.75 + 0.625) / 3 / 4 = 0.114583. As times, without them: 0.75 / 3 / 4 = 0.0625.
    means = np.array([1.0, 0.0, 1.0, math.nan, 1.0])
    found = sample_of(means, share=True)
    assert (found.subjects, found.mean) == (4, 0.75)
    assert found.variance == pytest.approx(1.375 / 12)
    assert sample_of(means, share=False).variance == pytest.approx(0.0625)


def test_a_variant_without_an_error_may_still_have_some() -> None:
    assert sample_of(np.zeros(200), share=True).variance > 0


@pytest.mark.parametrize("means", [[], [0.5]])
def test_of_less_than_two_subjects_the_spread_is_unknown(means: list[float]) -> None:
    assert sample_of(np.array(means), share=True).variance == math.inf


def test_a_quantiles_interval_counts_subjects_not_requests() -> None:
    # Of 1 to 100, one request each: the share up to the median is 0.5 with the error sqrt(100 / 99 * 25) / 100, which
    # is 0.0503; 1.96 of these to both sides are the quantiles 0.4015 and 0.5985, at 1 + 99 * 0.4015 = 40.75 and 60.25.
    values, subject = np.arange(1.0, 101.0), np.arange(100)
    median, low, high = quantile_interval(values, subject, 0.5)
    assert (median, low, high) == pytest.approx((50.5, 40.75, 60.25), abs=0.02)
    often = quantile_interval(np.repeat(values, 9), np.repeat(subject, 9), 0.5)
    assert often[1:] == pytest.approx((low, high), abs=0.6), "asking nine times says no more of people"


def test_a_quantiles_interval_holds_the_true_one_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    true = float(stats.norm.ppf(0.9, 0, math.sqrt(2)))
    held = 0
    for _ in range(400):
        own = rng.standard_normal(150)
        subject = np.repeat(np.arange(150), 4)
        values = own[subject] + rng.standard_normal(600)
        _, low, high = quantile_interval(values, subject, 0.9)
        held += low <= true <= high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_of_one_subject_the_interval_is_all_that_was_seen() -> None:
    assert quantile_interval(np.array([1.0, 2.0, 4.0]), np.zeros(3, dtype=np.int64), 0.5) == (2.0, 1.0, 4.0)
