from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
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
        "malformed JSON: Expecting value: character 10",
        "expected a JSON object, found a list",
        "not UTF-8: byte 0xe9 at place 11 of the line",
    ]
    assert [r.raw for r in rows] == ['{"text": ', "[1]", '{"text": "\ufffd"}']


def test_half_a_surrogate_pair_is_replaced_and_a_whole_one_kept(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path / "a.jsonl", b'{"text": "\\ud800 \\ud83d\\ude00"}')
    assert row.values == {"text": "? \U0001f600"}


CONTENTS = {"a.jsonl": b'{"text": "a"}\n{"text": "b"}', "a.json": b'[{"text": "a"}, {"text": "b"}]',
            "a.csv": b"text\na\nb\n", "a.txt": b"a\nb\n"}  # fmt: skip


def packed(content: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(("name", "content"), CONTENTS.items())
@pytest.mark.parametrize(("ending", "codec"), [(".gz", "gzip"), (".zst", "zstd"), (".bz2", "bz2")])
def test_compressed_files_read_the_same(tmp_path: Path, name: str, content: bytes, ending: str, codec: str) -> None:
    half = len(content) // 2
    appended = packed(content[:half], codec) + packed(content[half:], codec)
    for whole in (packed(content, codec), appended):
        assert [row.values for row in rows_of(tmp_path / (name + ending), whole)] == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=f"{name}{ending}: "):
        rows_of(tmp_path / (name + ending), packed(content, codec)[:-9])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"data": []}', "a.json: expected a JSON list of records, found an object"),
        ("a.json", b'[{"text": "a"},\n', "a.json:2: malformed JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', "a.json:2: more follows .* name the file .jsonl"),
        ("a.csv", b"a,a\n1,2\n", "more than one column named 'a'"),
        ("a.csv", b'text\n"open\n', "a.csv:2: malformed CSV"),
        ("a.csv", b'text\n"two\nlines"\n"open\n,\n,\n', "a.csv:4: malformed CSV in the row that begins here"),
        ("a.csv", b'text\na\n"b"c\nd\n', "a.csv:3: malformed CSV in the row that begins here"),
        ("a.csv", b"\n", "a.csv: has no header line"),
        ("a.csv", b"text\n", "a.csv: holds no rows"),
        ("a.csv", b"text,cat\xe9gorie\na,b\n", "a.csv:1: not UTF-8: byte 0xe9 in column .* of the header"),
        ("a.json", b"[]", "a.json: holds no rows"),
        ("a.json", b'["\xe9"]', "a.json:1: not UTF-8: byte 0xe9"),
        ("a.txt", b"\n \n", "a.txt: holds no rows"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: cannot be read as Parquet at its end"),
        ("a.arrow", b"ARROW1 cut short", "a.arrow: cannot be read as Arrow behind row 0"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "a.jsonl: is UTF-16; convert it to UTF-8: iconv"),
        ("a.csv", "text\na\n".encode("utf-16-le"), "a.csv: is UTF-16 or UTF-32 without a mark"),
        ("a.json", "[]".encode("utf-32-be"), "a.json: is UTF-16 or UTF-32 without a mark"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "a.jsonl: is gzip-compressed; name it with .gz"),
        ("a.jsonl.gz", b'{"text": "a"}\n', "a.jsonl.gz: cannot be read behind row 0"),
        ("a.jsonl", lzma.compress(b'{"text": "a"}'), "a.jsonl: is xz-compressed; unpack it"),
        ("a.txt", b"PAR1....", "a.txt: is Parquet; name it .parquet"),
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


def test_csv_bytes_that_are_no_text_are_a_fault_of_their_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", b"prompt,completion\na,caf\xe9\nb,caf\xc3\xa9\nNUL,a\x00b\n")
    assert (rows[0].fault, rows[0].line) == ("not UTF-8: byte 0xe9 in column 'completion'", 2)
    assert rows[0].raw == '["a", "caf?"]'
    assert [row.values for row in rows[1:]] == [
        {"prompt": "b", "completion": "café"},
        {"prompt": "NUL", "completion": "a\x00b"},
    ]


def test_a_fault_in_a_list_names_its_line_and_keeps_its_text(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.json", b'[{"a": 1},\n 7,\n{"a": 1, "a": 2}, null]')
    assert [(row.position, row.line, row.fault, row.raw) for row in rows] == [
        (0, 1, None, '{"a": 1}'),
        (1, 2, "expected a JSON object, found a number", "7"),
        (2, 3, "repeated key: 'a' stands more than once in an object", '{"a": 1, "a": 2}'),
        (3, 3, "expected a JSON object, found null", "null"),
    ]


def test_a_damaged_row_group_is_named_and_the_ones_before_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n} " * 50 for n in range(300)]}), path, row_group_size=100)
    described = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = described.dictionary_page_offset or described.data_page_offset
    data[start : start + described.total_compressed_size] = b"\xff" * described.total_compressed_size
    path.write_bytes(bytes(data))
    read = []
    with pytest.raises(DataError, match=r"a.parquet: cannot be read as Parquet at row group 1 of 3 \(rows from 100\)"):
        for row in read_rows(find_files([str(path)])[0]):
            read.append(row)
    assert len(read) == 100
    path.write_bytes(bytes(data[:-20]))
    with pytest.raises(DataError, match="at its end, where the description of its columns should be"):
        rows_of(path, bytes(data[:-20]))


def test_columns_of_the_same_name_are_refused_in_parquet_and_arrow(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(DataError, match=f"{name}: has more than one column named 'text'"):
            list(read_rows(find_files([str(tmp_path / name)])[0]))


def test_arrow_streams_and_files_read_the_same(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None], "n": [1, 2]})
    for name, writer in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, writer(sink, table.schema) as out:
            out.write_table(table)
    streamed, filed = (list(read_rows(find_files([str(tmp_path / n)])[0])) for n in ("stream.arrow", "file.arrow"))
    assert [row.values for row in streamed] == [row.values for row in filed] == table.to_pylist()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_row_of_ten_megabytes_is_a_row(tmp_path: Path, name: str) -> None:
    long = "word " * (2 << 20)
    row = {"text": long}
    contents = {"a.jsonl": json.dumps(row), "a.json": json.dumps([row]), "a.csv": f"text\n{long}\n", "a.txt": long}
    if name == "a.parquet":
        pq.write_table(pa.table({"text": [long]}), tmp_path / name)
        content_bytes = (tmp_path / name).read_bytes()
    else:
        content_bytes = contents[name].encode()
    (row,) = rows_of(tmp_path / name, content_bytes)
    assert row.values == {"text": long}


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" + '{"text": "a"},\n' * 20_000 + "oops")
    rows = read_rows(find_files([str(tmp_path / "a.json")])[0])
    assert next(rows).values == {"text": "a"}
    with pytest.raises(DataError, match=r"a.json:20001: malformed JSON"):
        for _ in rows:
            pass


def test_arrow_text_that_is_no_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    ends = pa.py_buffer(np.array([0, 1, 3, 4], np.int32).tobytes())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 3, [None, ends, pa.py_buffer(b"a\xff\xfeb")])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        rows = list(read_rows(find_files([str(tmp_path / name)])[0]))
        assert [row.values for row in rows] == [{"text": "a"}, None, {"text": "b"}]
        assert (rows[1].position, rows[1].fault) == (1, "not UTF-8: byte 0xff in column 'text'")
        assert rows[1].raw == '{"text": "\ufffd\ufffd"}'


def test_a_date_that_python_cannot_hold_is_a_fault_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "day": pa.array([0, 2**30], pa.int32()).cast(pa.date32())}), path)
    good, bad = read_rows(find_files([str(path)])[0])
    assert good.fault is None
    assert bad.fault is not None
    assert bad.fault.startswith("out of range: a date32[day] in column 'day'")


def test_a_csv_with_another_separator_says_which(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="separated by ';'; write it anew with commas"):
        rows_of(tmp_path / "a.csv", b"prompt;completion\na;b\n")
