"""A variant against the control: whole samples with numbers worked out by hand, and logs with a known truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.evaluation.always_valid import units_to_tell
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.contrasts import contrast, contrasts_of, measures_of, values_by_subject
from raytune_ft.evaluation.exposures import read_exposures
from raytune_ft.evaluation.ratings import read_ratings
from raytune_ft.evaluation.statistics import holm
from raytune_ft.evaluation.subjects import Sample

from .ab_logs import exposure, feedback, write_lines, write_test

CONFIG = ABAnalysisConfig(exposures_path="ab")
GOOD, ERRORS, LATENCY, FIRST_TOKEN, RATED = measures_of(CONFIG)


def sample(mean: float, error: float, subjects: int = 1000) -> Sample:
    return Sample(subjects, mean, error**2)


def test_a_difference_has_the_error_of_both_sides_and_the_always_valid_interval() -> None:
    # Errors 0.012 and 0.016: 0.020 together, variance 0.0004; difference 0.1, prior 0.0025.
    # Radius: sqrt(0.0004 * 0.0029 / 0.0025 * (ln 7.25 + 2 ln 20)) = sqrt(4.64e-4 * 7.9725) = 0.06082.
    found = contrast(GOOD, "new", "base", (sample(0.7, 0.012), sample(0.6, 0.016)), CONFIG)
    assert found.standard_error == pytest.approx(0.02)
    assert (found.low, found.high) == pytest.approx((0.1 - 0.06082, 0.1 + 0.06082), abs=1e-5)
    assert found.p_value == pytest.approx(5.6265e-5, rel=1e-3)
    assert found.verdict == "better"
    assert found.words == (
        "Good ratings: new is better than base (0.700 of 1000 subjects against 0.600 of 1000; difference +0.100, "
        "interval +0.039 to +0.161)."
    )


def test_with_too_few_subjects_nothing_is_told_of_the_largest_difference() -> None:
    found = contrast(GOOD, "new", "base", (sample(0.9, 0.01, 99), sample(0.1, 0.01)), CONFIG)
    assert (found.p_value, found.verdict, found.enough) == (1.0, "cannot tell", False)
    assert "too few subjects" in found.words
    assert found.share_to_tell == pytest.approx(100 / 99)


def test_what_it_takes_is_to_tell_the_difference_or_to_rule_a_gain_out_whichever_comes_first() -> None:
    # Next to no difference: to tell it would take thousands of times the subjects, to rule 0.05 out a few times.
    little = contrast(GOOD, "new", "base", (sample(0.601, 0.015), sample(0.6, 0.015)), CONFIG)
    error = math.hypot(0.015, 0.015)
    needed = units_to_tell(0.049, error, 2000, 0.05, alpha=1 - CONFIG.confidence)
    assert needed is not None
    assert little.share_to_tell == pytest.approx(needed / 2000, rel=1e-6)
    large = contrast(GOOD, "new", "base", (sample(0.655, 0.015), sample(0.6, 0.015)), CONFIG)
    assert large.verdict == "cannot tell"
    assert large.share_to_tell is not None and 1 < large.share_to_tell < little.share_to_tell


def test_a_guardrail_is_broken_only_by_a_rise_beyond_what_is_allowed() -> None:
    slower = math.log(1.08)
    held = contrast(LATENCY, "new", "base", (sample(slower, 0.002), sample(0.0, 0.002)), CONFIG)
    assert (held.verdict, held.p_value) == ("holds", 1.0), "slower, but by less than 10%"
    broken = contrast(LATENCY, "new", "base", (sample(math.log(1.2), 0.01), sample(0.0, 0.01)), CONFIG)
    assert broken.verdict == "worse"
    assert "difference +20.0%" in broken.words and "+10.0% is allowed" in broken.words
    quicker = contrast(LATENCY, "new", "base", (sample(-0.5, 0.01), sample(0.0, 0.01)), CONFIG)
    assert quicker.verdict == "holds"
    unclear = contrast(ERRORS, "new", "base", (sample(0.02, 0.01), sample(0.01, 0.01)), CONFIG)
    assert unclear.verdict == "cannot tell"


def log_of(tmp_path: Path, *lines: dict, said: list[dict] | None = None):
    found = read_exposures(str(write_lines(tmp_path / "ab/e.jsonl", list(lines))))
    path = str(write_lines(tmp_path / "fb/f.jsonl", said)) if said else None
    return found, read_ratings(path, found)


def test_what_is_measured_of_each_subject_is_the_mean_over_its_requests(tmp_path: Path) -> None:
    failed = {"id": None, "first_token_s": None, "completion_tokens": None}
    exposures, ratings = log_of(
        tmp_path,
        exposure(0, "new", "a", latency_s=1.0, first_token_s=0.5),
        exposure(1, "new", "a", latency_s=4.0, first_token_s=None),
        exposure(2, "new", "a", status=500, latency_s=9.0, **failed),
        exposure(3, "base", "b", status=400, latency_s=0.001, **failed),
        exposure(4, "base", "b", status=499, latency_s=30.0, **failed),
        exposure(5, "base", "c", latency_s=2.0),
        said=[feedback(0, "up"), feedback(1, "down"), feedback(5, 3)],
    )
    found = values_by_subject(measures_of(CONFIG), exposures, ratings)
    nan = math.nan
    expected = {
        "good": [0.5, nan, nan],
        "errors": [1 / 3, nan, 0.0],
        # The geometric mean of 1 s and 4 s is 2 s; what failed, or was not waited for, has no time.
        "latency": [math.log(2), nan, math.log(2)],
        "first_token": [math.log(0.5), nan, math.log(0.25)],
        "rated": [1.0, nan, 1.0],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)


def test_all_measures_of_all_variants_are_one_family(tmp_path: Path) -> None:
    where, said = write_test(
        tmp_path, good={"base": 0.5, "new": 0.8, "other": 0.5}, subjects=1500,
        shares={"base": 0.4, "new": 0.3, "other": 0.3},
    )  # fmt: skip
    exposures = read_exposures(where)
    ratings = read_ratings(said, exposures)
    values = values_by_subject(measures_of(CONFIG), exposures, ratings)
    found = contrasts_of(exposures, values, CONFIG)
    assert [(one.variant, one.measure.name) for one in found] == [
        (variant, measure.name) for variant in ("new", "other") for measure in measures_of(CONFIG)
    ]
    assert [one.p_adjusted for one in found] == holm([one.p_value for one in found])
    verdicts = {(one.variant, one.measure.name): one.verdict for one in found}
    assert verdicts["new", "good"] == "better"
    assert verdicts["other", "good"] == "cannot tell"


def test_a_person_who_asks_a_thousand_times_outweighs_nobody(tmp_path: Path) -> None:
    lines = [exposure(n, "new" if n % 2 else "base", f"s{n}") for n in range(400)]
    said = [feedback(n, "up" if n % 4 < 2 else "down") for n in range(400)]
    lines += [exposure(1000 + n, "new", "s1") for n in range(1000)]
    said += [feedback(1000 + n, "down") for n in range(1000)]
    exposures, ratings = log_of(tmp_path, *lines, said=said)
    values = values_by_subject(measures_of(CONFIG), exposures, ratings)
    good = next(one for one in contrasts_of(exposures, values, CONFIG) if one.measure.name == "good")
    assert (good.sample.mean, good.control_sample.mean) == pytest.approx((0.5, 0.5), abs=0.006)
    assert good.verdict == "cannot tell"
