from __future__ import annotations

import io
import json
import random
from typing import Any

import pytest

from raytune_ft.data import json_text
from raytune_ft.data.json_text import JsonFault, list_items, parse


def items(text: str | bytes, step: int = 1 << 30) -> list[tuple[int, Any]]:
    stream = io.BytesIO(text.encode() if isinstance(text, str) else text)
    return list(list_items(lambda size: stream.read(min(size, step))))


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_list_reads_the_same_however_it_comes_in(step: int) -> None:
    chooser = random.Random(0)
    values = [
        {"text": 'é "quoted" \\ \n' * chooser.randrange(4), "n": [1.5e10, -3, True, None, {"a": {}}]} for _ in range(30)
    ]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False)):
        assert [value for _, value in items(text, step)] == values


@pytest.mark.parametrize("step", [1, 1000])
def test_items_have_their_line_and_scalars_are_whole(step: int) -> None:
    assert items('[\n1234,\n\n "a",\n{"b":\n1}, null\n]\n', step) == [(2, 1234), (4, "a"), (5, {"b": 1}), (6, None)]
    assert items("\ufeff[]", step) == []


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[1,\n2", 2, "the list is cut short"),
        ('[1,\n"ab', 2, "malformed JSON: Unterminated string"),
        ('[{"a": 1},\n{"a" 1}]', 2, "malformed JSON: Expecting ':' delimiter"),
        ('[{"a": "x\ny"}]', 1, "malformed JSON: Invalid control character"),
        ("[1,\n2 3]", 2, "expected ',' or ']' after an item, found '3'"),
        ("[1,\n]", 2, "a comma before the end"),
        ("[1]\n[2]", 2, "more follows the list"),
        ('{"a": []}', None, "expected a JSON list of records, found an object"),
        ('"a"', None, "expected a JSON list of records, found text"),
        ('{"a": 1}\n{"a": 2}\n', 2, "name the file .jsonl"),
        (" \n", None, "holds no rows"),
        (b'["a",\n"\xe9"]', 2, "not UTF-8: byte 0xe9"),
        (b'["a",\n"b\xc3', 2, "not UTF-8: byte 0xc3"),
    ],
)
def test_what_is_wrong_with_a_list_is_said_with_its_line(
    text: str | bytes, line: int | None, message: str, step: int
) -> None:
    with pytest.raises(JsonFault) as caught:
        items(text, step)
    assert message in str(caught.value)
    assert caught.value.line == line


@pytest.mark.parametrize("step", [1, 1000])
def test_an_item_that_cannot_be_used_is_a_fault_and_the_next_ones_follow(step: int) -> None:
    deep = "[" * 300 + "]" * 300
    deeper = "[" * 20_000 + "]" * 20_000 if step > 1 else deep
    found = items('[{"a": 1, "b": "}\\"", "a": 2}, 5, {"x": ' + deep + "}, " + deeper + ", 6]", step)
    assert [value for _, value in found if not isinstance(value, JsonFault)] == [5, 6]
    faults = [value for _, value in found if isinstance(value, JsonFault)]
    assert [str(fault) for fault in faults] == [
        "repeated key: 'a' stands more than once in an object",
        "nested too deep: more than 200 levels",
        "nested too deep: more than 200 levels",
    ]
    assert [fault.text for fault in faults] == ['{"a": 1, "b": "}\\"", "a": 2}', '{"x": ' + deep + "}", deeper]


def test_only_an_item_and_its_chunk_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "_CHUNK", 1000)
    held = []
    stream = io.BytesIO(json.dumps([{"text": "x" * 100}] * 1000).encode())

    def read(size: int) -> bytes:
        held.append(size)
        return stream.read(size)

    assert sum(1 for _ in list_items(read)) == 1000
    assert max(held) <= 2000


def test_a_malformed_item_is_said_before_the_rest_is_read() -> None:
    stream = io.BytesIO(b'[{"a" 1},' + b"1," * (8 << 20) + b"1]")
    with pytest.raises(JsonFault, match="Expecting ':'"):
        list(list_items(stream.read))
    assert stream.tell() < 4 << 20


def test_one_item_of_ten_megabytes_comes_through() -> None:
    (item,) = items(json.dumps([{"text": "long " * (2 << 20)}]), 1 << 20)
    assert len(item[1]["text"]) == 10 << 20


def test_values_are_as_python_reads_them_and_stricter_where_that_loses_something() -> None:
    assert parse(' {"a": [1, "\\u0000\\ud83d\\ude00 \\ud800"]} ') == {"a": [1, "\0\U0001f600 ?"]}
    for text, message in [
        ('{"a": 1, "a": 2}', "repeated key: 'a'"),
        ("{} x", "more follows the value: character 4"),
        ('{"a": }', "malformed JSON: Expecting value: character 7"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "number too long: more than 4,300 digits"),
        ("[" * 300 + "]" * 300, "nested too deep"),
    ]:
        with pytest.raises(JsonFault, match=message):
            parse(text)
    assert parse("[" * 200 + "]" * 200)
    assert parse("[" + "[]," * 500 + "[]]")


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_a_number_of_too_many_digits_is_a_fault_of_its_item(step: int) -> None:
    long = "9" * 5000
    found = items(f'[1, {long}, {{"a": [-{long}]}},\n{long}]', step)
    assert [(line, str(value)) for line, value in found] == [
        (1, "1"),
        *[(line, "number too long: more than 4,300 digits") for line in (1, 1, 2)],
    ]
    assert [value.text for _, value in found[1:]] == [long, f'{{"a": [-{long}]}}', long]
