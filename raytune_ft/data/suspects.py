"""Rows whose label looks wrong: flagged in their metadata, never dropped, and exported for a person to correct."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raytune_ft.core.records import RECORD_SCHEMA, Record, table_to_records
from raytune_ft.data.labels import targets
from raytune_ft.data.sketches import Histogram

SUSPECTS_FILE = "suspects.jsonl"
CONFIRMED = "label_confirmed"
"""Metadata of a row that a person left as it is: it is not suspected again."""
_FOLDS = 5
_LEAST_SKILL = 0.5
_WORD = re.compile(r"(?u)\b\w+\b")
_NORMAL = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


class LossBins(TypedDict):
    """Arguments of `Histogram`."""

    width: float
    bins: int


LOSS_BINS = LossBins(width=0.01, bins=2000)
"""Hundredths of a nat up to 20."""


@dataclass(frozen=True)
class Suspect:
    """A row whose label looks wrong: why, and how sure that is (higher: surer)."""

    id: str
    why: str
    score: float


def unlikely_labels(
    texts: Sequence[str], labels: Sequence[Mapping[str, str]], ids: Sequence[str], *, below: float, seed: int
) -> tuple[list[Suspect], int]:
    """Rows whose label a classifier expects to be another, and how many rows were judged.

    Out-of-fold probabilities of a logistic regression on TF-IDF of words and word pairs. A label is suspect where its
    own probability is less than `below` and another value's is high: 1 - `below`, or the mean probability that this
    value has on the rows that bear it, where that is less (confident learning; Northcutt, Jiang and Chuang, 2021).
    A target of which the classifier learns too little is not judged: it must close half of the gap between always
    saying the commonest value and being always right.

    Args:
        texts: what is asked in each row.
        labels: of `label_values`.
        ids: of the rows.
        below: highest probability of a suspect label.
        seed: of the folds.
    """
    suspects, judged = [], set[int]()
    for name, places in targets(labels).items():
        values = np.array([labels[place][name] for place in places])
        classes, own = np.unique(values, return_inverse=True)
        chance = _out_of_fold([texts[place] for place in places], own, seed)
        usual = np.array([chance[own == number, number].mean() for number in range(len(classes))])
        given = chance[np.arange(len(own)), own]
        rival = np.where(
            (chance >= np.minimum(usual, 1 - below)) & (np.arange(len(classes)) != own[:, None]), chance, -1.0
        )
        other = rival.argmax(1)
        most = np.bincount(own).max() / len(own)
        if ((chance.argmax(1) == own).mean() - most) < _LEAST_SKILL * (1 - most):
            continue
        judged |= set(places)
        for at in np.flatnonzero((rival.max(1) > given) & (given < below)).tolist():
            surer = float(rival[at].max())
            is_said = f"{name} is {str(values[at])!r} (probability {given[at]:.2f})"
            why = f"{is_said}, expected {str(classes[other[at]])!r} ({surer:.2f})"
            suspects.append(Suspect(ids[places[at]], why, surer - float(given[at])))
    return suspects, len(judged)


def _out_of_fold(texts: list[str], own: Any, seed: int) -> Any:
    """[rows, classes] probabilities of each row by a classifier that was not trained on it."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=20_000, token_pattern=_WORD.pattern),
        LogisticRegression(C=10.0, max_iter=200),
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=seed)
    given = [text if _WORD.search(text) else "_" for text in texts]  # a fold without a word has no vocabulary
    return cross_val_predict(classifier, given, own, cv=folds, method="predict_proba")


def loss_histogram(losses: Any) -> Histogram:
    """Losses per token counted in hundredths of a nat."""
    histogram = Histogram(**LOSS_BINS)
    values = np.asarray(losses, np.float64)
    histogram.add(values[np.isfinite(values)])
    return histogram


def loss_limit(histogram: Histogram, z: float) -> float:
    """The loss that lies `z` robust standard deviations (1.4826 times the MAD) above the median."""
    # A bin is the finest that can be told; without it, rows of one loss would make all others suspect.
    return histogram.median() + z * _NORMAL * max(histogram.deviation(), histogram.width)


def costly_answers(ids: Sequence[str], losses: Sequence[float | None], histogram: Histogram, z: float) -> list[Suspect]:
    """Rows whose answer a model finds far less likely than the data's others; rows without a loss are not judged."""
    limit, median = loss_limit(histogram, z), histogram.median()
    spread = _NORMAL * max(histogram.deviation(), histogram.width)
    return [
        Suspect(row_id, f"loss {loss:.2f} nats per token, the median is {median:.2f}", (loss - median) / spread)
        for row_id, loss in zip(ids, losses, strict=True)
        if loss is not None and loss > limit
    ]


def worst(found: Iterable[Suspect], most: int) -> dict[str, list[Suspect]]:
    """At most `most` rows, the surest first, each with all that speaks against its label.

    Scores of both kinds are compared by their order within the kind, since their units differ.
    """
    kinds: dict[bool, list[Suspect]] = {False: [], True: []}
    for suspect in found:
        kinds[suspect.why.startswith("loss ")].append(suspect)
    ranked = [
        (place, suspect)
        for kind in kinds.values()
        for place, suspect in enumerate(sorted(kind, key=lambda s: (-s.score, s.id, s.why)))
    ]
    rows: dict[str, list[Suspect]] = {}
    for _, suspect in sorted(ranked, key=lambda item: (item[0], item[1].id, item[1].why)):
        if suspect.id in rows or len(rows) < most:
            rows.setdefault(suspect.id, []).append(suspect)
    return rows


def flag_rows(rows: pa.Table, why: Mapping[str, str]) -> pa.Table:
    """The rows with ``suspect_label`` in the metadata of those whose id has a `why`; their ids stay as they are."""
    ids, metadata = rows.column("id").to_pylist(), rows.column("metadata").to_pylist()
    if not any(row_id in why for row_id in ids):
        return rows
    written = [
        json.dumps({**json.loads(text or "{}"), "suspect_label": why[row_id]}, ensure_ascii=False, sort_keys=True)
        if row_id in why
        else text
        for row_id, text in zip(ids, metadata, strict=True)
    ]
    return rows.set_column(rows.schema.get_field_index("metadata"), "metadata", pa.array(written, pa.string()))


def to_correct(rows: pa.Table, why: Mapping[str, str]) -> pa.Table:
    """For each suspect row of the table one line of ``suspects.jsonl``, in column `line`, with its `id`."""
    found = rows.filter(pc.is_in(rows.column("id"), pa.array(list(why), pa.string())))
    records = table_to_records(found.select(RECORD_SCHEMA.names))
    lines = [json.dumps(_line(record, why[record.id]), ensure_ascii=False) for record in records]
    ids = [record.id for record in records]
    return pa.table({"id": pa.array(ids, pa.string()), "line": pa.array(lines, pa.string())})


def _line(record: Record, why: str) -> dict[str, Any]:
    asked = [asdict(message) for message in record.prompt]
    prompt: Any = asked[0]["content"] if len(asked) == 1 else asked
    return {"id": record.id, "prompt": prompt, "answer": record.answer, "why": why, "corrected": ""}


def without_confirmed(records: Sequence[Record]) -> list[Record]:
    """The records whose label nobody has confirmed yet."""
    return [record for record in records if not record.metadata.get(CONFIRMED)]


def confirmed(record: Record) -> Record:
    """The record as one whose label a person has looked at."""
    return replace(record, metadata={**record.metadata, CONFIRMED: True})
