from __future__ import annotations

import datetime
import json
import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.draft import begin
from raytune_ft.core.errors import ArtifactError, DataError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.records import Message, Record, records_to_table
from raytune_ft.evaluation.rows import check_rows, prompt_text, prompt_turns, read_rows

ASKED = Record(messages=(Message("system", "Be short."), Message("user", "2 + 2?"), Message("assistant", "4")))
OPEN = Record(messages=(Message("user", "Capital of France?"),), reference="Paris")


def dataset(folder: Path, **splits: list[Record]) -> Path:
    draft = begin(folder, ArtifactKind.DATASET, settings={})
    with draft:
        for name, records in splits.items():
            (draft.folder / name).mkdir()
            pq.write_table(records_to_table(records), draft.folder / name / "part-0.parquet")
    return folder


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_split_of_an_artifact_is_read_in_order(tmp_path: Path) -> None:
    rows = read_rows(str(dataset(tmp_path / "d", train=[OPEN], test=[ASKED, OPEN])), "test")
    assert [record.id for record in rows.records] == [ASKED.id, OPEN.id]
    assert (rows.split, rows.parent.role) == ("test", "dataset")
    assert read_rows(str(tmp_path / "d"), "test", max_rows=1).records == rows.records[:1]


def test_answers_that_people_disliked_are_no_references(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = (
        replace(ASKED, label=True),
        replace(ASKED, messages=(*ASKED.prompt, Message("assistant", "5")), label=False),
    )
    folder = dataset(tmp_path / "d", test=[bad, good, OPEN])
    with caplog.at_level(logging.WARNING, "raytune_ft"):
        rows = read_rows(str(folder), "test")
    assert [record.answer for record in rows.records] == ["4", "Paris"]
    assert "1 row is an answer that people disliked" in caplog.text
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(str(dataset(tmp_path / "e", test=[bad])), "test")
    turns = [{"role": "user", "content": "How was it?"}, {"role": "assistant", "content": "bad"}]
    other = jsonl(tmp_path / "f.jsonl", {"messages": turns, "label": "bad"})
    assert len(read_rows(str(other), "test").records) == 1


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", train=[OPEN], validation=[OPEN], rejected=[OPEN])
    with pytest.raises(DataError, match=r"has no split 'test' \(splits with rows: train, validation\)"):
        read_rows(str(folder), "test")


def test_an_unfinished_dataset_is_refused(tmp_path: Path) -> None:
    begin(tmp_path / "d", ArtifactKind.DATASET, settings={})
    with pytest.raises(ArtifactError, match="did not finish"):
        read_rows(str(tmp_path / "d"), "test")


def test_files_of_conversations_are_read_with_or_without_a_folder(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "other": 1}
    jsonl(tmp_path / "test.jsonl", row)
    pq.write_table(records_to_table([ASKED]), tmp_path / "held_out.parquet")
    alone = read_rows(str(tmp_path / "test.jsonl"), "ignored")
    assert (alone.records[0].answer, alone.split) == ("4", None)
    assert read_rows(str(tmp_path), "test").records == alone.records
    assert read_rows(str(tmp_path), "held_out").records[0].id == ASKED.id


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"messages": [', "is not valid JSON"),
        ('{"prompt": "a", "completion": "b"}', "neither `messages` nor `text`; run `raytune-ft prepare`"),
        ('{"messages": "hello"}', "must be a list of messages"),
        ('{"messages": [{"role": "boss", "content": "a"}]}', "a message needs a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "a content that is text"),
        (r'{"messages": [{"role": "user", "content": "a \ud83d b"}]}', r"holds half a character \('\\ud83d'"),
        (r'{"text": "fine", "metadata": {"x": "\udc00"}}', "holds half a character"),
        ("[" * 9000, "is not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = jsonl(tmp_path / "test.jsonl", {"text": "fine"}, line)
    with pytest.raises(DataError, match=rf"test\.jsonl:2: .*{fault}"):
        read_rows(str(path), "test")


def test_metadata_hold_what_json_can_say(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    nothing = jsonl(tmp_path / "nan.jsonl", {**row, "metadata": {"score": float("nan"), "n": 1}})
    assert read_rows(str(nothing), "test").records[0].metadata == {"score": None, "n": 1}
    for given in ({"score": float("inf")}, '{"score": -Infinity}'):
        path = jsonl(tmp_path / "infinite.jsonl", row, {**row, "metadata": given})
        with pytest.raises(DataError, match=r"l:2: the metadata hold a number that JSON cannot say: -?Inf"):
            read_rows(str(path), "test")


@pytest.mark.parametrize(
    "given",
    ['[{"x": NaN}]', '[{"x": 1e999}]', [{"x": float("inf")}], [{"x": [float("nan")]}], "call it"],
)
def test_tools_and_calls_hold_what_json_can_say(tmp_path: Path, given: object) -> None:
    asked, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = jsonl(tmp_path / "tools.jsonl", {"messages": [asked, answer], "tools": given})
    with pytest.raises(DataError, match=r"tools.jsonl:1: `tools` must be JSON \(.*\); mend the row"):
        read_rows(str(path), "test")
    path = jsonl(tmp_path / "calls.jsonl", {"messages": [asked, {**answer, "tool_calls": given}]})
    with pytest.raises(DataError, match=r"calls.jsonl:1: `tool_calls` must be JSON \(.*\); mend the row"):
        read_rows(str(path), "test")


def test_tools_are_kept_as_they_are_written(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    kept = [
        read_rows(str(jsonl(tmp_path / "tools.jsonl", {**row, "tools": given})), "test").records[0].tools
        for given in ('[ {"name":"\\u00e9"} ]', [{"name": "é"}], None)
    ]
    assert kept == ['[ {"name":"\\u00e9"} ]', '[{"name": "é"}]', None]
    day = pa.array([[{"name": "f", "since": datetime.date(2024, 5, 1)}]])
    pq.write_table(pa.table({"messages": pa.array([row["messages"]]), "tools": day}), tmp_path / "tools.parquet")
    [dated] = read_rows(str(tmp_path / "tools.parquet"), "test").records
    assert dated.tools == '[{"name": "f", "since": "2024-05-01"}]'


def test_what_cannot_be_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such dataset"):
        read_rows(str(tmp_path / "nothing"), "test")
    with pytest.raises(DataError, match="holds no rows"):
        read_rows(str(jsonl(tmp_path / "empty.jsonl")), "test")
    with pytest.raises(DataError, match="run `raytune-ft prepare`"):
        read_rows(str(jsonl(tmp_path / "rows.csv", "a,b")), "test")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_rows(str(tmp_path / "bad.parquet"), "test")


def test_rows_without_references_are_counted_and_refused(tmp_path: Path) -> None:
    questions = [{"messages": [{"role": "user", "content": "hm?"}]}] * 2
    rows = read_rows(str(jsonl(tmp_path / "t.jsonl", ASKED.to_row(), *questions)), "test")
    with pytest.raises(DataError, match=r"2 of 3 rows \(the first is row 2\) have no reference"):
        check_rows(rows, needs_answers=False)


def test_a_call_has_a_perplexity_but_no_text_to_compare(tmp_path: Path) -> None:
    calling = Record(messages=(Message("user", "q"), Message("assistant", "", CALL)))
    rows = read_rows(str(dataset(tmp_path / "d", test=[CALLED, calling])), "test")
    check_rows(rows, needs_answers=False)
    with pytest.raises(DataError, match=r"1 of 2 rows \(the first is row 2\) end with a call of a tool and no text"):
        check_rows(rows, needs_answers=True)


def test_raw_text_has_a_perplexity_but_no_answer(tmp_path: Path) -> None:
    rows = read_rows(str(jsonl(tmp_path / "t.jsonl", {"text": "Once upon a time"})), "test")
    check_rows(rows, needs_answers=False)
    with pytest.raises(DataError, match="only perplexity"):
        check_rows(rows, needs_answers=True)


def test_the_prompt_reads_like_what_the_user_said() -> None:
    assert prompt_text(ASKED) == "2 + 2?"
    longer = Record(messages=(Message("user", "a"), Message("assistant", "b"), Message("user", "c")))
    assert prompt_text(longer) == "user: a\nassistant: b\nuser: c"


def test_the_turns_of_a_prompt_keep_what_tools_were_called() -> None:
    calls = '[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]'
    turns = (Message("user", "q"), Message("assistant", "", calls), Message("tool", "42"), Message("assistant", "a"))
    assert prompt_turns(Record(messages=turns)) == (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "42"},
    )
    assert prompt_turns(Record(messages=(turns[0], turns[3]))) == ()


CALL = '[{"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}]'
CALLED = Record(
    messages=(
        Message("user", "q"),
        Message("assistant", "", CALL, weight=0),
        Message("tool", "42", tool_call_id="call00001", name="f"),
        Message("assistant", "It is 42."),
    )
)


def test_turns_are_read_with_the_calls_that_they_answer_and_their_weight(tmp_path: Path) -> None:
    written = read_rows(str(dataset(tmp_path / "d", test=[CALLED])), "test").records
    assert [record.id for record in written] == [CALLED.id]
    assert written[0].messages == CALLED.messages
    lines = jsonl(tmp_path / "t.jsonl", {"messages": [vars(turn) for turn in CALLED.messages]})
    assert read_rows(str(lines), "test").records[0].messages == CALLED.messages


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"role": "tool", "content": "42", "tool_call_id": 7}, r"`tool_call_id` must be text \(got 7\)"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, r"`weight` must be 0 \(does not count\) or 1"),
    ],
)
def test_turns_that_say_of_themselves_what_none_can_are_refused(
    tmp_path: Path, turn: dict[str, object], said: str
) -> None:
    file = jsonl(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "q"}, turn]})
    with pytest.raises(DataError, match=rf"t.jsonl:1: {said}"):
        read_rows(str(file), "test")


def test_choices_are_read_beside_the_row_and_missing_ones_are_told(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "red or blue"}, {"role": "assistant", "content": "red"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"messages": turns, "choices": ["red", "blue"]}) + "\n" + json.dumps({"messages": turns})
    )
    rows = read_rows(str(path), "test")
    assert rows.records[0].metadata["choices"] == ["red", "blue"]
    assert rows.records[0].id == rows.records[1].id
    with pytest.raises(DataError, match=r"1 of 2 rows \(the first is row 2\) have no `choices`"):
        check_rows(rows, needs_answers=False, needs_choices=True)
    path.write_text(json.dumps({"messages": turns, "choices": "red"}))
    with pytest.raises(DataError, match="must be a list of two texts or more"):
        read_rows(str(path), "test")


def test_a_reference_is_asked_for_only_where_a_metric_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    rows = read_rows(str(path), "test")
    check_rows(rows, needs_answers=True, needs_references=False)
    with pytest.raises(DataError, match="have no reference"):
        check_rows(rows, needs_answers=True)
