from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.data.readers import SourceRow, read_rows
from raytune_ft.data.sources import find_files


def rows_of(path: Path, content: bytes) -> list[SourceRow]:
    path.write_bytes(content)
    return list(read_rows(find_files([str(path)])[0]))


def test_jsonl_rows_keep_their_line_and_blank_lines_are_none(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}')
    assert [(r.position, r.line, r.values) for r in rows] == [(0, 1, {"text": "a"}), (2, 3, {"text": "b"})]


def test_what_is_wrong_with_a_line_is_said_and_its_text_kept(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'{"text": \n[1]\n{"text": "\xe9"}\n')
    assert [r.fault for r in rows] == [
        "malformed JSON: Expecting value: line 1 column 10 (char 9)",
        "expected a JSON object, found a list",
        "not UTF-8: byte 0xe9 at place 11 of the line",
    ]
    assert [r.raw for r in rows] == ['{"text": ', "[1]", '{"text": "\ufffd"}']


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_kept(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.jsonl", b'{"text": "\\ud800 \\ud83d\\ude00"}')
    assert row.values == {"text": "? \U0001f600"}


def test_compressed_files_read_the_same(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.jsonl.gz", gzip.compress(b'{"text": "a"}\n'))
    assert row.values == {"text": "a"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": []}', "a.json: expected a JSON list of records, found an object"),
        ("a.json", b'[{"text": "a"},\n', "a.json:2: malformed JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "a.json:2: more follows .* name the file .jsonl"),
        ("a.csv", b"a,a\n1,2\n", "more than one column named 'a'"),
        ("a.csv", b'text\n"open\n', "a.csv:2: malformed CSV"),
        ("a.csv", b"text\ncaf\xe9\n", "a.csv: not UTF-8"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name, content)


def test_a_ragged_csv_row_is_a_fault_of_its_line(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", b'prompt,completion\n"two\nlines",b\nc\n')
    assert (rows[0].values, rows[0].line) == ({"prompt": "two\nlines", "completion": "b"}, 3)
    assert (rows[1].fault, rows[1].line) == ("ragged row: 1 cells where the header has 2 columns", 4)


def test_parquet_and_text_give_a_row_each(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    parquet = list(read_rows(find_files([str(tmp_path / "a.parquet")])[0]))
    text = rows_of(tmp_path / "a.txt", b"a\n\nb\n")
    assert [r.values for r in parquet] == [r.values for r in text] == [{"text": "a"}, {"text": "b"}]
