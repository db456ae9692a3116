from __future__ import annotations

import pytest

from raytune_ft.evaluation.answers import canonical, fields, parse_json, words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        '"text"',
        '{"a": 1} and more',
        '```json\n{"a": 1}\n```',
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "{'a': 1}",
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_what_is_not_one_strict_json_object_or_array_does_not_parse(text: str) -> None:
    assert parse_json(text) is None


def test_blanks_around_json_are_passed_over() -> None:
    assert parse_json(' \n{"a": [1, null]}\n') == {"a": [1, None]}


def test_json_values_are_equal_as_json_means_it() -> None:
    assert canonical({"a": 1, "b": [2]}) == canonical({"b": [2.0], "a": 1.0})
    assert canonical({"a": 1}) != canonical({"a": True})
    assert canonical({"a": 0}) != canonical({"a": False})
    assert canonical({"a": "1"}) != canonical({"a": 1})
    assert canonical([1, 2]) != canonical([2, 1])
    assert canonical({"a": {}}) != canonical({"a": []})


def test_only_an_object_has_fields() -> None:
    assert list(fields('{"a": 1, "b": {"c": 2}}')) == ["a", "b"]
    assert fields("[1]") == fields("no") == {}


def test_words_are_taken_as_squad_takes_them() -> None:
    assert words("The cat, a DOG and an ant's theme.") == ["cat", "dog", "and", "ants", "theme"]
