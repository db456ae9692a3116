"""From answers to values, intervals and comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from raytune_ft.evaluation.compare import difference, interval, sentence
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import Comparison, ModelScores
from raytune_ft.evaluation.row_metric import Columns, RowMetric

Metrics = Mapping[EvaluationMetric, RowMetric]

_FIELDS = {"predictions": "answer", "references": "reference", "nll": "nll", "tokens": "tokens"}
"""Which field of an `Answer` a metric means by the name of its input."""


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
        found = interval(metric.headline, columns, seed=seed)
        intervals[str(name)] = (found.low, found.high)
        alone[str(name)] = metric.row_scores(columns)
    answers = tuple(
        replace(answer, scores={name: float(scores[place]) for name, scores in alone.items()})
        for place, answer in enumerate(model.answers)
    )
    return replace(model, values=values, intervals=intervals, answers=answers)


def compared(models: Sequence[ModelScores], metrics: Metrics, *, seed: int) -> tuple[Comparison, ...]:
    """Each model against each that comes before it, on every metric; their rows are the same, in the same order."""
    found = []
    for other, model in itertools.combinations(models, 2):
        for name, metric in metrics.items():
            own, their = columns_of(model, metric), columns_of(other, metric)
            gain = difference(
                metric.headline,
                own,
                their,
                scores=(metric.row_scores(own), metric.row_scores(their)),
                lower_is_better=name.facts.lower_is_better,
                seed=seed,
            )
            words = sentence(gain, model=model.label, other=other.label, metric=name.facts.title)
            found.append(Comparison(metric=name, model=model.label, other=other.label, words=words, **asdict(gain)))
    return tuple(found)


def columns_of(model: ModelScores, metric: RowMetric) -> Columns:
    """The metric's counts, one a row of the model's answers."""
    names = [str(name) for name in metric.features]
    return metric.columns(**{name: [getattr(answer, _FIELDS[name]) for answer in model.answers] for name in names})
