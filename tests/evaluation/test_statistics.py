"""Against scipy's resampling, against numbers worked out by hand, and against a simulation for the power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from raytune_ft.evaluation.statistics import (
    Columns,
    fewest_differing_rows,
    holm,
    interval,
    permutation_p_value,
    rows_needed,
    visible_difference,
)


def mean(sums: Columns) -> np.ndarray:
    return sums["right"] / sums["rows"]


def columns(*right: float) -> Columns:
    return {"right": np.array(right, float), "rows": np.ones(len(right))}


def perplexity(sums: Columns) -> np.ndarray:
    return np.exp(sums["nll"] / sums["tokens"])


def corpus(seed: int, shift: float, rows: int = 60) -> Columns:
    generator = np.random.default_rng(seed)
    tokens = np.random.default_rng(99).integers(1, 30, rows).astype(float)
    return {"nll": tokens * (1.0 + shift + 0.2 * generator.standard_normal(rows)), "tokens": tokens}


def test_the_interval_of_a_share_is_near_the_normal_one() -> None:
    # 50 of 200 right: 0.25 +- 1.96 * sqrt(0.25 * 0.75 / 200) = 0.25 +- 0.060.
    found = interval(mean, columns(*[1.0] * 50, *[0.0] * 150))
    assert found.low == pytest.approx(0.19, abs=0.01)
    assert found.high == pytest.approx(0.31, abs=0.01)


def test_the_interval_of_a_corpus_metric_is_that_of_scipys_bootstrap() -> None:
    rows = corpus(0, 0.0)

    def corpus_perplexity(nll: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(nll.sum(axis) / tokens.sum(axis))

    theirs = stats.bootstrap(
        (rows["nll"], rows["tokens"]),
        corpus_perplexity,
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    ours = interval(perplexity, rows)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_where_every_row_is_right_the_interval_is_that_of_clopper_and_pearson() -> None:
    for rows, right in ((8, 1.0), (40, 1.0), (25, 0.0)):
        exact = stats.binomtest(int(rows * right), rows).proportion_ci(0.95, method="exact")
        found = interval(mean, columns(*[right] * rows), best=1.0)
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    open_scale = interval(mean, columns(*[1.0] * 8))  # which has no worst row to allow for
    assert math.isnan(open_scale.low) and math.isnan(open_scale.high)


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    values = columns(*np.random.default_rng(0).random(40))
    assert interval(mean, values, seed=1) == interval(mean, values, seed=1)
    assert interval(mean, values, seed=1) != interval(mean, values, seed=2)


def test_many_rows_are_resampled_in_blocks_with_the_spread_of_their_rows() -> None:
    # 0.5 +- 1.96 * 0.5 / sqrt(rows), whatever the order in which the rows come.
    for rows in (4000, 40_000):
        for right in ([1.0, 0.0] * (rows // 2), [1.0] * (rows // 2) + [0.0] * (rows // 2)):
            found = interval(mean, columns(*right))
            width = 2 * 1.96 * 0.5 / np.sqrt(rows)
            assert found.high - found.low == pytest.approx(width, rel=0.07)
            assert found.low < 0.5 < found.high


def test_a_permutation_test_of_many_rows_agrees_with_the_normal_one() -> None:
    generator = np.random.default_rng(0)
    gain = generator.normal(0.012, 1.0, 20_000)
    expected = 2 * stats.norm.sf(abs(gain.mean()) / (gain.std() / np.sqrt(len(gain))))
    assert 0.01 < expected < 0.5
    assert permutation_p_value(mean, columns(*gain), columns(*np.zeros(20_000))) == pytest.approx(expected, abs=0.03)


def test_a_permutation_test_of_few_rows_is_exact() -> None:
    # Of 2^4 ways to swap 4 differing rows only 2 give a difference as large: 2 / 16, and 1 / 16 in one direction.
    own, their = columns(1, 1, 1, 1, 0), columns(0, 0, 0, 0, 0)
    assert permutation_p_value(mean, own, their) == 2 / 16
    assert permutation_p_value(mean, own, their, alternative="greater") == 1 / 16
    assert permutation_p_value(mean, own, their, alternative="less") == 1.0
    assert permutation_p_value(mean, own, own) == 1.0


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_p_values_are_those_of_scipys_permutation_test(alternative: str) -> None:
    for own, their in (
        ([0.2, 0.9, 0.4, 0.8, 0.7, 0.5, 0.1, 1.0], [0.1, 0.5, 0.5, 0.2, 0.7, 0.4, 0.3, 0.3]),
        (np.random.default_rng(1).random(50), np.random.default_rng(2).random(50) - 0.08),
    ):
        theirs = stats.permutation_test(
            (np.array(own), np.array(their)),
            lambda a, b, axis: np.mean(a - b, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            alternative=alternative,
            rng=np.random.default_rng(3),
        ).pvalue
        ours = permutation_p_value(mean, columns(*own), columns(*their), alternative=alternative)
        assert ours == pytest.approx(theirs, abs=0.015)


def test_a_corpus_metric_is_permuted_as_what_it_is() -> None:
    assert permutation_p_value(perplexity, corpus(1, 0.2), corpus(2, 0.0)) < 0.001
    assert permutation_p_value(perplexity, corpus(1, 0.0), corpus(2, 0.0)) > 0.05


def test_of_equal_models_the_test_finds_a_difference_as_seldom_as_it_says() -> None:
    generator = np.random.default_rng(5)
    found = [
        permutation_p_value(mean, columns(*generator.integers(0, 2, 12)), columns(*generator.integers(0, 2, 12)))
        for _ in range(400)
    ]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1 is 0.03, 0.06, 0.04; a later one is never below an earlier one.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_rows_that_are_needed_follow_from_the_normal_approximation() -> None:
    # ((1.95996 + 0.84162) * 1 / 0.5)^2 = 31.4 rows of standard deviation 1, as in every textbook.
    assert rows_needed(0.5, 1 / np.sqrt(10), 10, alpha=0.05) == 32
    assert visible_difference(0.1, alpha=0.05) == pytest.approx(0.28016, abs=1e-4)
    assert rows_needed(0.0, 0.1, 10, alpha=0.05) is None


def test_so_many_rows_do_see_the_difference_four_times_in_five() -> None:
    generator = np.random.default_rng(0)
    rows = rows_needed(0.3, 1 / np.sqrt(50), 50, alpha=0.05)
    assert rows is not None
    told = [stats.ttest_1samp(generator.normal(0.3, 1, rows), 0).pvalue < 0.05 for _ in range(1000)]
    assert np.mean(told) == pytest.approx(0.8, abs=0.04)


def test_fewer_than_six_differing_rows_reject_nothing_at_5_percent() -> None:
    # 2 / 2^5 = 0.0625 is above 5%, 2 / 2^6 = 0.031 below; 2 / 2^2 is 0.5 exactly.
    assert fewest_differing_rows(0.05) == 6
    assert fewest_differing_rows(0.5) == 2


def test_values_of_any_size_are_told_apart_alike() -> None:
    own, their = np.random.default_rng(1).normal(0.5, 0.3, 40), np.zeros(40)
    expected = permutation_p_value(mean, columns(*own), columns(*their))
    assert expected < 0.001
    for size in (1e-12, 1e9):
        assert permutation_p_value(mean, columns(*(own * size)), columns(*their)) == expected


def test_values_beyond_numbers_are_never_told_apart() -> None:
    lost = {"nll": np.array([1000.0] * 20), "tokens": np.ones(20)}
    fine = {"nll": np.array([1.0] * 20), "tokens": np.ones(20)}
    for own, their in ((lost, fine), (fine, lost), (lost, {**lost, "nll": lost["nll"] + 1})):
        with np.errstate(over="ignore", invalid="ignore"):
            assert permutation_p_value(perplexity, own, their) == 1.0
