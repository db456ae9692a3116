from __future__ import annotations

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.cleaning import Cleaned, clean, empty, out_of_bounds, wrong_roles
from raytune_ft.data.config import DataCollectionConfig, Measure

CONFIG = DataCollectionConfig(sources=["a.jsonl"], output_path="out")


def talk(*turns: tuple[str, str]) -> Record:
    return Record(messages=tuple(Message(role, content) for role, content in turns))


def test_a_cleaned_record_has_an_id_of_its_cleaned_content() -> None:
    cleaned = clean(talk(("user", " Hi\r\n"), ("assistant", "\x07Hello ")), CONFIG)
    assert cleaned.reason is None
    assert cleaned.changed == ("remove_control_characters", "strip_whitespace")
    assert cleaned.record.id == talk(("user", "Hi"), ("assistant", "Hello")).id


def test_switched_off_steps_leave_the_text_alone() -> None:
    off = CONFIG.with_overrides(fix_encoding=False, strip_whitespace=False, remove_control_characters=False)
    record = talk(("user", " cafÃ©\r"), ("assistant", "x"))
    assert clean(record, off) == Cleaned(record)
    assert Cleaned(record).notes is None


def test_an_empty_system_turn_is_dropped() -> None:
    cleaned = clean(talk(("system", " "), ("user", "Q"), ("assistant", "A")), CONFIG)
    assert ([m.role for m in cleaned.record.messages], cleaned.reason) == (["user", "assistant"], None)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk(("user", "Q"), ("assistant", " ")), "empty answer"),
        (talk(("user", ""), ("assistant", "A")), "empty prompt"),
        (Record(text=" "), "empty text"),
        (Record(), "empty text"),
        (Record(messages=(Message("user", "Q"),), chosen=(Message("assistant", "A"),),
                rejected=(Message("assistant", "A"),)), "same answers: chosen and rejected do not differ"),
    ],
)  # fmt: skip
def test_what_says_nothing_has_a_reason(record: Record, reason: str) -> None:
    assert clean(record, CONFIG).reason == reason
    kept = reason if reason.startswith("same") else None  # a preference between equals is no question of emptiness
    assert clean(record, CONFIG.with_overrides(drop_empty=False)).reason == kept


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("user assistant", None),
        ("system user assistant user assistant", None),
        ("user", "a prompt without an answer: the last turn is user's"),
        ("system", "role order: the last turn is system's"),
        ("user user assistant", "role order: user follows user"),
        ("assistant user assistant", "role order: assistant comes first"),
        ("user assistant assistant", "role order: assistant follows assistant"),
        ("user assistant tool assistant", "role order: tool follows an assistant that called none"),
        ("user system assistant", "role order: system follows user"),
    ],
)
def test_turns_must_be_in_an_order_that_a_chat_can_have(turns: str, reason: str | None) -> None:
    assert wrong_roles(talk(*((role, "x") for role in turns.split()))) == reason


def test_what_ends_with_a_question_is_kept_where_that_is_wanted() -> None:
    asked, again = talk(("user", "Q")), talk(("user", "Q"), ("assistant", "A"), ("user", "Q"))
    kept = CONFIG.with_overrides(unanswered="keep")
    for record in (asked, again):
        assert (clean(record, CONFIG).reason or "").startswith("a prompt without an answer: ")
        assert clean(record, kept).reason is None
    assert clean(talk(("user", " ")), kept).reason == "empty prompt"
    assert clean(talk(("system", "Q")), kept).reason == "role order: the last turn is system's"


def test_a_tool_answers_an_assistant_that_called_it() -> None:
    call = Message("assistant", "", tool_calls="[]")
    record = Record(messages=(Message("user", "Q"), call, Message("tool", "1"), Message("assistant", "A")))
    assert wrong_roles(record) is None
    assert empty(record) is None


