"""Precision, recall and F1 of labels and of sets of items, as scikit-learn gives them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from raytune_ft.core.errors import DataError
from raytune_ft.evaluation.answers import listed
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, RowMetric, Values, counted, ratio

_MOST_LABELS = 50


class LabelF1(RowMetric):
    """Precision, recall and F1 of each label of the references: their means over labels (macro) and over rows (micro).

    An answer that is no label of the references is a miss of its row's label, and nothing else. On some of the rows
    (a slice, a bootstrap sample) the labels are those that these rows' references have.
    """

    name_in_settings = EvaluationMetric.LABEL_F1

    def check(self, references: Iterable[str]) -> None:
        """Refuses references that are hardly labels: more than 50 different ones, most of them once."""
        times = Counter(
            xxhash.xxh64_intdigest(reference.strip().encode("utf-8", "surrogatepass")) for reference in references
        )
        if len(times) > _MOST_LABELS and 2 * len(times) > times.total():
            raise DataError(
                f"{self.name_in_settings}: does not fit this data: it counts labels, but {len(times)} of "
                f"{times.total()} references differ. Leave this metric out, or evaluate on other data."
            )

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Per label: rows that have it, answers that say it, and both."""
        labels = {label: number for number, label in enumerate(sorted({text.strip() for text in rows["references"]}))}
        both = zip(rows["predictions"], rows["references"], strict=True)
        pairs = counted(["given", "wanted"], ([labels.get(text.strip(), -1) for text in row] for row in both))
        table: dict[str, NDArray[np.bool_]] = {}
        for label, number in labels.items():
            says, has = pairs["given"] == number, pairs["wanted"] == number
            table |= {f"given.{label}": says, f"wanted.{label}": has, f"right.{label}": says & has}
        return {name: column.astype(float) for name, column in table.items()}

    def values(self, sums: Columns) -> Values:
        """Macro and micro precision, recall and F1, and the F1 of each label."""
        labels = [name.removeprefix("wanted.") for name in sums if name.startswith("wanted.")]
        given, wanted, right = (
            np.stack([sums[f"{kind}.{label}"] for label in labels]) for kind in ("given", "wanted", "right")
        )
        each, there = ratio(2 * right, given + wanted), wanted > 0

        def macro(found: NDArray[np.float64]) -> NDArray[np.float64]:
            return ratio(np.where(there, found, 0.0).sum(0), there.sum(0))

        found = {
            "label_f1_macro": macro(each),
            "label_precision_macro": macro(ratio(right, given)),
            "label_recall_macro": macro(ratio(right, wanted)),
            "label_f1_micro": ratio(2 * right.sum(0), (given + wanted).sum(0)),
            "label_precision_micro": ratio(right.sum(0), given.sum(0)),
            "label_recall_micro": ratio(right.sum(0), wanted.sum(0)),
        }
        return found | {f"label_f1.{label}": each[place] for place, label in enumerate(labels)}

    def row_scores(self, columns: Columns) -> Any:
        """1 where the row's label is said."""
        return np.sum([column for name, column in columns.items() if name.startswith("right.")], axis=0)


class SetF1(RowMetric):
    """Precision, recall and F1 of the items that answer and reference list, over all items (micro), and the mean F1 of
    rows.

    Items are those of a JSON array, else lines, or what commas part; their case, order and repetition do not count.
    Where neither lists any (``[]``), the answer is right, with 1; where one does, it is wrong, with 0 (as SQuAD 2.0 has
    it).
    """

    name_in_settings = EvaluationMetric.SET_F1

    def check(self, references: Iterable[str]) -> None:
        """Refuses references of which none lists anything."""
        if not any(listed(reference) for reference in references):
            raise DataError(
                f"{self.name_in_settings}: does not fit this data: it compares the items of lists, and every reference "
                "is an empty one. Leave this metric out, or evaluate on other data."
            )

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Items shared, given and wanted, and the row's own F1."""
        both = ((set(listed(a)), set(listed(r))) for a, r in zip(rows["predictions"], rows["references"], strict=True))
        table = counted(["shared", "given", "wanted"], ((len(g & w), len(g), len(w)) for g, w in both))
        own = _share(2 * table["shared"], table["given"] + table["wanted"], table)
        return {**table, "own": own, "rows": np.ones(len(own))}

    def values(self, sums: Columns) -> Values:
        """`set_f1`, `set_precision`, `set_recall` over all items, and `set_f1_rows`, the mean of rows."""
        return {
            "set_f1": _share(2 * sums["shared"], sums["given"] + sums["wanted"], sums),
            "set_precision": _share(sums["shared"], sums["given"], sums),
            "set_recall": _share(sums["shared"], sums["wanted"], sums),
            "set_f1_rows": ratio(sums["own"], sums["rows"]),
        }


def _share(above: Any, below: Any, items: Columns) -> NDArray[np.float64]:
    """`above / below`, but 1 where nothing is wanted and nothing given."""
    return np.where((items["given"] == 0) & (items["wanted"] == 0), 1.0, ratio(above, below))
