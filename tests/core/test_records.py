"""A record's identity is its content; rows lose nothing."""

from __future__ import annotations

from raytune_ft.core.records import Message, Record, records_to_table, table_to_records

TALK = (Message("user", "Hi"), Message("assistant", "Hello"))


def test_the_same_content_has_the_same_id_wherever_it_comes_from() -> None:
    assert Record(TALK, source="a", position=1).id == Record(TALK, source="b", metadata={"x": 1}).id
    assert Record(TALK).id != Record(TALK[:1]).id


def test_records_survive_a_table() -> None:
    records = [
        Record(TALK, source="a", position=3, metadata={"wording": "w", "n": 1}),
        Record(text="raw", label=True),
        Record(
            TALK[:1], chosen=(Message("assistant", "good"),), rejected=(Message("assistant", "bad"),), reference="r"
        ),
        Record((Message("assistant", "", tool_calls='[{"name": "f"}]'),), tools="[]"),
    ]
    assert table_to_records(records_to_table(records)) == records


def test_prompt_and_answer_part_at_the_last_assistant_turn() -> None:
    assert (Record(TALK).prompt, Record(TALK).answer) == (TALK[:1], "Hello")
    assert (Record(TALK[:1], reference="r").prompt, Record(TALK[:1], reference="r").answer) == (TALK[:1], "r")
