from __future__ import annotations

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.cleaning import clean, empty, fix_encoding, remove_control_characters, wrong_roles
from raytune_ft.data.config import DataCollectionConfig

CONFIG = DataCollectionConfig(sources=["a.jsonl"], output_path="out")


def talk(*turns: tuple[str, str]) -> Record:
    return Record(messages=tuple(Message(role, content) for role, content in turns))


def test_mojibake_is_repaired_and_wording_stays() -> None:
    assert fix_encoding("cafÃ©") == "café"
    assert fix_encoding("“quoted” &amp; ﬁne Ａ") == "“quoted” &amp; ﬁne Ａ"
    assert fix_encoding("e\u0301") == "é"


def test_control_characters_go_and_line_ends_become_newlines() -> None:
    assert remove_control_characters("a\x00b\r\nc\rd\te\x1b[31mf\ufeff") == "ab\nc\nd\tef"


def test_a_cleaned_record_has_an_id_of_its_cleaned_content() -> None:
    record, reason = clean(talk(("user", " Hi\r\n"), ("assistant", "\x07Hello ")), CONFIG)
    assert reason is None
    assert record.id == talk(("user", "Hi"), ("assistant", "Hello")).id


def test_switched_off_steps_leave_the_text_alone() -> None:
    off = CONFIG.with_overrides(fix_encoding=False, strip_whitespace=False, remove_control_characters=False)
    record = talk(("user", " cafÃ©\r"), ("assistant", "x"))
    assert clean(record, off) == (record, None)


def test_an_empty_system_turn_is_dropped() -> None:
    record, reason = clean(talk(("system", " "), ("user", "Q"), ("assistant", "A")), CONFIG)
    assert ([m.role for m in record.messages], reason) == (["user", "assistant"], None)


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
    assert clean(record, CONFIG)[1] == reason
    if not reason.startswith("same"):
        assert clean(record, CONFIG.with_overrides(drop_empty=False))[1] is None


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("user assistant", None),
        ("system user assistant user assistant", None),
        ("user", "role order: the last turn is user's"),
        ("user user assistant", "role order: user follows user"),
        ("assistant user assistant", "role order: assistant comes first"),
        ("user assistant assistant", "role order: assistant follows assistant"),
        ("user assistant tool assistant", "role order: tool follows an assistant that called none"),
        ("user system assistant", "role order: system follows user"),
    ],
)
def test_turns_must_be_in_an_order_that_a_chat_can_have(turns: str, reason: str | None) -> None:
    assert wrong_roles(talk(*((role, "x") for role in turns.split()))) == reason


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
