from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from raytune_ft.evaluation.compare import Difference, difference, judged, outlook, sentence, signed
from raytune_ft.evaluation.statistics import Columns


def mean(sums: Columns) -> np.ndarray:
    return sums["right"] / sums["rows"]


def columns(*right: float) -> Columns:
    return {"right": np.array(right, float), "rows": np.ones(len(right))}


def compared(own: list[float], their: list[float], **settings: bool) -> Difference:
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


def test_tiny_scores_win_and_lose_like_large_ones() -> None:
    found = compared([5e-10] * 20, [1e-10] * 20)
    assert (found.wins, found.ties, found.verdict) == (20, 0, "better")
    assert compared([0.1 + 0.2] * 20, [0.3] * 20).ties == 20  # rounding alone
