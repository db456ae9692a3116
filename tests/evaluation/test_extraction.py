"""Numbers are taken out of answers whole, and compared as what they mean."""

from __future__ import annotations

import pytest

from raytune_ft.evaluation.answers import extracted, listed, same_answer, words


@pytest.mark.parametrize("how", ["gsm8k", "last_number"])
@pytest.mark.parametrize(
    ("given", "wanted"), [("3/4", "3/8"), ("10:15", "9:15"), ("10:15", "10:30"), ("\u22123", "3"), ("1,2,3", "123")]
)
def test_another_number_is_another_answer(how: str, given: str, wanted: str) -> None:
    answers = [extracted(f"#### {text}", how) for text in (given, wanted)]
    assert answers == [given, wanted]
    assert not same_answer(given, wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("€1,000", "1000"),
        ("£5", "5"),
        ("$ 5", "5.00"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("\u22123", "-3"),
        ("**5**", "5"),
        ("3/4", "0.75"),
        ("1,20,000", "120000"),
    ],
)
def test_a_number_is_found_however_it_is_written(given: str, wanted: str) -> None:
    found = extracted(f"so\n#### {given}", "gsm8k")
    assert found is not None
    assert same_answer(found, wanted)


@pytest.mark.parametrize("text", ["1/0", "1.5/2", "1/2/3", "1e99/3x", "1" * 5000 + "/3"])
def test_what_is_no_number_is_compared_as_text(text: str) -> None:
    assert same_answer(text, text)
    assert not same_answer(text, "5")


def test_words_of_a_script_without_spaces_are_its_characters() -> None:
    assert words("模型 good") == ["模", "型", "good"]


def test_a_json_list_and_a_list_by_commas_have_the_same_items() -> None:
    assert listed('["Red", "blue"]') == listed("red, Blue")
