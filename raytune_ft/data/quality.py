"""What a dataset is like in numbers of bounded size: statistics of parts that add up to those of the whole."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from raytune_ft.core.digest import short_hash
from raytune_ft.core.records import RECORD_SCHEMA, Record, table_to_records
from raytune_ft.data.json_text import is_json
from raytune_ft.data.labels import json_fields, label_values
from raytune_ft.data.shingles import ngram_hashes, row_texts
from raytune_ft.data.sketches import DistinctCount, ValueCount

MOST_TARGETS = 32
LENGTH_STEP = 0.5
"""Width of a bin of lengths, in doublings."""
_LENGTH_BINS = 48
_KEYS_SHOWN = 8
_FEW_WORDS = 5
_SLICE = 2048
_ENDINGS = {".": "a full stop", "!": "an exclamation mark", "?": "a question mark", ":": "a colon", "}": "a bracket"}
_ENDINGS |= {"]": "a bracket", ")": "a bracket", "`": "code", '"': "a quotation mark"}


class Statistics:
    """Counts over usable rows: what `quality.json` says of balance, consistency and diversity comes from these."""

    def __init__(self) -> None:
        self.splits: Counter[str] = Counter()
        self.repeated = 0
        self.values = {name: ValueCount() for name in ("format", "source", "shape", "ending", "casing")}
        self.labels: dict[str, ValueCount] = {}
        self.lengths = {name: np.zeros(_LENGTH_BINS, np.int64) for name in ("prompt", "answer")}
        self.ngrams = {size: DistinctCount() for size in (1, 2)}
        self.ngrams_total = {1: 0, 2: 0}

    @property
    def rows(self) -> int:
        """Rows counted."""
        return self.splits.total()

    @classmethod
    def of(cls, rows: pa.Table) -> Statistics:
        """The statistics of a table with the columns of records and `folder`; all rows of one id must be in it."""
        found = cls()
        found.repeated = rows.num_rows - pc.count_distinct(rows.column("id")).as_py()
        for start in range(0, rows.num_rows, _SLICE):  # as objects, rows take ten times their place in a table
            found._add(rows.slice(start, _SLICE))
        return found

    def _add(self, rows: pa.Table) -> None:
        self.splits.update(rows.column("folder").to_pylist())
        records = table_to_records(rows.select(RECORD_SCHEMA.names))
        if "format" in rows.column_names:
            self.values["format"].add(
                (text or "").partition(" (")[0] or None for text in rows.column("format").to_pylist()
            )
        self.values["source"].add(record.source for record in records)
        answers = [said for record in records if (said := answer_of(record))]
        self.values["shape"].add(map(shape, answers))
        self.values["ending"].add(map(ending, answers))
        self.values["casing"].add(map(casing, answers))
        self._add_labels(records)
        self.lengths["prompt"] += _lengths([prompt_of(record) for record in records])
        self.lengths["answer"] += _lengths(answers)
        texts = row_texts(rows)
        for size in (1, 2):
            hashes, _ = ngram_hashes(texts, size, whole=False)
            self.ngrams[size].add(hashes)
            self.ngrams_total[size] += len(hashes)

    def _add_labels(self, records: Sequence[Record]) -> None:
        values: dict[str, list[str]] = {}
        for record in records:
            for name, value in label_values(record).items():
                values.setdefault(name, []).append(value)
        for name, of_rows in values.items():
            self.labels.setdefault(name, ValueCount()).add(of_rows)
        self._limit_labels()

    def _limit_labels(self) -> None:
        # Which targets stay is told by their names alone, as in `ValueCount`.
        if len(self.labels) > MOST_TARGETS:
            kept = sorted(self.labels, key=lambda name: xxhash.xxh64_intdigest(name.encode()))[:MOST_TARGETS]
            self.labels = {name: self.labels[name] for name in kept}

    def update(self, other: Statistics) -> None:
        """Adds the statistics of other rows."""
        self.splits.update(other.splits)
        self.repeated += other.repeated
        for name, counts in self.values.items():
            counts.update(other.values[name])
        for name, counts in other.labels.items():
            self.labels.setdefault(name, ValueCount()).update(counts)
        self._limit_labels()
        for name in self.lengths:
            self.lengths[name] += other.lengths[name]
        for size in (1, 2):
            self.ngrams[size].update(other.ngrams[size])
            self.ngrams_total[size] += other.ngrams_total[size]

    def distinct(self, size: int) -> float | None:
        """Different n-grams over all n-grams (Li et al., 2016); None where there is none."""
        total = self.ngrams_total[size]
        return min(self.ngrams[size].estimate / total, 1.0) if total else None

    def to_json(self) -> str:
        """The statistics as text, to travel in a table."""
        return json.dumps(
            {
                "splits": self.splits,
                "repeated": self.repeated,
                "values": {name: counts.to_json() for name, counts in self.values.items()},
                "labels": {name: counts.to_json() for name, counts in self.labels.items()},
                "lengths": {name: bins.tolist() for name, bins in self.lengths.items()},
                "ngrams": [self.ngrams[size].to_text() for size in (1, 2)],
                "ngrams_total": [self.ngrams_total[size] for size in (1, 2)],
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """What `to_json` wrote."""
        given, found = json.loads(text), cls()
        found.splits, found.repeated = Counter(given["splits"]), given["repeated"]
        found.values = {name: ValueCount.from_json(counts) for name, counts in given["values"].items()}
        found.labels = {name: ValueCount.from_json(counts) for name, counts in given["labels"].items()}
        found.lengths = {name: np.array(bins, np.int64) for name, bins in given["lengths"].items()}
        found.ngrams = {size: DistinctCount.from_text(given["ngrams"][size - 1]) for size in (1, 2)}
        found.ngrams_total = {size: given["ngrams_total"][size - 1] for size in (1, 2)}
        return found


def measure(rows: pa.Table) -> pa.Table:
    """One row with the `Statistics` of a table's usable rows that sources had, in column ``statistics``."""
    return pa.table({"statistics": [Statistics.of(original_rows(rows)).to_json()]})


