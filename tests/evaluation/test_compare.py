from __future__ import annotations

import numpy as np
import pytest

from raytune_ft.evaluation.compare import Columns, Difference, difference, interval, rows_to_tell, sentence, signed


def mean(sums: Columns) -> np.ndarray:
    return sums["right"] / sums["rows"]


def columns(*right: float) -> Columns:
    return {"right": np.array(right, float), "rows": np.ones(len(right))}


def compared(own: list[float], their: list[float], **settings: bool) -> Difference:
    scores = (np.array(own, float), np.array(their, float))
    return difference(mean, columns(*own), columns(*their), scores=scores, **settings)


def test_the_interval_of_a_share_is_near_the_normal_one() -> None:
    # 50 of 200 right: 0.25 +- 1.96 * sqrt(0.25 * 0.75 / 200) = 0.25 +- 0.060.
    found = interval(mean, columns(*[1.0] * 50, *[0.0] * 150))
    assert found.low == pytest.approx(0.19, abs=0.01)
    assert found.high == pytest.approx(0.31, abs=0.01)


def test_rows_where_both_agree_do_not_widen_a_paired_interval() -> None:
    # The models differ on 10 of 100 rows, always the same way; unpaired, the interval would be about +-0.14.
    own, their = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    found = compared(own, their)
    assert found.difference == pytest.approx(0.1)
    assert (found.wins, found.ties, found.losses, found.rows) == (10, 90, 0, 100)
    assert 0.03 < found.low < 0.1 < found.high < 0.17
    assert found.verdict == "better"


def test_the_other_way_round_is_worse() -> None:
    assert compared([0.0] * 20, [1.0] * 20).verdict == "worse"


def test_where_lower_is_better_a_smaller_value_wins() -> None:
    found = compared([1.0] * 20, [3.0] * 20, lower_is_better=True)
    assert found.difference == -2.0
    assert (found.wins, found.losses, found.verdict) == (20, 0, "better")


def test_an_interval_around_zero_cannot_tell() -> None:
    found = compared([1.0, 0.0] * 10 + [1.0], [0.0, 1.0] * 10 + [0.0])
    assert found.low < 0 < found.high
    assert found.verdict == "cannot tell"


def test_five_differing_rows_cannot_tell_and_six_can() -> None:
    # 2 / 2^5 = 0.0625 is above 5%, 2 / 2^6 = 0.031 below.
    assert rows_to_tell(0.95) == 6
    assert compared([1.0] * 5, [0.0] * 5).verdict == "cannot tell"
    assert compared([1.0] * 6, [0.0] * 6).verdict == "better"


def test_the_same_seed_gives_the_same_interval_and_another_another() -> None:
    values = columns(*np.random.default_rng(0).random(40))
    assert interval(mean, values, seed=1) == interval(mean, values, seed=1)
    assert interval(mean, values, seed=1) != interval(mean, values, seed=2)


def test_many_rows_are_resampled_in_chunks() -> None:
    found = interval(mean, columns(*([1.0, 0.0] * 5000)))
    assert found.low == pytest.approx(0.4902, abs=0.001)
    assert found.high == pytest.approx(0.5098, abs=0.001)


def test_the_words_carry_the_numbers() -> None:
    found = Difference(0.5, 0.25, 0.75, 0.95, wins=6, ties=3, losses=1, verdict="better")
    assert sentence(found, model="tuned", other="base", metric="Exact match") == (
        "Exact match: tuned is better than base on 10 rows (difference +0.500, 95% interval +0.250 to +0.750; "
        "6 rows won, 3 tied, 1 lost)."
    )
    unsure = Difference(0.1, -0.1, 0.3, 0.95, wins=2, ties=1, losses=1, verdict="cannot tell")
    assert "cannot tell tuned from base with 4 rows" in sentence(unsure, model="tuned", other="base", metric="F1")
    assert (signed(-0.12345), signed(12345.6)) == ("-0.123", "+1.23e+04")
