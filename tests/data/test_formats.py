from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from raytune_ft.core.records import Message, Record
from raytune_ft.data.config import RecordFormat
from raytune_ft.data.conversations import without_filled_nulls
from raytune_ft.data.formats import FormatFault, detect, format_of, format_of_row, renamed, to_record

ASKED = (Message("user", "Q"),)
ANSWERED = (*ASKED, Message("assistant", "A"))
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def read(values: dict[str, Any]) -> Record:
    return to_record(values, detect(values)[0], source="a.jsonl", position=3)


def read_row(values: dict[str, Any]) -> Record:
    return to_record(values, format_of_row(values, None)[0], source="a.jsonl", position=3)


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
    assert record.tools is None


def test_columns_that_no_format_uses_are_kept_as_metadata() -> None:
    record = read({"question": "Q", "answer": "A", "topic": "x", "score": 2, "none": None})
    assert record.metadata == {"topic": "x", "score": 2}
    assert (record.source, record.position) == ("a.jsonl", 3)


def test_unknown_and_ambiguous_columns_are_named() -> None:
    with pytest.raises(FormatFault, match=r"unknown columns: bar, foo; .* \(for example prompt: bar\)"):
        detect(["foo", "bar"])
    with pytest.raises(FormatFault, match=r"\(for example prompt: sentence\)"):
        detect(["label", "sentence"])
    with pytest.raises(FormatFault, match=r"\(for example answer: replies\)"):
        detect(["question", "replies"])
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


def test_the_last_line_of_a_gsm8k_answer_is_the_reference_and_the_answer_stays_whole() -> None:
    record = read({"question": "2*3?", "answer": "2*3 = <<2*3=6>>6\n#### 6"})
    assert (record.answer, record.reference) == ("2*3 = <<2*3=6>>6\n#### 6", "6")
    assert read({"question": "Q", "answer": "#### title\ntext"}).reference is None
    assert read({"question": "Q", "answer": "a\n#### 1", "reference": "2"}).reference == "2"


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q", "reference": "42"},
        {"prompt": [USER], "reference": 42},
        {"question": "Q", "reference": "42"},
        {"instruction": "Q", "reference": "42"},
    ],
)
def test_a_prompt_with_only_a_reference_has_no_answer_turn(values: dict[str, Any]) -> None:
    record = read(values)
    assert detect(values)[0] is RecordFormat.PROMPT_REFERENCE
    assert (record.messages, record.reference, record.answer) == (ASKED, "42", "42")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Q"},
        {"prompt": [USER], "id": 3},
        {"question": "Q", "tools": None},
        {"instruction": "Q", "input": ""},
        {"prompt": "Q", "completion": None, "text": None, "answer": None},
    ],
)
def test_a_prompt_alone_is_one(values: dict[str, Any]) -> None:
    assert format_of_row(values, None)[0] is RecordFormat.PROMPT
    record = read({name: value for name, value in values.items() if value is not None})
    assert (record.messages, record.reference, record.answer) == (ASKED, None, None)
    assert read({"prompt": "Q", "system": "S"}).messages == (Message("system", "S"), *ASKED)


def test_which_column_is_the_prompt_and_what_an_answer_is_are_not_guessed() -> None:
    with pytest.raises(FormatFault, match="each of prompt, question could be the prompt"):
        detect(["prompt", "question", "reference"])
    with pytest.raises(FormatFault, match="unknown columns: answer, prompt"):
        detect(["prompt", "answer"])
    with pytest.raises(FormatFault, match="no reference"):
        read({"prompt": "Q", "reference": None})
    with pytest.raises(FormatFault, match="unknown columns: prompt, question"):
        detect(["prompt", "question"])
    with pytest.raises(FormatFault, match="no prompt: none of the columns prompt, question, instruction holds one"):
        read({"prompt": None})
    assert detect(["prompt", "completion", "reference"])[0] is RecordFormat.PROMPT_COMPLETION


def test_rows_of_several_formats_under_one_schema_are_told_by_what_is_filled() -> None:
    table = {"prompt": None, "completion": None, "text": None, "instruction": "", "output": ""}
    assert format_of_row({**table, "text": "T"}, None)[0] is RecordFormat.TEXT
    assert format_of_row({**table, "prompt": "Q", "completion": "A"}, None)[0] is RecordFormat.PROMPT_COMPLETION
    assert format_of_row({"prompt": "Q", "completion": None}, None)[0] is RecordFormat.PROMPT_COMPLETION
    with pytest.raises(FormatFault, match="ambiguous columns: completion, instruction, output, prompt, text"):
        format_of_row({**table, "text": "T", "prompt": "Q", "completion": "A"}, None)