def test_a_preference_ends_with_the_user_and_goes_on_with_the_assistant() -> None:
    asked, side = (Message("user", "Q"),), (Message("assistant", "A"),)
    assert wrong_roles(Record(messages=asked, chosen=side, rejected=side)) is None
    assert wrong_roles(Record(messages=asked, chosen=side)) == "role order: rejected is not the assistant's"
    assert wrong_roles(Record(messages=asked + side, chosen=side, rejected=side)) == (
        "role order: the prompt of a preference ends with assistant"
    )


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({"words": (1, 5)}, None),
        ({"words": (None, 4)}, "too many words: 5, at most 4"),
        ({"characters": (20, None)}, "too few characters: 17, at least 20"),
        ({"prompt_words": (4, None)}, "too few prompt_words: 3, at least 4"),
        ({"answer_characters": (None, 7)}, "too many answer_characters: 8, at most 7"),
        ({"answer_words": (2, 2), "prompt_characters": (9, 9)}, None),
    ],
)
def test_bounds_are_inclusive_and_name_what_they_measure(
    bounds: dict[str, tuple[int | None, int | None]], reason: str | None
) -> None:
    record = talk(("user", "a bb cccc"), ("assistant", "one word"))
    assert out_of_bounds(record, {Measure(name): bound for name, bound in bounds.items()}) == reason
    assert clean(record, CONFIG.with_overrides(length_bounds=bounds)).reason == reason


def test_both_answers_of_a_preference_keep_the_bounds_and_a_text_has_no_answer() -> None:
    pair = Record((Message("user", "Q"),), None, (Message("assistant", "a b"),), (Message("assistant", "a"),))
    assert out_of_bounds(pair, {Measure.ANSWER_WORDS: (2, None)}) == "too few answer_words: 1, at least 2"
    assert out_of_bounds(pair, {Measure.WORDS: (None, 2)}) == "too many words: 3, at most 2"
    assert out_of_bounds(Record(text="a b"), {Measure.ANSWER_WORDS: (9, None), Measure.WORDS: (2, 2)}) is None


def test_each_check_can_be_switched() -> None:
    uncalled = talk(("user", "Q"), ("assistant", "A"), ("tool", "1"), ("assistant", "A"))
    assert clean(uncalled, CONFIG).reason == "tool result without a call"
    off = CONFIG.with_overrides(drop_unbalanced_tool_calls=False)
    assert (clean(uncalled, off).reason or "").startswith("role order")
    refused = talk(("user", "Q"), ("assistant", "I cannot comply."))
    assert clean(refused, CONFIG).reason is None
    assert clean(refused, CONFIG.with_overrides(drop_refusals=True)).reason == "refusal: I cannot comply"
    german = Record(text="Der schnelle braune Fuchs springt über den faulen Hund und läuft davon.")
    assert clean(german, CONFIG).reason is None
    assert clean(german, CONFIG.with_overrides(languages=["en"])).reason == "language: de, wanted en"
    short = clean(Record(text="Ja."), CONFIG.with_overrides(languages=["en"]))
    assert (short.reason, short.undecided, short.notes) == (None, ("language",), '{"undecided": ["language"]}')


def test_redaction_reaches_every_part_of_a_record_and_counts() -> None:
    call = Message("assistant", "", '[{"function": {"name": "mail", "arguments": "{\\"to\\": \\"a@b.org\\"}"}}]')
    record = Record(
        (Message("user", "I am a@b.org"), call), tools='[{"name": "mail", "example": "a@b.org"}]',
        reference="a@b.org", metadata={"author": {"mail": ["a@b.org"]}},
    )  # fmt: skip
    cleaned = clean(record, CONFIG.with_overrides(redact=["email"]))
    assert "a@b.org" not in str(cleaned.record.to_row())
    assert cleaned.redacted == {"email": 5}
    assert cleaned.record.metadata == {"author": {"mail": ["[EMAIL]"]}}
    assert cleaned.notes == '{"redacted": {"email": 5}}'
    assert "a@b.org" in str(clean(record, CONFIG).record.to_row())
