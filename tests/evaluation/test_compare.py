from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raytune_ft.evaluation.compare import Difference, difference, judged, outlook, sentence, signed
from raytune_ft.evaluation.statistics import Columns


def mean(sums: Columns) -> np.ndarray:
    return sums["right"] / sums["rows"]


def columns(*right: float) -> Columns:
    return {"right": np.array(right, float), "rows": np.ones(len(right))}


def compared(own: list[float], their: list[float], **settings: Any) -> Difference:
    scores = (np.array(own, float), np.array(their, float))
    return difference(mean, columns(*own), columns(*their), scores=scores, **settings)


def test_rows_where_both_agree_do_not_widen_a_paired_interval() -> None:
    # The models differ on 10 of 100 rows, always the same way; unpaired, the interval would be about +-0.14.
    own, their = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    found = compared(own, their)
    assert found.difference == pytest.approx(0.1)
    assert (found.wins, found.ties, found.losses, found.rows) == (10, 90, 0, 100)
    assert 0.03 < found.low < 0.1 < found.high < 0.17
    assert found.p_value == 2 / 2**10
    assert (found.verdict, found.rows_to_tell) == ("better", None)


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
    assert compared([1.0] * 5, [0.0] * 5).verdict == "cannot tell"
    assert compared([1.0] * 5, [0.0] * 5).rows_to_tell == 6
    assert compared([1.0] * 6, [0.0] * 6).verdict == "better"


def test_a_family_of_comparisons_is_harder_to_convince_than_one() -> None:
    one = compared([1.0] * 7, [0.0] * 7)  # p = 2 / 2^7 = 0.0156
    equal = compared([1.0] * 7, [1.0] * 7)
    assert one.verdict == "better"
    family = judged([one, equal, equal, equal])
    assert family[0].p_adjusted == pytest.approx(4 * 2 / 2**7)  # 0.0625
    assert [found.verdict for found in family] == ["cannot tell"] * 4
    assert {found.tests for found in family} == {4}
    assert judged([one, equal, equal])[0].verdict == "better"  # 0.047


def test_the_rows_it_takes_are_more_than_there_are_and_grow_as_the_difference_shrinks() -> None:
    generator = np.random.default_rng(0)
    own = generator.normal(0, 1, 100)
    needed = []
    for gain in (0.1, 0.05):
        noise = generator.normal(0, 1, 100)
        found = compared(list(own), list(own - gain - (noise - noise.mean())))
        assert found.verdict == "cannot tell"
        needed.append(found.rows_to_tell)
    # Of noise with standard deviation 1: ((1.96 + 0.84) / 0.1)^2 = 785 rows.
    assert needed[0] == pytest.approx(785, rel=0.25)
    assert needed[1] == pytest.approx(4 * 785, rel=0.25)


def test_the_words_carry_the_numbers() -> None:
    better = replace(compared([1.0] * 8 + [0.0] * 2, [0.0] * 10), low=0.5, high=1.0)
    assert sentence(better, model="tuned", other="base", metric="Exact match") == (
        "Exact match: tuned is better than base on 10 rows (difference +0.800, 95% interval +0.500 to +1.000, "
        "p = 0.008; 8 rows won, 2 tied, 0 lost)."
    )
    family = judged([compared([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0])] * 2)
    words = sentence(family[0], model="tuned", other="base", metric="F1")
    assert "F1: cannot tell tuned from base with 4 rows (difference +0.250" in words
    assert "p = 1.000 after Holm's correction for 2 comparisons; 2 rows won, 1 tied, 1 lost)." in words
    assert family[0].rows_to_tell == 103
    assert "about 100 rows would tell. With 4 rows only a difference of 1.3 or more would show" in words
    assert (signed(-0.12345), signed(12345.6)) == ("-0.123", "+1.23e+04")


def test_what_cannot_be_said_is_not_said() -> None:
    same = compared([1.0] * 9, [1.0] * 9)
    assert (same.rows_to_tell, same.visible_difference) == (None, None)
    assert outlook(same) == "They score the same on every row, so how many rows it would take cannot be said."
    even = compared([1.0, 0.0], [0.0, 1.0])
    assert even.rows_to_tell is None
    assert outlook(even).startswith("With 2 rows only a difference of ")


