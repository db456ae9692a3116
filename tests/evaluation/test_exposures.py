"""Logs as they are found on disks: of several replicas, cut off, mixed up, changed, or something else altogether."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.evaluation.exposures import read_exposures

from .ab_logs import BEGAN, exposure, write_lines


def test_the_files_of_all_replicas_are_one_log(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "ab/exposures-r1.jsonl", [exposure(1, "new", "x"), exposure(3, "base", "y")])
    write_lines(folder / "exposures-r2.jsonl", [exposure(2, "new", "x", status=500, id=None, first_token_s=None)])
    (folder / "notes.txt").write_text("not a log")
    found = read_exposures(str(folder))
    assert (found.test, found.variants, found.shares) == ("spring", ("base", "new"), {"base": 0.5, "new": 0.5})
    assert found.variant.tolist() == [1, 0, 1]
    assert found.subject.tolist() == [0, 1, 0]
    assert found.subject_variant.tolist() == [1, 0]
    assert (found.time - BEGAN.timestamp()).tolist() == [1, 3, 2]
    assert found.status.tolist() == [200, 200, 500]
    assert np.isnan(found.first_token_s).tolist() == [False, False, True]
    assert found.rows == {"chatcmpl-1": 0, "chatcmpl-3": 1}
    assert (found.files.lines, found.files.torn, found.crossed, found.unsticky) == (3, 0, 0, 0)


def test_the_control_stands_first_whatever_its_name(tmp_path: Path) -> None:
    settings = {"control": "old", "shares": {"base": 0.2, "a": 0.3, "old": 0.5}}
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "a", "x", **settings)])
    assert read_exposures(str(folder)).variants == ("old", "a", "base")


def test_a_last_line_that_is_cut_off_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "ab/e.jsonl"
    write_lines(path, [exposure(1, "new", "x"), exposure(2, "base", "y")])
    whole = read_exposures(str(path))
    with path.open("a") as file:
        file.write(json.dumps(exposure(3, "new", "z"))[:50])
    found = read_exposures(str(path.parent))
    assert (found.files.torn, found.files.lines) == (1, 2)
    assert found.files.digest == whole.files.digest


def test_one_test_of_several_is_asked_for_by_name(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "new", "x"), exposure(2, "base", "y", test="summer")])
    with pytest.raises(ConfigError, match="test: the log holds several tests; name one of spring, summer"):
        read_exposures(str(folder))
    with pytest.raises(ConfigError, match=r"there is no test 'winter' in .*; it holds spring, summer"):
        read_exposures(str(folder), "winter")
    assert read_exposures(str(folder), "summer").variant.tolist() == [0]


def test_a_test_that_was_changed_while_it_ran_is_refused(tmp_path: Path) -> None:
    changed = exposure(2, "base", "y", shares={"base": 0.9, "new": 0.1})
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "new", "x"), changed])
    with pytest.raises(DataError, match=r"e.jsonl:2: the test 'spring' was changed while it ran.*another name"):
        read_exposures(str(folder))


def test_subjects_with_two_variants_and_without_a_name_are_counted(tmp_path: Path) -> None:
    lines = [exposure(1, "new", "x"), exposure(2, "base", "x"), exposure(3, "base", "y", sticky=False)]
    found = read_exposures(str(write_lines(tmp_path / "ab/e.jsonl", lines)))
    assert (found.crossed, found.unsticky, found.subject_variant.tolist()) == (1, 1, [1, 0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"time": 1\n', r"e.jsonl:1: is not valid JSON"),
        ("[1]\n", r"e.jsonl:1: expected a JSON object, found '\[1\]"),
        ('{"messages": [], "id": "x"}\n', r"e.jsonl:1: is no line of an A/B test's log"),
        ("\n", "no request was written down yet"),
    ],
)
def test_something_else_than_a_log_is_refused_by_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "e.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read_exposures(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"time": "yesterday"},
        {"variant": "other"},
        {"status": "ok"},
        {"status": math.nan},
        {"subject": None, "latency_s": None},
    ],
)
def test_a_line_with_a_wrong_value_is_refused_by_its_place(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "new", "x"), {**exposure(2, "new", "y"), **changes}])
    with pytest.raises(DataError, match=r"e.jsonl:2: is no line of an A/B test's log"):
        read_exposures(str(folder))


def test_shares_that_give_nobody_anything_are_refused(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "ab/e.jsonl", [exposure(1, "new", "x", shares={"base": 0, "new": 0})])
    with pytest.raises(DataError, match=r"e.jsonl:1: is no line of an A/B test's log .*shares must be positive"):
        read_exposures(str(folder))


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"exposures_path: .*nowhere: there is no such file or folder"):
        read_exposures(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"holds no \.jsonl file"):
        read_exposures(str(tmp_path))
