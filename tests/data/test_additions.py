from __future__ import annotations

import pytest

from raytune_ft.core.errors import ConfigError
from raytune_ft.core.records import Message, Record
from raytune_ft.data.additions import (
    NO_REASONING,
    OTHER_ANSWER,
    agrees,
    moved_spans,
    with_reasoning,
    with_system_prompt,
)
from raytune_ft.data.config import DataCollectionConfig

ASKED = Message("user", "2 + 2?")
WRITTEN = "<think>\nTwo and two.\n</think>\n\n4"


def config(**settings: object) -> DataCollectionConfig:
    return DataCollectionConfig(sources=["a.jsonl"], output_path="out", **{"reasoning": "train", **settings})


def answered(content: str, **fields: object) -> Record:
    return Record(messages=(ASKED, Message("assistant", content)), **fields)


def test_a_system_prompt_goes_where_none_is() -> None:
    own = Record(messages=(Message("system", "Own."), ASKED))
    assert with_system_prompt(own, "Be brief.") == own
    assert with_system_prompt(Record(messages=(ASKED,)), "Be brief.").messages == (
        Message("system", "Be brief."),
        ASKED,
    )
    assert with_system_prompt(Record(text="a"), "Be brief.") == Record(text="a")
    assert with_system_prompt(Record(messages=(ASKED,)), None).messages == (ASKED,)


@pytest.mark.parametrize(
    "record",
    [
        answered("Two and two.\n#### 4"),
        answered("4", metadata={"rationale": " Two and two. "}),
        answered("<think>Two and two.</think>4"),
        answered(WRITTEN),
        answered(WRITTEN, metadata={"reasoning": "Another."}),
    ],
)
def test_reasoning_is_written_before_the_answer_wherever_it_comes_from(record: Record) -> None:
    shaped, fault = with_reasoning(record, config())
    assert fault is None
    assert shaped.messages == (ASKED, Message("assistant", WRITTEN))
    assert shaped.reference == "4"
    assert "supervised_spans" not in shaped.metadata


def test_masked_reasoning_leaves_the_answer_to_be_trained() -> None:
    shaped, _ = with_reasoning(answered("Two and two.\n#### 4"), config(reasoning="mask"))
    ((start, end),) = shaped.metadata["supervised_spans"]
    assert shaped.messages[-1].content[start:end] == "4"
    own = config(reasoning="mask", reasoning_format="{reasoning}\nAnswer: {answer}.")
    shaped, _ = with_reasoning(answered("Two and two.\n#### 4"), own)
    assert shaped.messages[-1].content == "Two and two.\nAnswer: 4."
    ((start, end),) = shaped.metadata["supervised_spans"]
    assert shaped.messages[-1].content[start:end] == "4."


@pytest.mark.parametrize(
    "record",
    [
        answered("4"),
        Record(text="Two and two.\n#### 4"),
        Record(messages=(ASKED,), chosen=(ASKED,)),
        answered("#### 4"),
    ],
)
def test_rows_without_reasoning_stay_as_they_are_and_are_reported(record: Record) -> None:
    assert with_reasoning(record, config()) == (record, NO_REASONING)
    assert with_reasoning(record, config(reasoning="none")) == (record, None)


def test_reasoning_that_ends_in_another_answer_is_reported() -> None:
    assert with_reasoning(answered("Two and two is 5.\n#### 4"), config())[1] == OTHER_ANSWER
    assert with_reasoning(answered("4", metadata={"reasoning": "It is 4."}, reference="5"), config())[1] == OTHER_ANSWER


@pytest.mark.parametrize(
    ("reasoning", "answer", "expected"),
    [
        ("He pays 3 x 4 = <<3*4=12>>12 dollars.", "12", True),
        ("He pays 12 dollars.\nThat is all.", "12", True),
        ("He pays $1,200.00", "1200", True),
        ("48 + 16 = 64 points.", "66", False),
        ("4 * 4 = 16 pages in 2 days.", "16", True),
        ("Think. \\boxed{7} apples, 9 pears", "7", True),
        ("Think. The answer is 8.\nOr 7?", "7", False),
        ("Paris lies in France, so the answer is Paris.", "Paris", True),
        ("So the answer is Rome.", "Paris", False),
        ("So the answer is: the city of Paris.", "Paris.", True),
        ("It lies in France.", "Paris", True),
        ("It cannot be counted.", "12", True),
    ],
)
def test_conclusions_are_compared_where_there_is_one(reasoning: str, answer: str, expected: bool) -> None:
    assert agrees(reasoning, answer) is expected


def test_spans_of_a_text_that_cleaning_changed_are_refused() -> None:
    before = answered(" 4", metadata={"supervised_spans": [[0, 1]]})
    after = answered("4", metadata={"supervised_spans": [[0, 1]]})
    assert moved_spans(before, after).startswith("supervised_spans: cleaning changed")
    assert moved_spans(after, after) is None
    assert moved_spans(answered(" 4"), answered("4")) is None


@pytest.mark.parametrize("written", ["{answer}", "{answer}{reasoning}", "{reasoning}", "{reasoning}{answer}{answer}"])
def test_a_format_needs_reasoning_before_one_answer(written: str) -> None:
    with pytest.raises(ConfigError, match="reasoning_format must have"):
        config(reasoning_format=written)
