"""Labels in answers: a short answer, a field of a JSON answer or a given label, where it has few values.

They are what balance, suspect labels and quirks are told from; data without any has no such findings.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.core.records import Record
from raytune_ft.data.json_text import loads

ANSWER = "answer"
MOST_CHARACTERS = 48
"""Longer answers and values are no labels."""
MOST_FIELDS = 32
MOST_VALUES = 40
LEAST_OF_A_VALUE = 5
"""Rows that a value must have for something to be learnt of it."""
_LEAST_ROWS = 40
_LEAST_COVERED = 0.9


def label_values(record: Record) -> dict[str, str]:
    """What could be labels of a record: target (``answer``, ``answer.FIELD``, ``label``) -> value."""
    found = {} if record.label is None else {"label": json.dumps(record.label)}
    answer = record.answer
    if answer is None or record.chosen:
        return found
    fields = json_fields(answer)
    if fields is None:
        return {**found, ANSWER: answer} if answer and len(answer) <= MOST_CHARACTERS and "\n" not in answer else found
    for name, value in list(fields.items())[:MOST_FIELDS]:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not isinstance(value, dict | list) and len(text) <= MOST_CHARACTERS:
            found[f"{ANSWER}.{name}"] = text
    return found


def json_fields(text: str) -> dict[str, Any] | None:
    """The fields of a text that is a JSON object; None if it is none."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def targets(labels: Sequence[Mapping[str, str]]) -> dict[str, list[int]]:
    """The targets that are labels in these rows, each with the places of the rows to learn from.

    A target is one where two to 40 values have five rows or more each, and these are nine tenths of all rows that have
    the target; rows with rarer values are left out.
    """
    found = {}
    for name in sorted({name for row in labels for name in row}):
        places = [place for place, row in enumerate(labels) if name in row]
        counts = Counter(labels[place][name] for place in places)
        frequent = {value for value, count in counts.items() if count >= LEAST_OF_A_VALUE}
        kept = [place for place in places if labels[place][name] in frequent]
        if 2 <= len(frequent) <= MOST_VALUES and len(kept) >= max(_LEAST_ROWS, _LEAST_COVERED * len(places)):
            found[name] = kept
    return found