def test_openai_tool_calls_keep_their_arguments_and_ids() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find", "arguments": '{"q": "x"}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "[]"},
        ASSISTANT,
    ]
    record = read({"messages": turns, "tools": [{"type": "function", "function": {"name": "find"}}]})
    assert json.loads(record.messages[1].tool_calls or "") == [call]
    assert record.messages[1].content == ""
    assert json.loads(record.tools or "")[0]["function"]["name"] == "find"
    assert record.messages[2] == Message("tool", "[]", tool_call_id="c1")
    assert record.metadata == {}


def test_older_and_shorter_ways_to_write_a_call_become_the_same() -> None:
    call = {"name": "find", "arguments": "{}"}
    written = [
        {"role": "assistant", "function_call": call},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([{"type": "function", "function": call}])},
        {"from": "tool_call", "value": json.dumps(call)},
    ]
    ids = {read({"messages": [USER, turn, {"role": "function", "content": "1"}, ASSISTANT]}).id for turn in written}
    assert len(ids) == 1


def test_text_parts_become_one_text_and_images_are_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, ASSISTANT]}).messages[0].content == "ab"
    with pytest.raises(FormatFault, match=r"wrong type in 'messages\.user': a part that is no text"):
        read({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]})


def test_turns_as_a_struct_of_lists_or_with_other_spellings_are_turns() -> None:
    assert read({"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"]}}).messages == ANSWERED
    assert (
        read({"conversations": [{"role": "User", "content": "Q"}, {"role": "AI", "content": "A"}]}).messages == ANSWERED
    )
    assert read({"messages": json.dumps([USER, ASSISTANT])}).messages == ANSWERED


def test_what_turns_say_beside_role_and_text_and_a_second_system_prompt_are_kept() -> None:
    record = read({"messages": [{"role": "system", "content": "S"}, {**USER, "name": "Ann", "weight": None}, ASSISTANT],
                   "system": "other"})  # fmt: skip
    assert record.messages[0] == Message("system", "S")
    assert record.metadata == {"messages (other fields)": {"1": {"name": "Ann"}}, "system": "other"}


def test_tokens_of_an_earlier_run_are_not_kept_as_metadata() -> None:
    row = {**Record(messages=ANSWERED).to_row(), "input_ids": [1, 2], "supervised": [False, True]}
    assert read(row) == Record(messages=ANSWERED, source="a.jsonl", position=3)


def test_of_several_prompts_of_a_preference_the_stated_format_takes_the_first() -> None:
    values = {"prompt": "Q", "messages": [USER, ASSISTANT], "chosen": [USER, ASSISTANT],
              "rejected": [USER, {"role": "assistant", "content": "B"}], "score": 3}  # fmt: skip
    with pytest.raises(FormatFault, match=r"each of prompt, messages could be the prompt .*input_format: preference"):
        detect(values)
    record = to_record(values, RecordFormat.PREFERENCE, source="a.jsonl", position=0)
    assert (record.messages, record.chosen) == (ASKED, (Message("assistant", "A"),))
    assert record.metadata == {"messages": [USER, ASSISTANT], "score": 3}


def test_null_columns_of_other_formats_do_not_decide_a_rows() -> None:
    talk = {"messages": [USER, ASSISTANT]}
    for nulls in ({"chosen": None, "rejected": None}, {"label": None}, {"chosen": [], "rejected": []}):
        assert format_of_row({**talk, **nulls}, None)[0] is RecordFormat.MESSAGES
        assert read_row({**talk, **nulls}).messages == ANSWERED
    sft = {"prompt": "Q", "completion": "A", "chosen": None, "rejected": None, "label": None}
    assert format_of_row(sft, None)[0] is RecordFormat.PROMPT_COMPLETION
    assert format_of_row({**sft, "label": False}, None)[0] is RecordFormat.KTO
    pair = {"prompt": "Q", "completion": None, "chosen": "A", "rejected": "B", "label": None}
    assert format_of_row(pair, None)[0] is RecordFormat.PREFERENCE


def test_half_a_pair_and_an_answer_without_judgement_stay_what_they_are() -> None:
    asked = {"messages": [USER]}
    assert format_of_row({**asked, "chosen": "A", "rejected": None}, None)[0] is RecordFormat.PREFERENCE
    assert format_of_row({**asked, "chosen": None, "rejected": "B"}, None)[0] is RecordFormat.PREFERENCE
    assert format_of_row({**asked, "preferred": "A", "rejected": None}, None)[0] is RecordFormat.FEEDBACK
    assert format_of_row({**asked, "response": "A", "rating": None}, None)[0] is RecordFormat.FEEDBACK
    record = Record(messages=ANSWERED).to_row()
    assert format_of_row(record, None)[0] is RecordFormat.RECORD


def test_a_turn_says_what_stands_in_value_where_content_is_null() -> None:
    turns = [{**HUMAN, "role": None, "content": None}, {**GPT, "role": None, "content": None}]
    assert read({"conversations": turns}).messages == ANSWERED