def summed(texts: Iterable[str]) -> Statistics:
    """The statistics of all parts, from their texts."""
    total = Statistics()
    for text in texts:
        total.update(Statistics.from_json(text))
    return total


def original_rows(rows: pa.Table) -> pa.Table:
    """The usable rows; those that augmentation or a weight made are left out."""
    rows = rows.filter(pc.is_null(rows.column("reason")))
    for name, absent in (("made", pc.is_null), ("copy", lambda column: pc.equal(column, 0))):
        if name in rows.column_names:
            rows = rows.filter(absent(rows.column(name)))
    return rows


def sample(rows: pa.Table, share: float, seed: int) -> pa.Table:
    """The records of about `share` of the usable rows, chosen by the hash of seed and id."""
    rows = original_rows(rows)
    chosen = [
        int(short_hash(f"{seed}:sample:{row_id}"), 16) < share * 2**64 for row_id in rows.column("id").to_pylist()
    ]
    return rows.select(RECORD_SCHEMA.names).filter(pa.array(chosen, pa.bool_()))


def prompt_of(record: Record) -> str:
    """What a record asks: its turns without the system's and the answer, or the start of a raw text."""
    return "\n".join(turn.content for turn in record.prompt if turn.role != "system") or record.text or ""


def answer_of(record: Record) -> str | None:
    """What a record answers; of a preference the chosen answer."""
    return record.chosen[-1].content if record.chosen else record.answer


def shape(answer: str) -> str:
    """What kind of text an answer is; of JSON objects with their keys."""
    fields = json_fields(answer)
    if fields is not None:
        keys = sorted(fields)
        rest = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        return f"JSON with {', '.join(key[:40] for key in keys[:_KEYS_SHOWN])}{rest}" if keys else "JSON without keys"
    text = answer.strip()
    if text[:1] == "[" and is_json(text):
        return "JSON list"
    kinds = {
        "text with code": "```" in text,
        "text with a list": any(line.lstrip().startswith(("- ", "* ", "1. ")) for line in text.splitlines()),
        "several paragraphs": "\n\n" in text,
        "several lines": "\n" in text,
        "one line": len(text.split()) > _FEW_WORDS,
    }
    return next((kind for kind, holds in kinds.items() if holds), "a few words")


def ending(answer: str) -> str:
    """What an answer ends with."""
    last = answer.rstrip()[-1:]
    if last.isdigit():
        return "a digit"
    return "a letter" if last.isalpha() else _ENDINGS.get(last, "another sign")


def casing(answer: str) -> str:
    """How an answer's letters begin."""
    letters = [sign for sign in answer if sign.isalpha()]
    if not letters:
        return "no letters"
    if len(letters) > 3 and all(map(str.isupper, letters)):
        return "capitals only"
    first = answer.lstrip()[:1]
    if not first.isalpha():
        return "begins with no letter"
    return "begins with a capital" if first.isupper() else "begins with a small letter"


def _lengths(texts: Sequence[str]) -> NDArray[np.int64]:
    """Counts of texts by words, in half doublings: bin 0 is a text without words or with one."""
    words = np.array([max(len(text.split()), 1) for text in texts], np.float64)
    places = np.clip(np.floor(np.log2(words) / LENGTH_STEP), 0, _LENGTH_BINS - 1).astype(np.int64)
    return np.bincount(places, minlength=_LENGTH_BINS)
