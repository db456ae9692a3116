from __future__ import annotations

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.refusals import boilerplate, refusal, refuses


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t help with that request.",
        "Sorry, I cannot provide instructions for this.",
        "I apologize, but I cannot fulfill this request.",
        "I cannot comply.",
        "Unfortunately, I am not able to help you with this.",
        "I won't help with that.",
        "As a responsible assistant, I cannot provide that.",
        "I'm unable to answer that question.",
        "I can't help.",
    ],
)
def test_refusals_are_known(answer: str) -> None:
    assert refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry to hear about your loss.",
        "I'm sorry, but I can't come to your party on Friday.",
        "Sorry for the late reply! Here is the report.",
        "I can't wait to help you with this!",
        "I cannot stress enough how much practice helps.",
        "You cannot provide both arguments at once.",
        "The clerk said: I'm sorry, but I can't help you with that.",
        "Can't help falling in love is a song by Elvis Presley.",
        "I can help with that.",
        "",
    ],
)
def test_apologies_letters_and_help_are_no_refusals(answer: str) -> None:
    assert refusal(answer) is None


@pytest.mark.parametrize(
    ("answer", "asked", "found"),
    [
        ("As an AI language model, I don't have opinions.", "What is your favourite color?", True),
        ("I'm just an AI assistant, so no.", "Do you like it?", True),
        ("As of my last update in 2021, it was 5.", "How many?", True),
        ("As an AI language model, I have no feelings.", "Are you a person?", False),
        ("An AI language model predicts tokens.", "Explain.", False),
        ("I am an aid worker.", "Who?", False),
        ("As an AI researcher, I train models.", "Write my CV's first line.", False),
        ("I train a language model.", "What do you do?", False),
    ],
)
def test_boilerplate_is_what_a_model_says_of_itself_unasked(answer: str, asked: str, found: bool) -> None:
    assert bool(boilerplate(answer, asked)) is found


def test_the_last_answer_counts_and_of_a_preference_the_chosen_one() -> None:
    no, yes = Message("assistant", "I cannot comply."), Message("assistant", "Yes.")
    asked = Message("user", "Q")
    assert refuses(Record(messages=(asked, no, asked, yes))) is None
    assert refuses(Record(messages=(asked, yes, asked, no))) == "refusal: I cannot comply"
    assert refuses(Record(messages=(asked,), chosen=(yes,), rejected=(no,))) is None
    assert refuses(Record(messages=(asked,), chosen=(no,), rejected=(yes,))) == "refusal: I cannot comply"
    assert refuses(Record(text="I cannot comply.")) is None
