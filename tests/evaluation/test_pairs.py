from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.evaluation.pairs import pairs


def said(rows: int = 60) -> dict[str, list[str]]:
    return {"base": [f"base {n}" for n in range(rows)], "tuned": [f"tuned {n}" for n in range(rows)]}


def test_pairs_are_shuffled_and_either_model_is_a_about_as_often(make_result: Any) -> None:
    found = pairs(make_result(said())).shown
    assert len(found) == 60
    assert [pair.row for pair in found] != [f"row{n}" for n in range(60)]
    assert {pair.row for pair in found} == {f"row{n}" for n in range(60)}
    assert 20 < sum(pair.model_is_a for pair in found) < 40
    for pair in found:
        assert set(pair.labels.values()) == {"base", "tuned"}
        assert pair.answers["tuned"] == f"tuned {pair.row.removeprefix('row')}"


def test_the_same_seed_shows_the_same_and_another_another(make_result: Any) -> None:
    result = make_result(said())
    assert pairs(result, seed=1) == pairs(result, seed=1)
    assert [pair.row for pair in pairs(result, seed=1).shown] != [pair.row for pair in pairs(result, seed=2).shown]


def test_the_same_answer_twice_is_nothing_to_judge_and_is_counted(make_result: Any) -> None:
    found = pairs(make_result({"base": ["a", "b", "c"], "tuned": ["a", "b", "d"]}))
    assert ([pair.row for pair in found.shown], found.identical) == (["row2"], 2)
    with pytest.raises(DataError, match="the same answer to every row"):
        pairs(make_result({"base": ["a"], "tuned": ["a"]}))


def test_three_models_are_three_pairs_a_row_unless_fewer_are_asked_for(make_result: Any) -> None:
    result = make_result({"a": ["1", "2"], "b": ["3", "4"], "c": ["5", "6"]})
    assert len(pairs(result).shown) == 6
    assert {(pair.model, pair.other) for pair in pairs(result, models=["c", "a"]).shown} == {("c", "a")}
    limited = pairs(result, max_pairs=4)
    assert (len(limited.shown), limited.left_out) == (4, 2)
    assert limited.shown == pairs(result).shown[:4]


def test_what_cannot_be_judged_is_refused_with_what_there_is(make_result: Any) -> None:
    with pytest.raises(ConfigError, match="at least two models; the report has model"):
        pairs(make_result({"model": ["a"]}))
    with pytest.raises(ConfigError, match="the report has no 'tunned'; it has base, tuned"):
        pairs(make_result(said(2)), models=["base", "tunned"])
