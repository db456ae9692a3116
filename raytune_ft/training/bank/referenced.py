"""Rows whose loss holds a model against the base: one by one, with what the base says of them, looked up once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from raytune_ft.models.chat import Encoded
from raytune_ft.training.batches import Rows


class Items(Protocol):
    """Items of two rows each, read one at a time (`PairRows`, `RatedRows`)."""

    def __len__(self) -> int: ...

    def both(self, number: int, /) -> tuple[Encoded, Encoded]:
        """The rows of an item."""


class Rated(Items, Protocol):
    """Items whose first row people liked or disliked (`RatedRows`)."""

    def liked(self, numbers: Sequence[int], /) -> NDArray[np.bool_]:
        """[numbers] which of these were liked."""


class ReferencedRows:
    """The rows of items: 2i and 2i + 1 are those of item i."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self._last: tuple[int, tuple[Encoded, Encoded]] | None = None
        self._said = np.full(2 * len(items), np.nan, np.float32)

    def __len__(self) -> int:
        return 2 * len(self._items)

    def __getitem__(self, number: int) -> Encoded:
        last, (item, place) = self._last, divmod(number, 2)
        if last is None or last[0] != item:
            last = self._last = item, self._items.both(item)
        return last[1][place]

    def unknown(self, numbers: Iterable[int]) -> list[int]:
        """Those of these rows of which is not known what the base says, each once."""
        return [number for number in dict.fromkeys(numbers) if np.isnan(self._said[number])]

    def learn(self, numbers: Sequence[int], said: Sequence[float]) -> None:
        """Takes note of log-probabilities of rows under the base, in nats."""
        self._said[list(numbers)] = said

    def known(self, numbers: Sequence[int]) -> list[tuple[float, ...]]:
        """Of each of these rows its log-probability under the base, in nats."""
        return [(float(nats),) for nats in self._said[list(numbers)]]


class RatedAnswers(ReferencedRows):
    """The rows of rated answers: 2i is answer i, 2i + 1 its prompt with the answer of another one."""

    def __init__(self, items: Rated) -> None:
        super().__init__(items)
        self._liked = items.liked(range(len(items)))

    def known(self, numbers: Sequence[int]) -> list[tuple[float, ...]]:
        """Of each of these rows its log-probability under the base, in nats, and 1 if its answer was liked, else 0."""
        return [(*nats, float(self._liked[n // 2])) for n, nats in zip(numbers, super().known(numbers), strict=True)]


def known_of(rows: Rows, numbers: Sequence[int]) -> Sequence[Sequence[float]]:
    """What the loss wants to know of these rows besides; nothing of examples."""
    return rows.known(numbers) if isinstance(rows, ReferencedRows) else ()
