from __future__ import annotations

import random

import pytest

from raytune_ft.data.wording import mistyped, reworded, thinned

ASK = "Describe the weather in Paris on 3 May, please, for the readers of the paper"


def every(function: object, *args: object) -> set[str | None]:
    return {function(*args, random.Random(seed)) for seed in range(60)}  # type: ignore[operator]


def test_rewording_frames_instructions_and_questions_and_swaps_contractions_and_verbs() -> None:
    assert every(reworded, "List three fruits.") == {
        "Please list three fruits.",
        "I would like you to list three fruits.",
        "Your task: list three fruits.",
        "Could you list three fruits?",
        "Can you please list three fruits?",
        "Would you list three fruits?",
    }
    assert "Tell me: what is the capital?" in every(reworded, "What is the capital?")
    assert "What's the capital?" in every(reworded, "What is the capital?")
    assert "Compute the sum." in every(reworded, "Calculate the sum.")


@pytest.mark.parametrize("text", ["Paris", "", "The cat sat.", "42", "Is that what it is?\nAnd who?"])
def test_what_no_rule_fits_is_not_reworded(text: str) -> None:
    assert every(reworded, text) == {None}


def test_a_contraction_leaves_quotations_and_code_alone() -> None:
    assert every(reworded, 'The sign says "do not enter" here') == {None}
    assert every(reworded, "I saw that they do not care") == {"I saw that they don't care"}


def test_typing_mistakes_spare_names_of_the_answer_numbers_and_first_letters() -> None:
    for seed in range(100):
        changed = mistyped(ASK, 0.1, "In Paris the paper says rain.", random.Random(seed))
        assert changed is not None
        assert changed != ASK
        words = changed.split()
        assert len(words) == len(ASK.split())
        assert {"Paris", "3", "May,", "paper", "the", "on"} <= set(words)
        assert [word[0] for word in words] == [word[0] for word in ASK.split()]


def test_the_rate_says_how_many_letters_are_mistyped() -> None:
    text = "wonderful " * 20  # 180 letters
    for seed in range(20):
        changed = mistyped(text, 0.05, "", random.Random(seed))
        assert changed is not None
        # At most nine places; a swap changes two of them, and never more words than places.
        assert 1 <= sum(word != "wonderful" for word in changed.split()) <= 9


def test_little_words_go_and_all_others_stay() -> None:
    for seed in range(50):
        changed = thinned(ASK, 0.2, "", random.Random(seed))
        assert changed is not None
        little = {"the", "please,"}
        assert next(w for w in changed.replace(" ,", ",").split() if w not in little | {","}) == "Describe"
        lost = set(ASK.split()) - set(changed.split())
        assert lost <= little
    assert thinned("Sort numbers", 0.5, "", random.Random(0)) is None
    assert mistyped("Was it 1984?", 0.5, "", random.Random(0)) is None
