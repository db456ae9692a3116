"""What a metric is here: an `evaluate.Metric` that can be resampled.

A metric turns rows into columns of counts that add up over rows, and sums of columns into values. So a bootstrap
resamples sums instead of rows, and a corpus metric (BLEU, perplexity, field F1) is resampled as what it is.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.metric_names import EvaluationMetric

Columns = Mapping[str, NDArray[np.float64]]
"""Per name one number a row, or, summed over rows, one number a sample."""

Values = dict[str, NDArray[np.float64]]


class RowMetric(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped
    """Base of our metrics; `compute(predictions=..., references=...)` as in any `evaluate.Metric`."""

    name_in_settings: ClassVar[EvaluationMetric]
    citation: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> Any:
        text = datasets.Value("string")
        return self._described({"predictions": text, "references": text})

    def _described(self, features: dict[str, Any]) -> Any:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.citation,
            inputs_description=f"Columns: {', '.join(features)}.",
            features=datasets.Features(features),
        )

    def _compute(self, **rows: Sequence[Any]) -> dict[str, float]:
        if not len(next(iter(rows.values()))):
            raise DataError(f"{self.name_in_settings}: there are no rows to measure")
        if "references" in rows:
            self.check(rows["references"])
        return self.summary(self.columns(**rows))

    def summary(self, columns: Columns) -> dict[str, float]:
        """Every value of this metric over all rows."""
        sums = {name: np.asarray(np.sum(column)) for name, column in columns.items()}
        return {name: float(value) for name, value in self.values(sums).items()}

    def check(self, references: Iterable[str]) -> None:
        """Raises DataError, with the reason, if this metric does not fit the references, one by one or all together."""
        self.check_each(references)

    def check_each(self, references: Iterable[str]) -> None:
        """Raises DataError, with the reason, if this metric does not fit one of the references."""
        for row, reference in enumerate(references):
            reason = self.misfit(reference)
            if reason is not None:
                raise DataError(
                    f"{self.name_in_settings}: does not fit this data: {reason}, but the reference of row {row + 1} is "
                    f"{_short(reference)}. Leave this metric out, or evaluate on other data."
                )

    def misfit(self, reference: str) -> str | None:
        """What the metric needs and `reference` does not give; None if it fits."""
        return None

    @abstractmethod
    def columns(self, **rows: Sequence[Any]) -> Columns:
        """One number a row under each name; all of them add up over rows."""

    @abstractmethod
    def values(self, sums: Columns) -> Values:
        """Values from summed columns; elementwise, so that many samples are computed at once."""

    def headline(self, sums: Columns) -> NDArray[np.float64]:
        """The one value that stands for this metric."""
        return self.values(sums)[self.name_in_settings.facts.headline]

    def row_scores(self, columns: Columns) -> NDArray[np.float64]:
        """The headline of each row taken alone."""
        return self.headline(columns)


class MeanMetric(RowMetric):
    """A metric whose values are means of per-row scores."""

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """The scores of each row, and `rows` (1 each)."""
        scored = (self.score(a, r) for a, r in zip(rows["predictions"], rows["references"], strict=True))
        first = next(scored)
        table = counted(list(first), ([row[name] for name in first] for row in itertools.chain([first], scored)))
        return {**table, "rows": np.ones(len(rows["predictions"]))}

    def values(self, sums: Columns) -> Values:
        """The mean of each score."""
        return {name: ratio(total, sums["rows"]) for name, total in sums.items() if name != "rows"}

    @abstractmethod
    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The scores of one row."""


def counted(names: Sequence[str], rows: Iterable[Iterable[float]]) -> dict[str, NDArray[np.float64]]:
    """Columns by name from rows of as many numbers, which are taken one by one."""
    numbers = np.fromiter(itertools.chain.from_iterable(rows), float)
    return dict(zip(names, np.ascontiguousarray(numbers.reshape(-1, len(names)).T), strict=True))


def ratio(above: Any, below: Any) -> NDArray[np.float64]:
    """`above / below`, 0 where there is nothing to divide by."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    quotient: NDArray[np.float64] = np.zeros(np.broadcast(above, below).shape)
    np.divide(above, below, out=quotient, where=below > 0)
    return quotient


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
