"""The leak check: nothing of the training data in another split, and no benchmark text in any.

It does not trust how the splits were drawn: what must not straddle is looked up anew in the finished ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from raytune_ft.core.errors import DataError, RunError
from raytune_ft.core.grammar import number_of
from raytune_ft.data.blocks import Blocks
from raytune_ft.data.config import SPLITS, DataCollectionConfig
from raytune_ft.data.readers import read_rows
from raytune_ft.data.representativeness import AUDIT_SCHEMA, count_fields
from raytune_ft.data.rows import mark
from raytune_ft.data.shingles import ngram_hashes, normal_texts, row_texts
from raytune_ft.data.sources import SourceFile
from raytune_ft.data.strata import field_values

BENCHMARK_WORDS = 13
"""Words in a row that must not stand in a benchmark (GPT-3's contamination check; Brown et al., 2020)."""
BENCHMARK_REASON = "benchmark overlap"
_ROWS_AT_ONCE = 2048
_EXAMPLES = 3
_KINDS = ("content", "prompt", "question", "near-duplicates", "conversation")
_KEY_SCHEMA = pa.schema([(name, pa.int64()) for name in ("key", "kind", "split", "file", "position")])
_GRAM_SCHEMA = pa.schema([("gram", pa.uint64()), ("file", pa.int64()), ("position", pa.int64())])


def benchmark_grams(files: pa.Table) -> Iterator[pa.Table]:
    """The hashes of all 13-grams in the texts of benchmark files (columns of `SourceFile`), with where they stand.

    All text of a row counts, whatever its columns are; a row that is malformed counts as it stands in the file.
    """
    yield _GRAM_SCHEMA.empty_table()
    for columns in files.to_pylist():
        file = SourceFile(**columns)
        texts: list[str] = []
        places: list[int] = []
        for row in read_rows(file):
            found = list(_strings(row.values)) if row.values is not None else [row.raw]
            texts += found
            places += [row.position] * len(found)
            if len(texts) >= _ROWS_AT_ONCE:
                yield _grams(texts, places, file.number)
                texts, places = [], []
        yield _grams(texts, places, file.number)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _grams(texts: list[str], places: list[int], file: int) -> pa.Table:
    hashes, starts = ngram_hashes(pa.array(texts, pa.string()), BENCHMARK_WORDS, whole=False, only_letters=True)
    position = np.repeat(np.array(places, np.int64), np.diff(starts))
    return pa.table([hashes, np.full(len(hashes), file), position], schema=_GRAM_SCHEMA)


def sorted_grams(grams: pa.Table) -> pa.Table:
    """Each 13-gram once, in order, with the first place where it stands."""
    grams = grams.sort_by([(name, "ascending") for name in _GRAM_SCHEMA.names])
    _, first = np.unique(grams.column("gram").to_numpy(), return_index=True)
    return grams.take(first).combine_chunks()


def mark_benchmarks(rows: pa.Table, grams: pa.Table, labels: Sequence[str]) -> pa.Table:
    """The table with a reason on every usable row of `sources` that shares 13 words in a row with a benchmark.

    Args:
        rows: of `ROW_SCHEMA`.
        grams: `sorted_grams` of the benchmarks.
        labels: the names of the benchmark files, by number.
    """
    parts = (rows.slice(at, _ROWS_AT_ONCE) for at in range(0, rows.num_rows, _ROWS_AT_ONCE))
    return mark(rows, [reason for part in parts for reason in _overlaps(part, grams, labels)])


def _overlaps(rows: pa.Table, grams: pa.Table, labels: Sequence[str]) -> list[str | None]:
    texts = row_texts(rows)
    hashes, starts = ngram_hashes(texts, BENCHMARK_WORDS, whole=False, only_letters=True)
    known = grams.column("gram").to_numpy()
    at = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
    hits = np.flatnonzero(known[at] == hashes) if len(known) else np.empty(0, np.int64)
    row_of, first = np.unique(np.searchsorted(starts, hits, "right") - 1, return_index=True)
    reasons: list[str | None] = [None] * rows.num_rows
    tested = rows.column("is_test").to_pylist()
    for row, hit in zip(row_of.tolist(), hits[first].tolist(), strict=True):
        if tested[row]:
            continue
        place = grams.slice(int(at[hit]), 1).to_pylist()[0]
        words = _normal_words(texts[row].as_py())[hit - starts[row] :][:BENCHMARK_WORDS]
        where = f"{labels[place['file']]}:{place['position']}"
        reasons[row] = f"{BENCHMARK_REASON}: {' '.join(words)!r} also stands in {where}"
    return reasons


def _normal_words(text: str) -> list[str]:
    return list(normal_texts(pa.array([text]), only_letters=True)[0].as_py().split())


def overlapping(rows: pa.Table) -> pa.Table:
    """How many rows were marked for sharing text with a benchmark, and examples as JSON `text`."""
    found = rows.filter(pc.starts_with(rows.column("reason"), BENCHMARK_REASON).fill_null(False))
    shown = found.select(["source", "position", "reason"]).slice(0, _EXAMPLES).to_pylist()
    return pa.table([[BENCHMARK_REASON], [found.num_rows], [json.dumps(shown)]], schema=AUDIT_SCHEMA)


def refuse_overlaps(found: Sequence[Mapping[str, Any]]) -> None:
    """Stops a run whose rows share text with a benchmark.

    Args:
        found: the rows of `overlapping`.

    Raises:
        DataError: with the count and examples, if there are any.
    """
    examples = [row for part in found for row in json.loads(part["text"])][:_EXAMPLES]
    shown = "; ".join(f"{row['source']}:{row['position']} ({row['reason'].partition(': ')[2]})" for row in examples)
    if examples:
        raise DataError(
            f"{number_of(sum(part['count'] for part in found), 'row shares', 'rows share')} {BENCHMARK_WORDS} words in "
            f"a row with a benchmark: {shown}. Remove them, or set on_leak: reject to leave such rows out."
        )


def audit(rows: Blocks, config: DataCollectionConfig) -> Blocks:
    """What the finished splits are like: `kind`, `count` and JSON `text` of what stands in two of them, and counts.

    Args:
        rows: settled and linked, with `folder`, the split each row is in.
        config: says which fields to group by and to count.
    """
    torn = rows.map(straddle_keys, group_by=config.group_by).by_key("key").map(find_straddles)
    return rows.map(count_fields, stratify_by=config.stratify_by).union(torn)


def straddle_keys(rows: pa.Table, group_by: str | None) -> pa.Table:
    """For each usable row the hashes of what no other split may have, by kind (`_KINDS`)."""
    rows = rows.filter(pc.is_null(rows.column("reason")))
    values: list[list[Any]] = [rows.column("id").to_pylist(), rows.column("prompt").to_pylist()]
    values.append(rows.column("question").to_pylist() if "question" in rows.column_names else [])
    clusters = rows.column("cluster").to_pylist() if "cluster" in rows.column_names else []
    values.append([None if cluster == -1 else cluster for cluster in clusters])
    values.append([value or None for value in field_values(rows, group_by)] if group_by else [])
    split = pc.index_in(rows.column("folder"), pa.array(SPLITS)).cast(pa.int64())
    parts = [_KEY_SCHEMA.empty_table()]
    for kind, of_rows in enumerate(values):
        places = [place for place, value in enumerate(of_rows) if value is not None]
        keys = [xxhash.xxh64_intdigest(f"{kind}:{of_rows[place]}".encode()) >> 1 for place in places]
        fixed = [pa.array(keys, pa.int64()), pa.array([kind] * len(keys), pa.int64())]
        taken = [column.take(pa.array(places, pa.int64())) for column in (split, *rows.select(["file", "position"]))]
        parts.append(pa.table([*fixed, *taken], schema=_KEY_SCHEMA))
    return pa.concat_tables(parts)


def find_straddles(keys: pa.Table) -> pa.Table:
    """What stands in more than one split: for each kind the `count`, and examples as JSON `text`.

    An example is two rows, each with split, file and position. All rows of a key must be in the table.
    """
    order = [(name, "ascending") for name in ("key", "split", "file", "position")]
    rows = keys.sort_by(order)
    key, split = (rows.column(name).to_numpy() for name in ("key", "split"))
    torn = np.flatnonzero((key[1:] == key[:-1]) & (split[1:] != split[:-1]))
    _, once = np.unique(key[torn], return_index=True)
    torn = torn[once]
    kind = rows.column("kind").to_numpy()[torn]
    found = []
    for number, name in enumerate(_KINDS):
        pairs = torn[kind == number]
        shown = [rows.slice(int(at), 2).select(["split", "file", "position"]).to_pylist() for at in pairs[:_EXAMPLES]]
        found.append({"kind": name, "count": len(pairs), "text": json.dumps(shown)})
    return pa.Table.from_pylist([row for row in found if row["count"]], schema=AUDIT_SCHEMA)


def refuse_straddles(found: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Stops a run whose splits share something.

    Args:
        found: the rows of `find_straddles`.
        labels: the names of the source files, by number.

    Raises:
        RunError: with the counts and examples, if there is anything.
    """
    counts: Counter[str] = Counter()
    shown = []
    for row in found:
        counts[row["kind"]] += row["count"]
        for pair in json.loads(row["text"]):
            one, other = (f"{labels[at['file']]}:{at['position']} in {SPLITS[at['split']]}" for at in pair)
            shown.append(f"{one} and {other} share their {row['kind']}")
    if counts:
        listed = ", ".join(f"{count} of {kind}" for kind, count in counts.most_common())
        examples = "; ".join(shown[:_EXAMPLES])
        raise RunError(f"the leak check found what stands in two splits ({listed}): {examples}. Please report this.")
