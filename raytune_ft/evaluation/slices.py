"""Slices: the same values on the rows of one kind, by a field of their metadata or by their length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.measurement import Metrics, columns_by_label, gained, in_words
from raytune_ft.evaluation.results import Answer, Comparison, ModelScores, Slice
from raytune_ft.evaluation.row_metric import Columns
from raytune_ft.evaluation.statistics import interval

FEWEST_ROWS = 12
"""Below, thirds by length would be of a handful of rows each."""
MOST_VALUES = 8
"""A field with more values is cut into thirds if they are numbers; other fields have too few rows of each value."""

_MISSING = "(missing)"


@dataclass(frozen=True)
class Group:
    """Which rows belong together."""

    by: str
    name: str
    places: NDArray[np.intp]


def groups(answers: Sequence[Answer], fields: Sequence[str] | None = None) -> list[Group]:
    """The rows by each metadata field, and by the characters of prompt and reference in thirds.

    Args:
        answers: of any of the models: prompt, reference and metadata are the same for all.
        fields: of the metadata; by default every field with 2 to 8 different values, and every number.

    Raises:
        DataError: if a field that was asked for cannot be sliced by.
    """
    found: list[Group] = []
    for name, values in slice_fields((answer.metadata for answer in answers), fields).items():
        found += _by_value(name, values)
    if len(answers) >= FEWEST_ROWS:
        sizes = [(len(answer.prompt), -1 if answer.reference is None else len(answer.reference)) for answer in answers]
        prompts, references = zip(*sizes, strict=True)
        found += _by_size("prompt characters", prompts)
        if min(references) >= 0:
            found += _by_size("reference characters", references)
    return found


def sliced(
    models: Sequence[ModelScores], metrics: Metrics, *, seed: int, fields: Sequence[str] | None = None
) -> tuple[Slice, ...]:
    """Values of every model on each group of rows, and each later model against the first.

    The slices of one metric and two models are one family of tests.

    Raises:
        DataError: if a field that was asked for cannot be sliced by.
    """
    columns = columns_by_label(models, metrics)
    parts = groups(models[0].answers, fields)
    found = [Slice(group.by, group.name, len(group.places), *_values(columns, metrics, group, seed)) for group in parts]
    by_slice: list[list[Comparison]] = [[] for _ in parts]
    first = models[0].label
    for label, (name, metric) in itertools.product(list(columns)[1:], metrics.items()):
        sides = [[_part(columns[side][name], group) for group in parts] for side in (label, first)]
        gains = [gained(name, metric, own, their, seed=seed) for own, their in zip(*sides, strict=True)]
        for comparisons, comparison in zip(by_slice, in_words([(name, label, first)] * len(parts), gains), strict=True):
            comparisons.append(comparison)
    return tuple(replace(part, comparisons=tuple(told)) for part, told in zip(found, by_slice, strict=True))


def _values(
    columns: Mapping[str, Mapping[EvaluationMetric, Columns]], metrics: Metrics, group: Group, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, tuple[float, float]]]]:
    values: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for label, by_metric in columns.items():
        values[label], intervals[label] = {}, {}
        for name, metric in metrics.items():
            part = _part(by_metric[name], group)
            values[label][str(name)] = float(metric.headline({key: np.asarray(np.sum(c)) for key, c in part.items()}))
            found = interval(metric.headline, part, seed=seed, best=name.facts.best)
            intervals[label][str(name)] = (found.low, found.high)
    return values, intervals


def _part(columns: Columns, group: Group) -> Columns:
    return {name: column[group.places] for name, column in columns.items()}


def slice_fields(rows: Iterable[Mapping[str, Any]], asked: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """The metadata fields to slice by, each with its value in every row (None where it is missing).

    Args:
        rows: the metadata of each row.
        asked: which fields; by default all that can be sliced by.

    Raises:
        DataError: if a field that was asked for is not there, or cannot be sliced by.
    """
    columns: dict[str, _Values] = {}
    count = 0
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, _Values()).add(value, count)
        count += 1
    for name in asked or ():
        if name not in columns:
            raise DataError(f"slice_by: no row has a metadata field {name!r} (fields: {', '.join(columns) or 'none'})")
    found = {name: columns[name].all(count) for name in (columns if asked is None else asked)}
    kept = {name: values for name, values in found.items() if values is not None}
    refused = [name for name in asked or () if name not in kept]
    if refused:
        raise DataError(
            f"slice_by: {refused[0]!r} cannot be sliced by: it takes 2 to {MOST_VALUES} different values, or numbers"
        )
    return kept


class _Values:
    """The values of a field for as long as it may be sliced by: few different ones, or numbers."""

    def __init__(self) -> None:
        self._values: list[Any] | None = []
        self._known: dict[Any, Any] = {}
        self._texts: set[str] = set()
        self._numbers = True

    def add(self, value: Any, place: int) -> None:
        """Takes the value of the row at a place; rows before it that gave none have none."""
        while self._values is not None and len(self._values) < place:
            self._take(None)
        self._take(value)

    def all(self, count: int) -> list[Any] | None:
        """One value for each of so many rows; None if the field cannot be sliced by."""
        while self._values is not None and len(self._values) < count:
            self._take(None)
        return self._values if len(self._texts) > 1 else None

    def _take(self, value: Any) -> None:
        if self._values is None:
            return
        if isinstance(value, dict | list):
            self._values = None
            return
        self._numbers = self._numbers and isinstance(value, int | float) and not isinstance(value, bool)
        if len(self._texts) <= MOST_VALUES:
            self._texts.add(_shown(value))
            value = self._known.setdefault((type(value), value), value)  # one text, however many rows have it
        if self._numbers or len(self._texts) <= MOST_VALUES:
            self._values.append(value)
        else:
            self._values = None


def _by_value(name: str, values: Sequence[Any]) -> Iterator[Group]:
    shown = [_shown(value) for value in values]
    different = sorted(set(shown), key=lambda text: (text == _MISSING, text))
    if len(different) > MOST_VALUES:
        yield from _by_size(name, values)
        return
    for text in different:
        yield Group(name, text, np.flatnonzero([other == text for other in shown]))


def _by_size(name: str, sizes: Sequence[float]) -> Iterator[Group]:
    """Thirds of the rows, as nearly as rows of the same size allow; nothing where all are alike."""
    numbers = np.asarray(sizes)
    low, high = np.quantile(numbers, [1 / 3, 2 / 3], method="inverted_cdf")
    ranges = {
        f"up to {_number(low)}": numbers <= low,
        f"above {_number(low)} to {_number(high)}": (numbers > low) & (numbers <= high),
        f"above {_number(high)}": numbers > high,
    }
    filled = {label: np.flatnonzero(marks) for label, marks in ranges.items() if marks.any()}
    if len(filled) > 1:
        for label, places in filled.items():
            yield Group(name, label, places)


def _shown(value: Any) -> str:
    return _MISSING if value is None or value == "" else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"