def test_a_weight_of_0_stays_with_its_turn_and_others_are_refused() -> None:
    record = read({"messages": [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 1}]})
    assert [turn.weight for turn in record.messages] == [None, 0, None, None]
    assert Record.from_row(record.to_row()) == record
    with pytest.raises(FormatFault, match=r"wrong value in 'messages\.weight': expected 0 \(not trained on\) or 1"):
        read({"messages": [USER, {**ASSISTANT, "weight": 0.5}]})


def test_a_message_without_the_newer_fields_gives_the_same_id_as_before() -> None:
    record = Record(messages=(Message("user", "a"), Message("assistant", "b")))
    turns = [{"role": role, "content": text, "tool_calls": None} for role, text in (("user", "a"), ("assistant", "b"))]
    content = json.dumps([turns, None, [], [], None, None, None])
    assert record.id == hashlib.sha256(content.encode()).hexdigest()[:16]


@pytest.mark.parametrize("tools", [[], "[]", " [ ] ", "", "null", None])
def test_an_empty_list_of_tools_is_none(tools: object) -> None:
    assert read({"messages": [USER, ASSISTANT], "tools": tools}).tools is None


def test_fields_that_a_table_filled_with_null_are_no_part_of_calls_and_tools() -> None:
    filled = {"name": "find", "arguments": {"q": "x", "city": None, "tags": ["a", None]}}
    tool = {"name": "find", "parameters": {"properties": {"q": {"type": "string", "enum": None}, "city": None}}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": filled}]}]
    row = without_filled_nulls({"messages": turns, "tools": [tool], "note": {"a": None}})
    arguments = row["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"q": "x", "tags": ["a", None]}
    assert row["tools"] == [{"name": "find", "parameters": {"properties": {"q": {"type": "string"}}}}]
    assert row["note"] == {"a": None}


def test_a_nan_is_no_value() -> None:
    assert read({"prompt": "q", "completion": "a", "group": float("nan"), "tools": float("nan")}).metadata == {}


def test_numbers_that_json_cannot_say_stand_in_no_metadata() -> None:
    nested = read({"prompt": "q", "completion": "a", "scores": {"a": float("nan"), "b": [1.5, float("nan")]}})
    assert nested.metadata == {"scores": {"a": None, "b": [1.5, None]}}
    for number in (float("inf"), -float("inf")):
        with pytest.raises(FormatFault, match=r"value in the metadata: a number that JSON cannot say: -?Inf"):
            read({"prompt": "q", "completion": "a", "score": number})
    record = {**Record(ANSWERED).to_row(), "metadata": '{"score": Infinity}'}
    with pytest.raises(FormatFault, match="wrong value in the metadata"):
        read(record)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400 + ".0"])
def test_numbers_that_json_cannot_say_stand_in_no_tools_that_are_text(number: str) -> None:
    with pytest.raises(FormatFault, match="wrong value in tools or calls: no number that JSON can say"):
        read({"messages": [USER, ASSISTANT], "tools": f'[{{"name": "find", "most": {number}}}]'})
    for said in ('[{"name": "NaN", "most": 1e300}]', "Infinity tools"):
        assert read({"messages": [USER, ASSISTANT], "tools": said}).tools == said


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_json_cannot_say_stand_in_no_call_or_tool(number: float) -> None:
    call = {"function": {"name": "find", "arguments": {"most": number}}}
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(FormatFault, match="wrong value in tools or calls: no number that JSON can say"):
        read({"messages": turns})
    with pytest.raises(FormatFault, match="wrong value in tools or calls"):
        read({"messages": [USER, ASSISTANT], "tools": [{"name": "find", "most": number}]})


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "9" * 400 + ".0"])
def test_numbers_that_json_cannot_say_stand_in_no_arguments_that_are_text(number: str) -> None:
    call = {"name": "find", "arguments": f'{{"most": {number}}}'}
    with pytest.raises(FormatFault, match="wrong value in tools or calls: no number that JSON can say"):
        read({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": call}]}]})
    with pytest.raises(FormatFault, match="wrong value in tools or calls"):
        read({"messages": [USER, {"role": "assistant", "content": None, "function_call": call}]})
    with pytest.raises(FormatFault, match="wrong value in tools or calls"):
        read({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)}]})


@pytest.mark.parametrize("said", ['{"most": "NaN"}', "NaN of them", "[" * 99_999 + "1e999", f"[{'9' * 5000}]"])
def test_arguments_and_tools_that_are_no_such_json_are_left_to_cleaning(said: str) -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": said}}]}
    record = read({"messages": [USER, turn], "tools": said})
    assert record.tools == said
    assert json.loads(record.messages[1].tool_calls)[0]["function"]["arguments"] == said


def test_reasoning_in_the_last_turn_becomes_the_rows() -> None:
    last = {**ASSISTANT, "reasoning_content": "since"}
    assert read({"messages": [USER, last]}).metadata == {"reasoning_content": "since"}
    assert "reasoning_content" not in read({"messages": [USER, last, USER, ASSISTANT]}).metadata
