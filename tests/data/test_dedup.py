from __future__ import annotations

from typing import Any

import pyarrow as pa

from raytune_ft.core.records import Message, Record
from raytune_ft.data.dedup import mark_conflicts, mark_duplicates
from raytune_ft.data.rows import ROW_SCHEMA, prompt_hash


def test_the_first_usable_row_of_a_content_stays() -> None:
    table = pa.table(
        {
            "id": ["x", "x", "y", "x", "z", "z"],
            "reason": pa.array([None, None, None, None, "empty answer", None], pa.string()),
            "is_test": [False] * 6,
            "source": ["a", "a", "a", "b", "b", "b"],
            "position": [0, 4, 5, 0, 1, 2],
        }
    )
    reasons = mark_duplicates(table).column("reason").to_pylist()
    assert reasons == [None, "duplicate: of a:0", None, "duplicate: of a:0", "empty answer", None]


def answered(*answers: str | None, prompt: str = "Why?", **fields: Any) -> list[Record]:
    return [Record((Message("user", prompt), Message("assistant", answer or "")), **fields) for answer in answers]


def conflicts(records: list[Record], *, drop: bool = False) -> tuple[list[bool], list[str | None]]:
    rows = [{**record.to_row(), "group": prompt_hash(record)} for record in records]
    table = mark_conflicts(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), drop=drop)
    return table.column("conflicting").to_pylist(), table.column("reason").to_pylist()


def test_different_answers_to_one_prompt_are_counted_or_dropped() -> None:
    records = [
        *answered("So.", "Because."),
        *answered("Yes.", " YES. ", prompt="Really?"),
        *answered("No.", prompt="Eh?"),
    ]
    assert conflicts(records) == ([True, True, False, False, False], [None] * 5)
    assert conflicts(records, drop=True)[1] == ["conflicting answers: 2 to one prompt"] * 2 + [None] * 3


def test_preferences_and_labelled_rows_may_answer_a_prompt_in_several_ways() -> None:
    user = (Message("user", "Why?"),)
    sides = [(Message("assistant", text),) for text in ("a", "b", "c")]
    preferences = [Record(user, chosen=sides[0], rejected=sides[1]), Record(user, chosen=sides[2], rejected=sides[1])]
    assert conflicts(preferences)[0] == [False, False]
    assert conflicts(answered("a", label=True) + answered("b", label=False))[0] == [False, False]


def test_a_rejected_row_conflicts_with_none() -> None:
    records = answered("So.", "Because.")
    rows = [{**record.to_row(), "group": prompt_hash(record)} for record in records]
    rows[0]["reason"] = "too long"
    table = mark_conflicts(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), drop=True)
    assert table.column("conflicting").to_pylist() == [False, False]


def test_rows_of_test_sources_stay_as_often_as_they_are_there() -> None:
    table = pa.table(
        {
            "id": ["x", "x", "x"],
            "reason": pa.nulls(3, pa.string()),
            "is_test": [True, True, False],
            "source": ["t", "t", "a"],
            "position": [0, 4, 0],
        }
    )
    assert mark_duplicates(table).column("reason").to_pylist() == [None, None, "duplicate: of t:0"]
