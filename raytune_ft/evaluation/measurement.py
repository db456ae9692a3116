"""From answers to values, intervals and comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, overload

from raytune_ft.evaluation.compare import Difference, difference, judged, sentence
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import Answer, Comparison, ModelScores, on_disk
from raytune_ft.evaluation.row_metric import Columns, RowMetric
from raytune_ft.evaluation.statistics import interval

Metrics = Mapping[EvaluationMetric, RowMetric]

_FIELDS = {"predictions": "answer", "references": "reference", "rewards": "reward"}
"""Which field of an `Answer` a metric means by the name of its input, where they differ."""


def measured(model: ModelScores, metrics: Metrics, *, seed: int) -> ModelScores:
    """The model with its values, their intervals, and each row's own scores.

    Raises:
        DataError: if a metric does not fit the references, or a likelihood is not a number.
    """
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    alone = {}
    for name, metric in metrics.items():
        columns = columns_of(model, metric)
        values |= metric.summary(columns)
        found = interval(metric.headline, columns, seed=seed, best=name.facts.best)
        intervals[str(name)] = (found.low, found.high)
        alone[str(name)] = metric.row_scores(columns)
    answers = on_disk(
        replace(answer, scores={name: float(scores[place]) for name, scores in alone.items()})
        for place, answer in enumerate(model.answers)
    )
    return replace(model, values=values, intervals=intervals, answers=answers)


def compared(models: Sequence[ModelScores], metrics: Metrics, *, seed: int) -> tuple[Comparison, ...]:
    """Each model against each that comes before it, on every metric; their rows are the same, in the same order.

    All of these comparisons are one family of tests.
    """
    keys, found = [], []
    columns = columns_by_label(models, metrics)
    for (other, their), (model, own) in itertools.combinations(columns.items(), 2):
        for name, metric in metrics.items():
            keys.append((name, model, other))
            found.append(gained(name, metric, own[name], their[name], seed=seed))
    return in_words(keys, found)


def columns_by_label(models: Sequence[ModelScores], metrics: Metrics) -> dict[str, dict[EvaluationMetric, Columns]]:
    """The counts of each model by each metric: answers are read from disk for each of these."""
    return {model.label: {name: columns_of(model, metric) for name, metric in metrics.items()} for model in models}


def gained(name: EvaluationMetric, metric: RowMetric, own: Columns, their: Columns, *, seed: int) -> Difference:
    """What the model of the first columns gains over that of the second, on one metric."""
    return difference(
        metric.headline,
        own,
        their,
        scores=(metric.row_scores(own), metric.row_scores(their)),
        lower_is_better=name.facts.lower_is_better,
        seed=seed,
        best=name.facts.best,
    )


def in_words(keys: Sequence[tuple[EvaluationMetric, str, str]], found: Sequence[Difference]) -> tuple[Comparison, ...]:
    """Differences that are one family of tests, judged and put into words; each key is metric, model and other."""
    family = []
    for (name, model, other), gain in zip(keys, judged(found), strict=True):
        words = sentence(gain, model=model, other=other, metric=name.facts.title)
        family.append(Comparison(metric=name, model=model, other=other, words=words, **asdict(gain)))
    return tuple(family)


def columns_of(model: ModelScores, metric: RowMetric) -> Columns:
    """The metric's counts, one a row of the model's answers.

    Raises:
        DataError: if the metric does not fit the answers, or a likelihood is not a number.
    """
    rows = _Rows(model.answers)
    return metric.columns(**{str(name): _Field(rows, _FIELDS.get(str(name), str(name))) for name in metric.features})


class _Rows:
    """Answers that are read one by one; the last one is at hand, since a metric asks for several of its fields."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self._last: tuple[int, Answer] | None = None

    def at(self, place: int) -> Answer:
        """The answer at a place."""
        if self._last is None or self._last[0] != place:
            self._last = (place, self.answers[place])
        return self._last[1]


class _Field(Sequence[Any]):
    """One field of all rows, as a metric takes its input."""

    def __init__(self, rows: _Rows, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows.answers)

    @overload
    def __getitem__(self, place: int) -> Any: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...

    def __getitem__(self, place: int | slice) -> Any:
        places = range(len(self))[place]
        if isinstance(places, range):
            return [self[number] for number in places]
        return getattr(self._rows.at(places), self._name)
