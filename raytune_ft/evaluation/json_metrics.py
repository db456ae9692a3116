"""Scores of answers that are JSON: its fields, and whether it parses."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.answers import fields, parse_json
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, counted, ratio

MOST_FIELDS = 100
"""Fields of JSON objects that are looked at one by one: a column a row takes memory, and a line of the report."""


class FieldF1(RowMetric):
    """Precision, recall and F1 over the key-value pairs of JSON objects (micro), and the accuracy of each field.

    A pair counts when key and value are equal. An answer that is not a JSON object has no pairs. Where the reference is
    ``{}``, the same is right, with 1, and any other answer wrong, with 0; pairs are then too many. The accuracy of a
    field is taken over the rows whose reference has it. Of more than 100 fields only the 100 that most references have
    stand for themselves, and for the macro F1; the others are counted as ``field_others``.
    """

    name_in_settings = EvaluationMetric.FIELD_F1

    def misfit(self, reference: str) -> str | None:
        """A reference is an object."""
        return None if isinstance(parse_json(reference), dict) else "it compares the fields of JSON objects"

    def check(self, references: Iterable[str]) -> None:
        """Refuses references of which one is no object, or none has fields."""
        has_fields = False

        def seen() -> Iterator[str]:
            nonlocal has_fields
            for reference in references:
                has_fields = has_fields or bool(fields(reference))
                yield reference

        super().check(seen())
        if not has_fields:
            raise DataError(
                f"{self.name_in_settings}: does not fit this data: it compares the fields of JSON objects, and every "
                "reference is an empty one. Leave this metric out, or evaluate on other data."
            )

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Pairs shared, given and wanted, and whether both are ``{}``; per field the rows that have it, or right."""
        times = Counter(name for reference in rows["references"] for name in fields(reference))
        most = {name for name, _ in times.most_common(MOST_FIELDS)}
        kinds = ("present", "said", "right")
        places = {name: {kind: array("q") for kind in kinds} for name in times if name in most}

        def counts() -> Iterator[tuple[int, int, int, bool]]:
            for place, (answer, reference) in enumerate(zip(rows["predictions"], rows["references"], strict=True)):
                given, wanted = fields(answer), fields(reference)
                shared = given.items() & wanted.items()
                for kind, names in zip(kinds, (wanted, given, dict(shared)), strict=True):
                    for name in most.intersection(names):
                        places[name][kind].append(place)
                yield len(shared), len(given), len(wanted), not wanted and parse_json(answer) == {}

        table = counted(["shared", "given", "wanted", "nothing"], counts())
        for name, found in places.items():
            for kind in kinds:
                table[f"{kind}.{name}"] = np.zeros(len(table["shared"]))
                table[f"{kind}.{name}"][found[kind]] = 1
        if len(times) > len(most):
            table["others"] = np.zeros(len(table["shared"]))
            table["others"][0] = len(times) - len(most)  # a number of all rows: only their sum means something
        return table

    def values(self, sums: Columns) -> Values:
        """`field_f1`, `field_precision`, `field_recall`, the mean F1 of fields (macro), and each field's accuracy."""
        found: Values = {
            "field_f1": _of_pairs(2 * sums["shared"], sums["given"] + sums["wanted"], sums),
            "field_precision": _of_pairs(sums["shared"], sums["given"], sums),
            "field_recall": _of_pairs(sums["shared"], sums["wanted"], sums),
        }
        names = [key.removeprefix("present.") for key in sums if key.startswith("present.")]
        each = [ratio(2 * sums[f"right.{n}"], sums[f"present.{n}"] + sums[f"said.{n}"]) for n in names]
        found["field_f1_macro"] = np.mean(each, axis=0) if each else found["field_f1"]
        if "others" in sums:
            found["field_others"] = sums["others"]
        for name in names:
            found[f"field_accuracy.{name}"] = ratio(sums[f"right.{name}"], sums[f"present.{name}"])
        return found


def _of_pairs(above: Any, below: Any, sums: Columns) -> NDArray[np.float64]:
    """`above / below`, but 1 where no pairs are wanted, none given, and an object without any said."""
    without = (sums["given"] == 0) & (sums["wanted"] == 0) & (sums["nothing"] > 0)
    return np.where(without, 1.0, ratio(above, below))


class ValidJson(MeanMetric):
    """Share of answers that parse as a JSON object or array, whole and strict (no text around it, no NaN)."""

    name_in_settings = EvaluationMetric.VALID_JSON

    def misfit(self, reference: str) -> str | None:
        """Where a reference is no JSON, an answer need not be."""
        return None if parse_json(reference) is not None else "it asks for JSON objects or arrays"

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """1 where the answer parses."""
        return {"valid_json": float(parse_json(prediction) is not None)}
