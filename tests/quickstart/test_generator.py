"""The quickstart's data: what the shipped files hold, and what the test set may not share with training."""

import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import ftfy

from raytune_ft.quickstart import generator
from raytune_ft.quickstart.generator import Row

VOCABULARIES = (generator.TRAINING_VOCABULARY, generator.TEST_VOCABULARY)


def shipped(name: str) -> list[Row]:
    lines = (generator.DATA_FOLDER / name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def user_text(row: Row) -> str:
    return row["messages"][1]["content"]


def answer(row: Row) -> str:
    return row["messages"][2]["content"]


def mended(text: str) -> str:
    return ftfy.fix_text(text).strip()


def occurs(phrase: str, text: str) -> bool:
    """Whether `phrase` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def test_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    generator.write_files(tmp_path / "made")
    for name in (generator.POOL_FILE, generator.TEST_FILE):
        assert (tmp_path / "made" / name).read_bytes() == (generator.DATA_FOLDER / name).read_bytes()


def test_row_counts_are_the_stated_ones() -> None:
    pool, test = shipped(generator.POOL_FILE), shipped(generator.TEST_FILE)
    assert len(pool) == generator.POOL_ROWS
    assert generator.SOUND_ROWS >= 400
    assert len(test) == generator.TEST_ROWS >= 100


def test_every_vocabulary_has_sixty_different_values() -> None:
    assert len(generator.FIELDS) >= 5
    for vocabulary in VOCABULARIES:
        for field in fields(vocabulary):
            values = getattr(vocabulary, field.name)
            assert len(set(values)) == len(values) >= 60, field.name


def test_every_field_takes_sixty_values_in_each_file() -> None:
    for name in (generator.POOL_FILE, generator.TEST_FILE):
        orders = [json.loads(mended(answer(row))) for row in shipped(name) if answer(row)]
        for field in generator.FIELDS:
            assert len({order[field] for order in orders}) >= 60, (name, field)


def test_no_test_value_occurs_in_training() -> None:
    pool = "\n".join(mended(user_text(row)) for row in shipped(generator.POOL_FILE)).lower()
    vocabulary = generator.TEST_VOCABULARY
    for field in fields(vocabulary):
        assert [value for value in getattr(vocabulary, field.name) if occurs(str(value).lower(), pool)] == [], (
            field.name
        )


def test_no_test_wording_occurs_in_training() -> None:
    training, test = generator.TRAINING_WORDINGS, generator.TEST_WORDINGS
    assert len(training) >= 25
    assert len(test) >= 6
    assert {row["wording"] for row in shipped(generator.POOL_FILE)} == set(training)
    assert {row["wording"] for row in shipped(generator.TEST_FILE)} == set(test)
    assert not set(training.values()) & set(test.values())


def test_every_wording_has_every_field_once() -> None:
    for wording in [*generator.TRAINING_WORDINGS.values(), *generator.TEST_WORDINGS.values()]:
        assert sorted(re.findall(r"{(\w+)}", wording)) == sorted(generator.FIELDS), wording


def test_every_answer_is_one_line_of_json_with_values_from_the_text() -> None:
    for row in [*shipped(generator.POOL_FILE), *shipped(generator.TEST_FILE)]:
        if not answer(row):
            continue
        line, text = mended(answer(row)), mended(user_text(row))
        order = json.loads(line)
        assert "\n" not in line
        assert tuple(order) == generator.FIELDS
        assert isinstance(order["quantity"], int)
        for value in order.values():
            assert occurs(str(value), text), (value, text)


def test_only_the_planted_duplicates_are_duplicates() -> None:
    pool = Counter(mended(user_text(row)) for row in shipped(generator.POOL_FILE))
    test = Counter(user_text(row) for row in shipped(generator.TEST_FILE))
    assert sorted(pool.values()) == [1] * (len(pool) - generator.DUPLICATES) + [2] * generator.DUPLICATES
    assert set(test.values()) == {1}
    lines = (generator.DATA_FOLDER / generator.POOL_FILE).read_bytes().splitlines()
    assert len(lines) - len(set(lines)) == generator.DUPLICATES


def test_faults_are_as_many_as_stated() -> None:
    pool = shipped(generator.POOL_FILE)
    assert sum(answer(row) == "" for row in pool) == generator.EMPTY_ANSWERS
    assert sum("Ã" in user_text(row) and "Ã" in answer(row) for row in pool) == generator.MOJIBAKE
    assert sum(user_text(row) != user_text(row).strip() for row in pool) == generator.STRAY_WHITESPACE
    assert sum("\x07" in user_text(row) for row in pool) == generator.STRAY_WHITESPACE
    damaged = [row for row in pool if mended(user_text(row)) != user_text(row)]
    assert len(damaged) == generator.MOJIBAKE + generator.STRAY_WHITESPACE


def test_the_test_set_has_no_faults() -> None:
    for row in shipped(generator.TEST_FILE):
        for message in row["messages"]:
            assert message["content"] == mended(message["content"]) != ""
