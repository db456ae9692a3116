"""Rows of items with two answers each, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raytune_ft.models.chat import Encoded
from raytune_ft.training.bank.referenced import RatedAnswers, ReferencedRows, known_of


def row(tokens: int) -> Encoded:
    return Encoded(list(range(tokens)), [True] * tokens)


class Two:
    """Two items; the first was liked."""

    def __len__(self) -> int:
        return 2

    def both(self, number: int) -> tuple[Encoded, Encoded]:
        return row(10 * number + 1), row(10 * number + 2)

    def liked(self, numbers: Sequence[int]) -> np.ndarray:
        return np.array([number == 0 for number in numbers])


def test_the_rows_of_items_lie_side_by_side_and_are_looked_up_once() -> None:
    rows = ReferencedRows(Two())
    assert [len(rows[number].input_ids) for number in range(len(rows))] == [1, 2, 11, 12]
    assert rows.unknown([3, 1, 3]) == [3, 1]
    rows.learn([3, 1], [-4.0, -2.0])
    assert rows.unknown(range(4)) == [0, 2]
    assert known_of(rows, [1, 3]) == [(-2.0,), (-4.0,)]
    assert known_of([row(1)], [0]) == ()


def test_of_rated_answers_the_label_is_known_too() -> None:
    rows = RatedAnswers(Two())
    rows.learn(range(4), [-1.0, -2.0, -3.0, -4.0])
    assert rows.known([0, 1, 2, 3]) == [(-1.0, 1.0), (-2.0, 1.0), (-3.0, 0.0), (-4.0, 0.0)]
