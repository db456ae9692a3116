from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import RecordFormat
from raytune_ft.data.feedback import NothingToLearnError, rating_label
from raytune_ft.data.formats import FormatFault, detect, format_of, to_record

ASKED = (Message("user", "Q"),)
ROW = {"prompt": "Q", "response": "A"}


def read(values: dict[str, Any]) -> Record:
    return to_record(values, detect(values)[0], source="feedback.jsonl", position=0)


def test_a_rating_gives_a_label_for_the_answer_that_was_given() -> None:
    for rating, label in [
        ("up", True),
        ("down", False),
        (True, True),
        (5, True),
        ("4", True),
        (2.0, False),
        (1, False),
    ]:
        record = read({**ROW, "rating": rating})
        assert (record.messages, record.label) == ((*ASKED, Message("assistant", "A")), label)
        assert not record.metadata


def test_a_correction_is_what_is_learned_and_the_rest_is_kept() -> None:
    record = read({**ROW, "rating": "down", "correction": "B", "model": "m1", "preferred": None, "rejected": None})
    assert record.messages == (*ASKED, Message("assistant", "B"))
    assert record.label is None
    assert record.metadata == {"response": "A", "rating": "down", "model": "m1"}


def test_a_correction_that_is_the_response_corrects_nothing() -> None:
    record = read({**ROW, "rating": "down", "correction": "A"})
    assert (record.messages[-1], record.label) == (Message("assistant", "A"), False)
    with pytest.raises(NothingToLearnError):
        read({**ROW, "rating": None, "correction": "A"})


def test_a_pair_gives_a_preference() -> None:
    record = read({"messages": [{"role": "user", "content": "Q"}], "preferred": "B", "rejected": "A"})
    assert (record.messages, record.chosen, record.rejected) == (
        ASKED,
        (Message("assistant", "B"),),
        (Message("assistant", "A"),),
    )


def test_a_row_without_judgement_has_nothing_to_learn_from() -> None:
    for row in ({**ROW, "rating": None}, {**ROW, "rating": 3}, {**ROW, "rating": "", "correction": ""}):
        with pytest.raises(NothingToLearnError, match=r"^feedback without judgement: "):
            read(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "rating": "meh"}, "wrong type in 'rating': expected up, down or 1 to 5, found 'meh'"),
        ({**ROW, "rating": 0}, "wrong type in 'rating'"),
        ({"response": "A", "rating": 1}, "no prompt: feedback needs"),
        ({"prompt": "Q", "response": None, "rating": 1}, "no response: a rating needs"),
        ({**ROW, "correction": 5}, "wrong type in 'correction': expected text"),
    ],
)
def test_what_is_no_feedback_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatFault, match=message) as caught:
        read(row)
    assert not isinstance(caught.value, NothingToLearnError)


def test_feedback_is_told_from_its_columns_and_not_confused() -> None:
    assert detect(["messages", "response", "rating"]) == (RecordFormat.FEEDBACK, "column 'rating' beside an answer")
    assert detect(["prompt", "preferred", "rejected"])[0] is RecordFormat.FEEDBACK
    assert detect(["prompt", "chosen", "rejected", "rating"])[0] is RecordFormat.PREFERENCE
    assert detect(["prompt", "completion", "rating"])[0] is RecordFormat.PROMPT_COMPLETION
    with pytest.raises(FormatFault, match=r"ambiguous columns: .*fit feedback and prompt_completion"):
        detect(["prompt", "completion", "response", "rating"])
    with pytest.raises(FormatFault, match="needs a column 'rating' or 'correction' or 'preferred'"):
        format_of(["prompt", "response"], RecordFormat.FEEDBACK)


def test_thumbs_may_be_drawn() -> None:
    assert rating_label("👍")
    assert not rating_label("👎")
