"""Rows that begin with the same question stay together, unless so many do that it is none."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data import components
from raytune_ft.data.blocks import LocalBlocks
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.groups import link_rows
from raytune_ft.data.openings import COMMON, MOST_PROMPTS, most_prompts, with_question
from raytune_ft.data.rows import prompt_hash

from .planted import parts_of, settled

CONFIG = DataCollectionConfig(sources=("a",), output_path="out", near_duplicates="keep")


def turns(*said: str, system: str | None = None) -> list[dict[str, str]]:
    own = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    return [{"role": "system", "content": system}, *own] if system else own


def linked(talks: list[list[dict[str, str]]], parts: int = 1, **columns: list[object]) -> list[dict[str, object]]:
    """The linked rows, in order."""
    groups = [prompt_hash(Record(messages=tuple(Message(**turn) for turn in talk))) for talk in talks]
    names = [json.dumps(talk) for talk in talks]
    table = settled(names, messages=talks, text=[None] * len(talks), group=groups, **columns)
    found = link_rows(LocalBlocks(parts_of(table, parts)), CONFIG, ["a", "b"], 1).table()
    return list(found.sort_by([("file", "ascending"), ("position", "ascending")]).to_pylist())


OTHERS = [turns(f"Other {n}?", "yes") for n in range(8)]


def test_prefixes_system_turns_case_width_and_blanks_do_not_take_a_question_apart() -> None:
    same = [
        turns("What is 2?", "2"),
        turns("What is 2?", "2", "And 3?", "3"),
        turns("what  IS\n2?", "two", "And 4?", "4"),
        turns("What is ２？", "2", system="Be brief."),  # a digit and a mark of full width
    ]
    rows = linked([*same, *OTHERS])
    assert len({row["group"] for row in rows[:4]}) == 1
    assert len({row["group"] for row in rows}) == 1 + len(OTHERS)
    assert len({row["prompt"] for row in rows}) == 4 + len(OTHERS)


def test_rows_that_begin_as_a_test_row_are_left_out() -> None:
    talks = [turns("What is 2?", "2"), turns("What is 2?", "2", "And 3?", "3"), *OTHERS]
    files = {"file": [0] + [1] * (len(talks) - 1), "is_test": [True] + [False] * (len(talks) - 1)}
    rows = linked(talks, **files)
    assert [row["reason"] for row in rows] == [None, "group is in test_sources", *[None] * len(OTHERS)]


def test_a_question_may_begin_a_hundred_prompts_and_half_of_all() -> None:
    assert [most_prompts(count) for count in (0, 1, 9, 200, 10_000)] == [1, 1, 4, MOST_PROMPTS, MOST_PROMPTS]


@pytest.mark.parametrize("parts", [1, 5])
def test_a_common_opening_keeps_rows_together_that_ask_the_same_and_is_remarked(
    parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(components, "FEW_EDGES", 0)
    talks = [turns("Hi", "Hello", f"How much is {n}?", "much") for n in range(12)]
    talks += [turns("HI", "Hello", "how  much is 3?", "little"), *OTHERS[:6]]  # 13 of 19 begin so
    rows = linked(talks, parts)
    assert len({row["group"] for row in rows}) == 18
    assert rows[12]["group"] == rows[3]["group"]
    assert [json.loads(row["notes"] or "{}") for row in rows] == [{"remarks": [COMMON]}] * 13 + [{}] * 6
    few = linked([*talks, *(turns(f"Further {n}?", "so") for n in range(7))], parts)  # 13 of 26
    assert len({row["group"] for row in few[:13]}) == 1


def test_a_row_without_a_question_has_none_and_a_text_is_one() -> None:
    answer = [{"role": "assistant", "content": "yes"}]
    table = settled(["a text", "none", "blank"], text=["A  text", None, None], messages=[[], answer, turns(" ", "x")])
    told = {row["id"]: row["question"] for row in with_question(table).to_pylist()}
    (alike,) = with_question(settled(["a text"])).column("question").to_pylist()
    assert sorted(told.values(), key=str) == [alike, None, None]
    sliced = with_question(table.sort_by("position").slice(0, 1))
    assert sliced.column("question") == pa.chunked_array([[alike]])
