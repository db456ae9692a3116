"""Metrics of choices by likelihood: is the likeliest one right, and is the model as sure as it is right?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, RowMetric, Values, counted, ratio

BINS = 10


class ChoiceMetric(RowMetric):
    """Base of metrics whose rows have choices, each with its nats and bytes, of which one is the reference."""

    def _info(self) -> Any:
        number, text = datasets.Value("float64"), datasets.Value("string")
        choice = {"text": text, "nll": number, "bytes": number}
        return self._described({"choices": datasets.List(choice), "references": text})

    def likeliest(self, rows: Mapping[str, Sequence[Any]]) -> tuple[NDArray[np.float64], ...]:
        """Per row: whether the likeliest choice is right, whether it is per byte, and the probability it has.

        Probabilities are among the choices: a softmax of their log-likelihoods.

        Raises:
            DataError: if a row has no choices, its reference is none of them, or a likelihood is not a number.
        """
        both = enumerate(zip(rows["choices"], rows["references"], strict=True), start=1)
        found = (self._likeliest_of(row, choices or (), reference) for row, (choices, reference) in both)
        return tuple(counted(["right", "per_byte", "confidence"], found).values())

    def _likeliest_of(self, row: int, choices: Sequence[Mapping[str, Any]], reference: str) -> tuple[float, ...]:
        texts = [choice["text"].strip() for choice in choices]
        if reference.strip() not in texts:
            raise DataError(
                f"{self.name_in_settings}: the reference of row {row}, {reference!r:.60}, is none of its choices "
                f"({', '.join(texts)[:100] or 'it has none'}). Give each row `choices`, its reference among them."
            )
        nll = np.array([choice["nll"] for choice in choices])
        if not np.isfinite(nll).all():
            raise DataError(f"{self.name_in_settings}: a choice of row {row} has no finite likelihood ({nll})")
        per_byte = nll / np.maximum([choice["bytes"] for choice in choices], 1)
        shares = np.exp(nll.min() - nll)
        right = texts.index(reference.strip())
        return float(nll.argmin() == right), float(per_byte.argmin() == right), float(shares.max() / shares.sum())


class ChoiceAccuracy(ChoiceMetric):
    """Share of rows whose likeliest choice is the reference; and the same by likelihood per byte, which longer choices
    do not lose by."""

    name_in_settings = EvaluationMetric.CHOICE_ACCURACY

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """1 where the likeliest choice is right, plainly and per byte."""
        right, per_byte, _ = self.likeliest(rows)
        return {"right": right, "per_byte": per_byte, "rows": np.ones(len(right))}

    def values(self, sums: Columns) -> Values:
        """`choice_accuracy` and `choice_accuracy_per_byte`."""
        return {
            "choice_accuracy": ratio(sums["right"], sums["rows"]),
            "choice_accuracy_per_byte": ratio(sums["per_byte"], sums["rows"]),
        }


class Calibration(ChoiceMetric):
    """Expected calibration error of the choices: rows in bins of equal width by the probability of the likeliest one,
    and how far that is, on average in each bin, from how often it is right."""

    name_in_settings = EvaluationMetric.CALIBRATION
    citation = "Guo et al. 2017, On Calibration of Modern Neural Networks"

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Per bin: rows, their confidence, and how many are right; and the squared error (Brier score)."""
        right, _, confidence = self.likeliest(rows)
        # Bins are open on the left, as scikit-learn's calibration_curve has them.
        edges = np.linspace(0.0, 1.0, BINS + 1)
        place = np.searchsorted(edges[1:-1], confidence)
        table = {"rows": np.ones(len(right)), "brier": (confidence - right) ** 2}
        for number in range(BINS):
            here = place == number
            table |= {
                f"rows.{number}": here.astype(float),
                f"confidence.{number}": np.where(here, confidence, 0.0),
                f"right.{number}": np.where(here, right, 0.0),
            }
        return table

    def values(self, sums: Columns) -> Values:
        """`ece`, the mean confidence, and the Brier score of "the likeliest is right"."""
        apart = sum(abs(sums[f"confidence.{n}"] - sums[f"right.{n}"]) for n in range(BINS))
        confidence = sum(sums[f"confidence.{n}"] for n in range(BINS))
        return {
            "ece": ratio(apart, sums["rows"]),
            "confidence": ratio(confidence, sums["rows"]),
            "brier": ratio(sums["brier"], sums["rows"]),
        }
