from __future__ import annotations

import json
from typing import Any

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import RecordFormat
from raytune_ft.data.formats import FormatFault, detect, format_of, renamed, to_record

ASKED = (Message("user", "Q"),)
ANSWERED = (*ASKED, Message("assistant", "A"))
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(values: dict[str, Any]) -> Record:
    return to_record(values, detect(values)[0], source="a.jsonl", position=3)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [HUMAN, GPT]}, "sharegpt"),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
        ({"prompt": "Q", "completion": "A"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion"),
        ({"question": "Q", "answer": "A"}, "question_answer"),
    ],
)
def test_formats_that_say_the_same_give_the_same_record(values: dict[str, Any], kind: str) -> None:
    assert detect(values)[0] == kind
    assert read(values).messages == ANSWERED
    assert read(values).id == Record(messages=ANSWERED).id


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "B"}},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "B"}]},
        {"prompt": "Q", "chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "B"}]},
        {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
    ],
)
def test_preferences_with_and_without_an_explicit_prompt_are_the_same(values: dict[str, Any]) -> None:
    record = read(values)
    assert detect(values)[0] is RecordFormat.PREFERENCE
    assert (record.messages, record.chosen, record.rejected) == (
        ASKED,
        (Message("assistant", "A"),),
        (Message("assistant", "B"),),
    )


def test_a_label_beside_a_conversation_is_kto() -> None:
    for values in ({"messages": [USER, ASSISTANT]}, {"prompt": "Q", "completion": "A"}):
        record = read({**values, "label": False})
        assert (record.messages, record.label) == (ANSWERED, False)
    with pytest.raises(FormatFault, match="wrong type in 'label'"):
        read({"prompt": "Q", "completion": "A", "label": 3})


def test_instruction_and_input_make_one_turn_and_history_comes_before() -> None:
    record = read({"instruction": "Add.", "input": "1 2", "output": "3", "system": "S", "history": [["Hi", "Hello"]]})
    assert [(m.role, m.content) for m in record.messages] == [
        ("system", "S"),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n\n1 2"),
        ("assistant", "3"),
    ]


def test_function_calls_become_tool_calls_in_openai_form() -> None:
    call = {"name": "find", "arguments": {"q": "x"}}
    turns = [HUMAN, {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "[]"}, GPT]
    record = read({"conversations": turns, "tools": "[]"})
    assert [m.role for m in record.messages] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(record.messages[1].tool_calls or "") == [{"type": "function", "function": call}]
    assert record.tools == "[]"


def test_columns_that_no_format_uses_are_kept_as_metadata() -> None:
    record = read({"question": "Q", "answer": "A", "topic": "x", "score": 2, "none": None})
    assert record.metadata == {"topic": "x", "score": 2}
    assert (record.source, record.position) == ("a.jsonl", 3)


def test_unknown_and_ambiguous_columns_are_named() -> None:
    with pytest.raises(FormatFault, match="unknown columns: bar, foo"):
        detect(["foo", "bar"])
    with pytest.raises(FormatFault, match=r"ambiguous columns: .*fit prompt_completion and text.*input_format"):
        detect(["prompt", "completion", "text"])
    assert format_of(["prompt", "completion", "text"], RecordFormat.TEXT)[0] is RecordFormat.TEXT
    with pytest.raises(FormatFault, match="input_format text needs a column 'text'"):
        format_of(["prompt"], RecordFormat.TEXT)


def test_the_reason_for_a_format_names_its_columns() -> None:
    assert detect(["prompt", "completion"])[1] == "columns 'prompt' and 'completion'"
    assert detect(["messages", "label"])[1] == "column 'label' beside 'messages'"


def test_renamed_columns_lose_nothing() -> None:
    values = renamed({"ask": "Q", "say": "A", "prompt": "old"}, {"prompt": "ask", "completion": "say"})
    assert values == {"prompt": "Q", "completion": "A", "prompt (source)": "old"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "Q", "answer": 42}, "wrong type in 'answer': expected text, found 42"),
        ({"messages": "hello"}, "wrong type: expected JSON"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role in 'messages': 'narrator'"),
        ({"messages": ["x"]}, "expected a turn with role and content"),
        ({"chosen": "A", "rejected": "B"}, "no prompt"),
    ],
)
def test_values_of_the_wrong_type_are_faults(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatFault, match=message):
        read(values)


def test_a_record_as_csv_cells_reads_back_as_the_same_record() -> None:
    record = Record(messages=ANSWERED, label=False, metadata={"topic": "x"})
    cells = {k: "" if v is None else v if isinstance(v, str) else json.dumps(v) for k, v in record.to_row().items()}
    again = read(cells)
    assert (again.id, again.label, again.metadata) == (record.id, False, {"topic": "x"})
