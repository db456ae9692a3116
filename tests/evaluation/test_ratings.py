"""What feedback says of a test's answers, joined by the ids that it names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.exposures import Exposures, read_exposures
from raytune_ft.evaluation.ratings import read_ratings

from .ab_logs import exposure, feedback, write_lines


@pytest.fixture
def exposures(tmp_path: Path) -> Exposures:
    """Eight requests of as many subjects."""
    lines = [exposure(number, "new" if number % 2 else "base", f"s{number}") for number in range(8)]
    return read_exposures(str(write_lines(tmp_path / "ab/e.jsonl", lines)))


def test_ratings_and_corrections_say_good_or_bad_and_three_of_five_neither(
    exposures: Exposures, tmp_path: Path
) -> None:
    said = ["up", "down", 5, 4, 3, 2, 1]
    lines = [feedback(number, rating) for number, rating in enumerate(said)]
    lines.append(feedback(7, None, correction="better so"))
    found = read_ratings(str(write_lines(tmp_path / "fb/f.jsonl", lines)), exposures)
    np.testing.assert_equal(found.good, [1, 0, 1, 1, math.nan, 0, 0, 0])
    assert found.rated.all()
    assert (found.attributed, found.others) == (8, 0)


def test_ratings_of_true_and_false_are_up_and_down_as_prepare_takes_them(exposures: Exposures, tmp_path: Path) -> None:
    lines = [feedback(0, True), feedback(1, False), feedback(2, True, id=["chatcmpl-2"])]
    found = read_ratings(str(write_lines(tmp_path / "fb/f.jsonl", lines)), exposures)
    assert found.good[:2].tolist() == [1, 0]
    assert (found.attributed, found.others) == (2, 1)


def test_the_last_word_on_an_answer_counts(exposures: Exposures, tmp_path: Path) -> None:
    lines = [feedback(0, "down", after=90), feedback(0, "up", after=30), feedback(1, "up"), feedback(1, 3, after=70)]
    found = read_ratings(str(write_lines(tmp_path / "fb/f.jsonl", lines)), exposures)
    assert found.good[0] == 0
    assert math.isnan(found.good[1]) and found.rated[1]
    assert np.isinf(found.time[2:]).all()


def test_feedback_that_names_no_answer_of_the_test_is_counted_apart(exposures: Exposures, tmp_path: Path) -> None:
    pair = {"rating": None, "preferred": "A", "rejected": "B"}
    lines = [feedback(0, "up", id=None), feedback(1, "up", id="chatcmpl-else"), feedback(2, **pair), feedback(3, "up")]
    found = read_ratings(str(write_lines(tmp_path / "fb/f.jsonl", lines)), exposures)
    assert (found.attributed, found.others) == (1, 3)
    assert np.flatnonzero(found.rated).tolist() == [3]


@pytest.mark.parametrize("changes", [{"rating": "great"}, {"time": None}, {"time": "soon"}, {"rating": [1]}])
def test_a_line_that_is_no_feedback_is_refused_by_its_place(
    exposures: Exposures, tmp_path: Path, changes: dict[str, Any]
) -> None:
    folder = write_lines(tmp_path / "fb/f.jsonl", [{**feedback(0, "up"), **changes}])
    with pytest.raises(DataError, match=r"f.jsonl:1: is no feedback of an endpoint: expected"):
        read_ratings(str(folder), exposures)


def test_without_feedback_nothing_is_rated(exposures: Exposures) -> None:
    found = read_ratings(None, exposures)
    assert not found.rated.any()
    assert found.files is None
