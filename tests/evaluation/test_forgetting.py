"""Shipped questions have one right answer each, and losses beyond the thresholds are told with their numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from raytune_ft.core.errors import DataError
from raytune_ft.core.records import Record
from raytune_ft.evaluation.config import ForgettingConfig
from raytune_ft.evaluation.forgetting import abilities, general_passages, general_questions, losses, named_first
from raytune_ft.evaluation.kept import Row
from raytune_ft.evaluation.scorer import choices_of


def test_the_shipped_questions_are_many_of_several_kinds_with_one_right_answer_of_four() -> None:
    questions = general_questions()
    assert len(questions) >= 60
    kinds = Counter(question.metadata["kind"] for question in questions)
    assert len(kinds) >= 8
    assert min(kinds.values()) >= 4
    assert len({question.id for question in questions}) == len(questions)
    for question in questions:
        choices = choices_of(question)
        assert len(choices) == len({choice.lower() for choice in choices}) == 4
        assert choices.count(question.answer or "") == 1
        assert named_first(question.answer or "", choices) == question.answer
    places = Counter(choices_of(question).index(question.answer or "") for question in questions)
    assert max(places.values()) < len(questions) / 2  # no place gives the answer away


def test_shipped_passages_are_text() -> None:
    passages = general_passages(None)
    assert len(passages) >= 12
    assert all(len((passage.text or "").split()) > 30 for passage in passages)


@pytest.mark.parametrize(
    ("answer", "choices", "named"),
    [
        ("The capital of France is Paris.", ["Paris", "Lyon"], "Paris"),
        ("It is not 43, it is 44", ["44", "43"], "43"),
        ("An insect has six legs.", ["4", "6"], "6"),
        ("twenty-nine days", ["28", "29"], "29"),
        ("It is 2,000 grams", ["2", "20"], None),
        ("3.5", ["3", "5"], None),
        ("The answer is 3.", ["3", "4"], "3"),
        ("A category", ["cat", "dog"], None),
        ("carbon dioxide", ["carbon", "carbon dioxide"], "carbon dioxide"),
        ("", ["a", "b"], None),
    ],
)
def test_the_choice_that_an_answer_names_first_is_its_answer(
    answer: str, choices: list[str], named: str | None
) -> None:
    assert named_first(answer, choices) == named


def rows(questions: list[Record], right: int, chosen: int, nll: float) -> dict[int, Row]:
    found: dict[int, Row] = {}
    for place, question in enumerate(questions):
        wrong = next(choice for choice in choices_of(question) if choice != question.answer)
        best = question.answer if place < chosen else wrong
        choices = [{"text": c, "nll": 1.0 if c == best else 2.0, "bytes": 1} for c in choices_of(question)]
        found[place] = {"answer": question.answer if place < right else wrong, "choices": choices}
    found[len(questions)] = {"nll": nll, "tokens": 10, "bytes": 20}
    return found


def test_losses_are_told_with_their_numbers() -> None:
    questions = general_questions()[:20]
    before = abilities(questions, rows(questions, 15, 18, 10.0), 1)
    assert (before["answered"], before["chosen"], before["passages"]) == (0.75, 0.9, 1)
    assert before["perplexity"] == pytest.approx(2.718281828)
    assert before["bits_per_byte"] == pytest.approx(0.5 / 0.6931471805)
    after = abilities(questions, rows(questions, 12, 17, 13.0), 1)
    told = losses(before, after, ForgettingConfig(), base="base", label="tuned")
    assert told == [
        "Forgetting: tuned answers of 60% of 20 general questions, base of 75% (3 lost, 0 gained); the threshold is a "
        "drop of 5%.",
        "Forgetting: the perplexity of tuned on 1 passages of general text is 3.67, that of base 2.72: +35%; the "
        "threshold is +10%.",
    ]
    assert losses(before, before, ForgettingConfig(), base="base", label="tuned") == []


def test_text_of_ones_own_is_cut_at_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    assert [passage.text for passage in general_passages(str(tmp_path / "a.txt"))] == ["one\ntwo", "three"]
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        general_passages(str(tmp_path / "b.txt"))
