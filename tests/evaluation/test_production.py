"""What the test set asks against what production asks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Message, Record
from raytune_ft.evaluation.production import (
    Sample,
    asked_prompts,
    compared_prompts,
    distance,
    production_note,
    production_prompts,
    surface,
    word_divergence,
)


def cloud(rng: np.random.Generator, middle: int, rows: int) -> np.ndarray:
    vectors = rng.normal(0, 0.3, (rows, 8))
    vectors[:, middle] += 1
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_the_same_kind_of_prompts_cannot_be_told_apart_and_another_kind_can() -> None:
    rng = np.random.default_rng(0)
    test, alike, other = cloud(rng, 0, 60), cloud(rng, 0, 60), cloud(rng, 3, 60)
    near, far = distance(test, alike), distance(test, other)
    assert near.p_value > 0.05 > far.p_value
    assert far.mmd > 3 * near.mmd
    assert near.uncovered < 0.2 < 0.8 < far.uncovered
    assert near.nearest > far.nearest
    mixed = distance(test, np.concatenate([alike[:20], other[:3]]))
    assert set(mixed.farthest[:3]) == {20, 21, 22}


def test_equal_sides_are_no_distance_apart() -> None:
    vectors = cloud(np.random.default_rng(1), 0, 30)
    found = distance(vectors, vectors)
    assert (found.mmd, found.p_value, found.uncovered) == (pytest.approx(0, abs=1e-6), 1.0, 0.0)


def test_word_frequencies_diverge_by_hand() -> None:
    from scipy.spatial.distance import jensenshannon

    assert word_divergence(["a b"], ["B a"]) == pytest.approx(0)
    assert word_divergence(["a b"], ["c d"]) == pytest.approx(1)
    # a: 2/3 and 1/2; b: 1/3 and 0; c: 0 and 1/2.
    expected = jensenshannon([2 / 3, 1 / 3, 0], [1 / 2, 0, 1 / 2], base=2) ** 2
    assert word_divergence(["a a b"], ["a c"]) == pytest.approx(expected)


def test_surface_by_hand() -> None:
    found = surface(["one two?", "one 2 three four", "ä\nb"])
    assert found["words_median"] == 2
    assert (found["with_question_mark"], found["with_digits"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert (found["with_several_lines"], found["beyond_ascii"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_a_sample_is_the_same_in_any_order() -> None:
    texts = [f"text {n}" for n in range(100)]
    samples = []
    for order in (range(100), reversed(range(100))):
        sample = Sample(most=10)
        for place in order:
            sample.add(texts[place], place)
        samples.append(sample.texts)
    assert samples[0] == samples[1]
    assert len(samples[0]) == 10


def test_feedback_records_are_read_by_what_they_ask(tmp_path: Path) -> None:
    lines = [
        {"prompt": "how?", "response": "so", "rating": "up"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}], "correction": "x"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sorted(production_prompts(str(tmp_path))) == ["how?", "why?"]
    (tmp_path / "a.jsonl").write_text('{"response": "so"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: has neither `prompt` nor `messages`"):
        production_prompts(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        production_prompts(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="has no prompts"):
        asked_prompts([Record(text="raw")])
    assert asked_prompts([Record(messages=(Message("user", "a"), Message("assistant", "b")))]) == ["a"]


def test_the_note_carries_the_numbers() -> None:
    rng = np.random.default_rng(0)
    vectors = cloud(rng, 0, 30), cloud(rng, 3, 40)
    found = compared_prompts(["one two"] * 30, ["three four five"] * 40, vectors, seed=0)
    note = production_note(found)
    assert note.startswith("What production asks differs from what the test set asks (maximum mean discrepancy 0.")
    assert "of 40 production prompts" in note
    assert "median words 2 in the test set, 3 in production" in note
    assert len(found["farthest"]) == 5
