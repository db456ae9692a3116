"""What to do, by every way that a test can turn out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.evaluation.ab_result import ABResult, Decision, analysed, decided, mismatch_p
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.contrasts import contrasts_of, measures_of, values_by_subject
from raytune_ft.evaluation.exposures import Exposures, LogFiles, read_exposures
from raytune_ft.evaluation.ratings import Ratings, read_ratings

from .ab_logs import exposure, feedback, write_lines, write_test

SAME = {"base": 0.6, "new": 0.6}
BETTER = {"base": 0.5, "new": 0.8}


def analyse(tmp_path: Path, *, config: dict[str, Any] | None = None, feedback: bool = True, **log: Any) -> ABResult:
    where, said = write_test(tmp_path, **{"good": SAME, "subjects": 1500, **log})
    exposures = read_exposures(where)
    ratings = read_ratings(said if feedback else None, exposures)
    return analysed(exposures, ratings, ABAnalysisConfig(exposures_path=where, **(config or {})))


def test_better_ratings_and_guardrails_that_hold_promote(tmp_path: Path) -> None:
    (decision,) = analyse(tmp_path, good=BETTER).decisions
    assert decision.action == "promote"
    assert decision.words == (
        "new: promote it in the place of base: its answers are rated better, and all guardrails hold."
    )


def test_a_regression_keeps_the_old_one_however_well_the_new_is_rated(tmp_path: Path) -> None:
    slow = analyse(tmp_path / "slow", good=BETTER, latency={"new": 1.4})
    assert slow.decisions[0].action == "keep"
    assert slow.decisions[0].words.startswith(
        "new: keep base: regression of latency (+39.1%, at least +35.1%; +10.0% is"
    )
    failing = analyse(tmp_path / "failing", good=BETTER, errors={"new": 0.08})
    assert failing.decisions[0].action == "keep"
    assert "regression of errors (+0.0" in failing.decisions[0].words
    assert failing.variants[1].unanswered["500"] == pytest.approx(0.08 * failing.variants[1].requests, rel=0.2)


def test_of_two_better_variants_it_is_said_that_neither_is_shown_the_best(tmp_path: Path) -> None:
    shares = {"base": 0.4, "new": 0.3, "other": 0.3}
    found = analyse(tmp_path, good={"base": 0.4, "new": 0.8, "other": 0.8}, subjects=2500, shares=shares)
    assert [decision.action for decision in found.decisions] == ["promote", "promote"]
    assert "new, other are each better than base; which of them is best was not tested." in found.notes


def test_worse_ratings_keep_the_old_one(tmp_path: Path) -> None:
    (decision,) = analyse(tmp_path, good={"base": 0.8, "new": 0.5}).decisions
    assert (decision.action, decision.words) == ("keep", "new: keep base: its answers are rated worse.")


def test_a_gain_that_is_ruled_out_ends_the_test(tmp_path: Path) -> None:
    (decision,) = analyse(tmp_path, subjects=4000, rate=0.9, config={"min_effect": 0.1}).decisions
    assert decision.action == "keep"
    assert "a gain of 0.1 in good ratings is ruled out" in decision.words


def test_what_is_not_settled_goes_on_with_how_many_more_it_takes(tmp_path: Path) -> None:
    (decision,) = analyse(tmp_path, good={"base": 0.60, "new": 0.66}, subjects=800, seed=1).decisions
    assert decision.action == "go on"
    assert "not settled yet: good ratings" in decision.words
    assert "If things are what they seem, about" in decision.words
    assert decision.more_subjects is not None and decision.more_subjects > 100


def test_the_number_of_further_subjects_is_about_right(tmp_path: Path) -> None:
    log = {"good": {"base": 0.5, "new": 0.6}, "requests": 2, "rate": 1.0}
    before = analyse(tmp_path / "before", subjects=600, seed=3, **log)
    more = before.decisions[0].more_subjects
    assert more is not None
    told = [
        analyse(tmp_path / str(seed), subjects=600 + more, seed=seed, **log).contrasts[0].verdict == "better"
        for seed in range(10, 15)
    ]
    assert sum(told) >= 3


def test_few_subjects_settle_nothing(tmp_path: Path) -> None:
    (decision,) = analyse(tmp_path, good={"base": 0.0, "new": 1.0}, subjects=120).decisions
    assert decision.action == "go on"
    assert "100 are needed" in decision.words


def test_without_feedback_the_guardrails_alone_are_looked_at(tmp_path: Path) -> None:
    calm = analyse(tmp_path / "calm", feedback=False)
    assert calm.decisions[0].action == "go on"
    assert "Nobody has rated an answer: ratings decide." in calm.decisions[0].words
    slow = analyse(tmp_path / "slow", feedback=False, latency={"new": 1.4})
    assert slow.decisions[0].action == "keep"


def test_ratings_that_are_all_neutral_are_counted_and_not_called_none(tmp_path: Path) -> None:
    def words(*ratings: int) -> str:
        lines = [exposure(n, ("base", "new")[n % 2], f"s{n}") for n in range(4)]
        where = write_lines(tmp_path / f"log{ratings}/a.jsonl", lines)
        said = write_lines(tmp_path / f"said{ratings}/a.jsonl", [feedback(n, given) for n, given in enumerate(ratings)])
        exposures = read_exposures(str(where))
        found = analysed(exposures, read_ratings(str(said), exposures), ABAnalysisConfig(exposures_path=str(where)))
        return found.decisions[0].words

    assert words(3, 3, 3).endswith(
        "All 3 ratings are neutral (3 of 5), neither good nor bad: ratings of good or bad decide."
    )
    assert "The one rating is neutral (3 of 5)" in words(3)
    assert "Nobody has rated an answer: ratings decide." in words()
    assert "neutral" not in words(3, 5)


def test_the_split_is_tested_by_chi_square() -> None:
    # 5200 and 4800 for 5000 each: 2 * 200^2 / 5000 = 16, of one degree of freedom p = 6.3e-5.
    assert mismatch_p([5200, 4800], [0.5, 0.5]) == pytest.approx(6.334e-5, rel=1e-3)
    assert mismatch_p([500, 300, 200], [0.5, 0.3, 0.2]) == 1.0
    assert mismatch_p([38, 2], [0.999, 0.001]) == 1.0, "0.04 were expected: too few to test"


def test_a_split_that_is_not_what_was_set_refuses_to_conclude(tmp_path: Path) -> None:
    def lost(rng: np.random.Generator) -> np.ndarray:
        return (rng.random(1500) < 0.42).astype(int)

    found = analyse(tmp_path, good=BETTER, latency={"new": 1.5}, assigned=lost)
    assert found.mismatch_p < 0.001
    assert [decision.action for decision in found.decisions] == ["cannot conclude"]
    assert "the subjects are not split as they should be" in found.decisions[0].words
    assert "750, 750 were expected" in found.decisions[0].words


def test_a_split_as_it_was_set_is_rarely_called_broken() -> None:
    rng = np.random.default_rng(0)
    counts = rng.multinomial(5000, [0.5, 0.3, 0.2], size=2000)
    assert np.mean([mismatch_p(count.tolist(), [0.5, 0.3, 0.2]) < 0.001 for count in counts]) < 0.004


def test_subjects_with_two_variants_refuse_to_conclude(tmp_path: Path) -> None:
    lines = [exposure(n, "new" if n % 2 else "base", f"s{n // 2}") for n in range(10)]
    exposures = read_exposures(str(write_lines(tmp_path / "ab/e.jsonl", lines)))
    config = ABAnalysisConfig(exposures_path="ab")
    (decision,) = analysed(exposures, read_ratings(None, exposures), config).decisions
    assert decision.action == "cannot conclude"
    assert "5 subjects were given more than one variant" in decision.words


def test_who_rates_more_is_told_before_ratings_are_believed(tmp_path: Path) -> None:
    lines = [exposure(n, "new" if n % 2 else "base", f"s{n}", sticky=n > 9) for n in range(2000)]
    lines += [exposure(5000, "base", "s0", status=499)]
    exposures = read_exposures(str(write_lines(tmp_path / "ab/e.jsonl", lines)))
    ratings = read_ratings(None, exposures)
    ratings.rated[1:2000:2] = True
    found = analysed(exposures, ratings, ABAnalysisConfig(exposures_path="ab"))
    told = " ".join(found.notes)
    assert "10 requests (0%) did not say who asks" in told
    assert "The test has run for 1.4 hours" in told
    assert "1 requests have no answer because the client went away" in told
    assert "Rated answers: new differs from base" in told
    assert "compares different people" in told


def peeks(rng: np.random.Generator, *, subjects: int, gain: float = 0.0, looks: int = 10) -> Iterator[list[Decision]]:
    """What would be decided, at ten looks, of a test of three variants whose subjects come back, each with habits of
    their own: how often they are content, how often they rate, how long their answers are."""
    config = ABAnalysisConfig(exposures_path="ab")
    names = ("base", "new", "other")
    variant = rng.choice(3, subjects, p=[0.4, 0.3, 0.3])
    who = rng.permutation(np.repeat(np.arange(subjects), 6))
    requests = len(who)
    content = np.clip(rng.beta(0.8, 0.8, subjects) + gain * (variant == 1), 0, 1)
    good = (rng.random(requests) < content[who]).astype(float)
    said = rng.random(requests) < rng.beta(1, 2, subjects)[who]
    seconds = np.exp((0.3 * rng.standard_normal(subjects))[who] + 0.3 * rng.standard_normal(requests))
    status = np.where(rng.random(requests) < 0.01, 500, 200)
    when = np.arange(requests, dtype=float)
    whole = Exposures(
        "spring", dict(zip(names, (0.4, 0.3, 0.3), strict=True)), variant[who], who, when, status, seconds,
        seconds / 4, seconds, variant, {}, 0, 0, LogFiles("ab"),
    )  # fmt: skip
    for seen in np.linspace(requests // looks, requests, looks).astype(int):
        known = (said & (status == 200))[:seen]
        ratings = Ratings(np.where(known, good[:seen], np.nan), known, when[:seen], 0, 0)
        columns = ("variant", "subject", "time", "status", "latency_s", "first_token_s", "tokens")
        so_far = replace(whole, **{name: getattr(whole, name)[:seen] for name in columns})
        contrasts = contrasts_of(so_far, values_by_subject(measures_of(config), so_far, ratings), config)
        yield [decided([one for one in contrasts if one.variant == name], config, subjects) for name in names[1:]]


def test_of_tests_without_a_difference_that_are_looked_at_ten_times_almost_none_is_decided_falsely() -> None:
    rng = np.random.default_rng(0)
    runs, found = 40, 0
    for _ in range(runs):
        decisions = [one for look in peeks(rng, subjects=1200) for one in look]
        found += any(one.action == "promote" or "regression" in one.words or "worse" in one.words for one in decisions)
    assert found / runs <= 0.05


def test_a_real_gain_is_promoted_and_a_variant_without_one_is_not() -> None:
    rng = np.random.default_rng(1)
    runs = [list(peeks(rng, subjects=4000, gain=0.2)) for _ in range(10)]
    assert sum(any(new.action == "promote" for new, _ in looks) for looks in runs) >= 8
    assert not any(other.action == "promote" for looks in runs for _, other in looks)
