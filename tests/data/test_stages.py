from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data import stages
from raytune_ft.data.config import DataCollectionConfig
from raytune_ft.data.shards import count_notes
from raytune_ft.data.sources import find_files
from raytune_ft.data.stages import collect_rows


def collected(path: Path, content: bytes | str, **settings: Any) -> list[dict[str, Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    config = DataCollectionConfig(sources=[str(path)], output_path="out", **settings)
    files = pa.Table.from_pylist([asdict(file) for file in find_files(config.sources)])
    return [row for table in collect_rows(files, config) for row in table.to_pylist()]


BAD_LINES = [
    ('{"text": ', "malformed JSON: Expecting value"),
    ('["text"]', "expected a JSON object, found a list"),
    ('{"text": null}', "empty text"),
    ('{"text": 5}', "wrong type in 'text': expected text, found 5"),
    ('{"text": "a", "text": "b"}', "repeated key: 'text'"),
    ('{"text": ' + "[" * 2000 + "]" * 2000 + "}", "nested too deep"),
    ('{"other": "a"}', "unknown columns: other"),
    ('{"text": "a", "prompt": "Q", "completion": "A"}', "ambiguous columns: completion, prompt, text"),
    ('{"messages": [{"role": "user", "content": 7}]}', "wrong type in 'messages.user': expected text, found 7"),
    ('{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "A"}]}', "empty prompt"),
    ('{"messages": []}', "empty text"),
    ("\x00\x00\x00", "malformed JSON"),
]


def test_every_bad_row_is_kept_with_its_reason_and_its_text(tmp_path: Path) -> None:
    lines = ['{"text": "first"}', *(line for line, _ in BAD_LINES), '{"text": "last \\u0000"}']
    rows = collected(tmp_path / "a.jsonl", "\n".join(lines), on_bad_row="reject")
    assert [row["text"] for row in rows if row["reason"] is None] == ["first", "last"]
    assert [row["position"] for row in rows] == list(range(len(lines)))
    for row, (line, reason) in zip(rows[1:], BAD_LINES, strict=False):
        assert (row["reason"] or "").startswith(reason)
        assert row["raw"] in {line, None}
        assert row["raw"] is None or "empty" not in reason


def test_columns_that_are_not_trained_on_are_counted_and_doubtful_ones_remarked(tmp_path: Path) -> None:
    rows = [
        '{"text": "a", "label": 1, "topic": "x", "id": 7}',
        '{"text": "b", "label": null, "topic": "y"}',
        '{"prompt": "Q", "completion": "A", "topic": "z"}',
        '{"text": "", "label": 0}',
    ]
    path = tmp_path / "a.jsonl"

    def notes(**settings: Any) -> dict[str, dict[str, int]]:
        column = [row["notes"] for row in collected(path, "\n".join(rows), **settings)]
        return {kind: dict(counts) for kind, counts in count_notes(pa.chunked_array([column], pa.string())).items()}

    aside = {"metadata": {"topic": 3, "label": 2}}
    assert notes() == {**aside, "remarks": {"read as raw text, without its column 'label'": 1}}
    rows[2] = '{"text": "c", "topic": "z"}'
    assert notes(input_format="text") == aside
    rows[:] = ['{"text": "a", "label": "x"}']
    assert notes(columns={"prompt": "text", "completion": "label"}) == {}
    rows[:] = [json.dumps({"text": "a"} | {f"c{n:02}": n for n in range(40)})]
    assert notes()["metadata"] == {f"c{n:02}": 1 for n in range(16)} | {"others": 1}


@pytest.mark.parametrize(("line", "reason"), [bad for bad in BAD_LINES if not bad[1].startswith("empty")])
def test_by_default_the_first_bad_row_stops_the_run_with_its_file_and_line(
    tmp_path: Path, line: str, reason: str
) -> None:
    with pytest.raises(DataError) as caught:
        collected(tmp_path / "a.jsonl", '{"text": "first"}\n\n' + line)
    assert f"{tmp_path}/a.jsonl:3: {reason}" in str(caught.value)
    assert "set on_bad_row: reject" in str(caught.value)


def test_feedback_without_judgement_never_stops_a_run(tmp_path: Path) -> None:
    feedback = [{"prompt": "Q", "response": "A", "rating": rating} for rating in ("up", 3, None)]
    rows = collected(tmp_path / "a.jsonl", "\n".join(map(json.dumps, feedback)))
    assert [(row["label"], row["reason"]) for row in rows] == [
        (True, None),
        (None, "feedback without judgement: rating 3 of 5 is neither good nor bad"),
        (None, "feedback without judgement: neither rating, correction nor a pair"),
    ]
    assert json.loads(rows[1]["raw"]) == feedback[1]


def test_rows_of_several_schemas_may_share_a_file(tmp_path: Path) -> None:
    mixed = [{"text": "T"}, {"prompt": "Q", "completion": "A"}, {"question": "Q", "answer": "A\n#### 1", "topic": "x"}]
    rows = collected(tmp_path / "a.json", json.dumps(mixed))
    assert [row["format"].partition(" ")[0] for row in rows] == ["text", "prompt_completion", "question_answer"]
    assert (rows[2]["reference"], json.loads(rows[2]["metadata"])) == ("1", {"topic": "x"})


def test_redaction_reaches_rejected_rows_and_is_counted(tmp_path: Path) -> None:
    lines = ['{"text": "mail a@b.org or c@d.org"}', '{"who": "a@b.org"}', '{"text": "none"}', '{"text": "e@f.org"}']
    rows = collected(tmp_path / "a.jsonl", "\n".join(lines), on_bad_row="reject", redact=["email"])
    assert [row["text"] or row["raw"] for row in rows] == [
        "mail [EMAIL] or [EMAIL]",
        '{"who": "[EMAIL]"}',
        "none",
        "[EMAIL]",
    ]
    notes = pa.chunked_array([[row["notes"] for row in rows]], pa.string())
    assert count_notes(notes) == {"changed": {"redact email": 2}, "redacted": {"email": 3}}


def test_steps_that_changed_rows_are_counted(tmp_path: Path) -> None:
    lines = ['{"text": " a"}', '{"text": "b "}', '{"text": "c\\u0007 "}', '{"text": "d"}']
    rows = collected(tmp_path / "a.jsonl", "\n".join(lines), languages=["en"])
    notes = pa.chunked_array([[row["notes"] for row in rows]], pa.string())
    assert count_notes(notes) == {
        "changed": {"strip_whitespace": 3, "remove_control_characters": 1},
        "undecided": {"language": 4},
    }


def test_batches_stay_small_where_rows_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_BATCH_CHARACTERS", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 400}) + "\n" for _ in range(9)))
    config = DataCollectionConfig(sources=[str(path)], output_path="out")
    tables = list(collect_rows(pa.Table.from_pylist([asdict(f) for f in find_files(config.sources)]), config))
    assert [table.num_rows for table in tables] == [3, 3, 3, 0]


def test_redaction_of_a_rejected_row_reads_what_its_json_says(tmp_path: Path) -> None:
    (row,) = collected(tmp_path / "a.jsonl", '{"who": "\\n+49 30 901820"}', on_bad_row="reject", redact=["phone"])
    assert row["raw"] == '{"who": "\\n[PHONE]"}'


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "number too long: more than 4,300 digits"),
        ('{"instruction": "Q", "output": "A", "history": 5}', "wrong type in 'history': expected pairs"),
        (
            json.dumps({"prompt": "Q", "completion": "A", "tools": "[" * 100_000}),
            "malformed tools: nested too deep",
        ),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "Q"},
                        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]},
                    ]
                }
            ),
            "malformed tool call: the arguments of f are no JSON: nested too deep",
        ),
    ],
)
def test_numbers_and_depths_beyond_what_python_reads_are_faults_of_their_row(
    tmp_path: Path, row: str, reason: str
) -> None:
    found = collected(tmp_path / "a.jsonl", f'{row}\n{{"text": "next"}}', on_bad_row="reject")
    assert [(told["reason"] or "")[: len(reason)] for told in found] == [reason, ""]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metadata": 5}, "wrong type in 'metadata': expected an object, found 5"),
        ({"metadata": [1]}, "wrong type in 'metadata'"),
        ({"label": 1}, "wrong type in 'label': expected true or false, found 1"),
        ({"label": "7"}, "wrong type in 'label': expected true or false, found 7"),
        ({"label": {"a": 1}}, "wrong type in 'label'"),
    ],
)
def test_a_record_with_a_field_of_the_wrong_type_is_a_fault(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    line = json.dumps({"messages": [], "text": "T", "chosen": [], "rejected": [], **values})
    (row,) = collected(tmp_path / "a.jsonl", line, on_bad_row="reject", input_format="record")
    assert row["reason"].startswith(message)
    with pytest.raises(DataError, match=r"a.jsonl:1: wrong type"):
        collected(tmp_path / "a.jsonl", line, input_format="record")


def test_rows_say_which_columns_were_renamed(tmp_path: Path) -> None:
    lines = '{"ask": "Q", "completion": "A"}\n{"prompt": "Q", "completion": "A"}\n{"ask": "Q", "other": 1}'
    rows = collected(tmp_path / "a.jsonl", lines, columns={"prompt": "ask"}, on_bad_row="reject")
    assert [row["notes"] for row in rows] == ['{"renamed": ["prompt"]}', None, '{"renamed": ["prompt"]}']