def test_values_beyond_numbers_cannot_be_told_apart_and_break_nothing() -> None:
    def overflowing(sums: Columns) -> np.ndarray:
        with np.errstate(over="ignore"):
            return np.exp(sums["right"] / sums["rows"])

    own, their = np.array([800.0] * 8), np.array([900.0] * 8)
    found = difference(overflowing, columns(*own), columns(*their), scores=(own, their), lower_is_better=True)
    assert (found.verdict, found.visible_difference) == ("cannot tell", None)
    assert sentence(found, model="a", other="b", metric="Perplexity").startswith("Perplexity: cannot tell a from b")


@pytest.mark.parametrize("rows", [1, 5, 6, 30])
def test_rows_that_are_all_won_allow_for_rows_that_stayed_unseen(rows: int) -> None:
    # Of a share u of lost rows none would be among n, at 2.5%: (1 - u)^n = 0.025. It moves +1 to 1 - 2u.
    found = compared([1.0] * rows, [0.0] * rows, best=1.0)
    assert found.low == pytest.approx(2 * 0.025 ** (1 / rows) - 1)
    assert (found.difference, found.high, found.standard_error, found.visible_difference) == (1.0, 1.0, 0.0, None)
    assert found.verdict == ("better" if rows >= 6 else "cannot tell")  # as the sign test: 2 / 2^6 = 0.031
    assert found.rows_to_tell == (None if rows >= 6 else 6)


def test_equal_rows_leave_an_interval_around_zero() -> None:
    found = compared([1.0] * 30, [1.0] * 30, best=1.0)
    unseen = 1 - 0.025 ** (1 / 30)  # 0.116
    assert (found.low, found.high) == (pytest.approx(-unseen), pytest.approx(unseen))
    assert "95% interval -0.116 to +0.116" in sentence(found, model="a", other="b", metric="F1")


def test_a_small_gain_of_every_row_takes_as_many_rows_as_show_that_no_lost_ones_stayed_unseen() -> None:
    # +0.25 on each row is undone by a share of 0.25 / 1.25 = 0.2 lost ones: 0.8^16 = 0.028, 0.8^17 = 0.0225.
    sixteen, seventeen = (compared([0.75] * rows, [0.5] * rows, best=1.0) for rows in (16, 17))
    assert sixteen.p_value < 0.001
    assert (sixteen.verdict, sixteen.rows_to_tell) == ("cannot tell", 17)
    assert seventeen.verdict == "better"
    assert compared([0.5] * 16, [0.75] * 16, best=1.0).rows_to_tell == 17


def test_rounding_alone_is_no_spread() -> None:
    found = compared([0.1, 0.7, 0.3] * 9, [0.1, 0.7, 0.3][::-1] * 9, best=1.0)
    assert found.standard_error > 0
    alike = compared([0.1 + 0.2] * 9, [0.1] * 9, best=1.0)
    assert alike.standard_error == 0.0
    assert alike.low < 0 < alike.high


def test_on_an_open_scale_rows_that_all_differ_alike_have_no_interval_and_the_test_decides() -> None:
    one, six = compared([3.0], [1.0]), compared([3.0] * 6, [1.0] * 6)
    assert math.isnan(one.low) and math.isnan(six.high)
    assert (one.verdict, six.verdict) == ("cannot tell", "better")
    assert sentence(six, model="a", other="b", metric="Reward") == (
        "Reward: a is better than b on 6 rows (difference +2.000, no 95% interval, p = 0.031; 6 rows won, 0 tied, "
        "0 lost)."
    )
    assert outlook(one) == "If the difference is what it seems, about 6 rows would tell."


def test_tiny_scores_win_and_lose_like_large_ones() -> None:
    found = compared([5e-10] * 20, [1e-10] * 20)
    assert (found.wins, found.ties, found.verdict) == (20, 0, "better")
    assert compared([0.1 + 0.2] * 20, [0.3] * 20).ties == 20  # rounding alone
