"""Win rates by hand, kappa by hand, and Bradley and Terry's model against a logistic regression."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from raytune_ft.evaluation.judging import Vote, agreements, bradley_terry, strengths, summarized


def votes(choices: list[str], *, judge: str = "ann", model: str = "tuned", other: str = "base") -> list[Vote]:
    return [Vote(judge, f"row{n}", model, other, choice, model) for n, choice in enumerate(choices)]


def test_ties_and_both_bad_count_half() -> None:
    found = summarized(votes(["model"] * 6 + ["other"] * 2 + ["tie", "both bad"]), ["base", "tuned"])
    rate = found.win_rates[0]
    assert (rate.model, rate.other, rate.rows, rate.win_rate) == ("tuned", "base", 10, 0.7)
    assert rate.votes == {"model": 6, "other": 2, "tie": 1, "both bad": 1}
    assert rate.low < 0.5 < 0.7 < rate.high
    assert rate.words.startswith("People: cannot tell tuned from base on 10 rows (win rate 70%, 95% interval ")
    assert (found.left, found.right) == (6, 2)


def test_a_clear_preference_is_said_in_both_directions() -> None:
    liked = summarized(votes(["model"] * 8), ["base", "tuned"]).win_rates[0]
    assert "tuned is preferred to base on 8 rows" in liked.words
    assert (liked.high, liked.p_value) == (1.0, 2 / 2**8)
    assert liked.low == pytest.approx(0.025 ** (1 / 8))  # Clopper and Pearson: eight of eight
    disliked = summarized(votes(["other"] * 8), ["base", "tuned"]).win_rates[0]
    assert "tuned is liked less than base" in disliked.words


def test_several_judges_of_a_row_are_one_row() -> None:
    both = votes(["model"] * 4) + votes(["model"] * 4, judge="bob")
    rate = summarized(both, ["base", "tuned"]).win_rates[0]
    assert (rate.rows, rate.votes["model"], rate.p_value) == (4, 8, 2 / 2**4)


def test_the_last_vote_of_a_judge_on_a_pair_counts() -> None:
    found = summarized(votes(["model"]) + votes(["other"]), ["base", "tuned"])
    assert (found.votes, found.win_rates[0].win_rate) == (1, 0.0)


def test_kappa_by_hand() -> None:
    # Both say model 20 of 50 times together and other 15 times; ann says model 25, bob 30 times.
    # Agreement 0.7; by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5; kappa 0.2 / 0.5 = 0.4.
    ann = ["model"] * 25 + ["other"] * 25
    bob = ["model"] * 20 + ["other"] * 5 + ["model"] * 10 + ["other"] * 15
    found = agreements(votes(ann) + votes(bob, judge="bob"))
    assert [(a.judge, a.other, a.shared) for a in found] == [("ann", "bob", 50)]
    assert found[0].kappa == pytest.approx(0.4)


def test_kappa_of_one_choice_alone_is_undefined_and_of_no_shared_rows_absent() -> None:
    assert agreements(votes(["tie"] * 3) + votes(["tie"] * 3, judge="bob"))[0].kappa is None
    apart = [Vote("bob", "other row", "tuned", "base", "tie", "base")]
    assert agreements(votes(["tie"]) + apart) == ()


def test_strengths_are_those_of_a_logistic_regression_on_the_same_games() -> None:
    from sklearn.linear_model import LogisticRegression

    wins = np.array([[0, 3, 7], [5, 0, 6], [1, 2, 0]], float)
    games, won, weights = [], [], []
    for winner, loser in itertools.permutations(range(3), 2):
        game = np.zeros(3)
        game[winner], game[loser] = 1, -1
        games.append(game)
        won.append(1)
        weights.append(wins[winner, loser] + 0.5)  # the imaginary tie
        games.append(-game)
        won.append(0)
        weights.append(wins[winner, loser] + 0.5)
    fitted = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=1000)
    theirs = fitted.fit(np.array(games), won, sample_weight=weights).coef_[0]
    ours = bradley_terry(wins[None])[0]
    assert ours == pytest.approx(theirs - theirs.mean(), abs=1e-3)


def test_two_equal_models_and_a_bad_one_are_told_apart() -> None:
    def between(model: str, other: str, choices: list[str]) -> list[Vote]:
        return votes(choices, model=model, other=other)

    cast = between("b", "a", ["model", "other"] * 15) + between("c", "a", ["other"] * 30)
    cast += between("c", "b", ["other"] * 30)
    found = strengths(cast, ["a", "b", "c"])
    assert found["a"][0] == pytest.approx(found["b"][0])
    assert found["c"][2] < 0.2 < 0.5 < found["a"][1]
    assert set(summarized(cast, ["a", "b", "c"]).strengths) == {"a", "b", "c"}
    assert summarized(votes(["tie"]), ["base", "tuned"]).strengths == {}
