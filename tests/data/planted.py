"""Rows with pairs planted at chosen word-5-gram similarities, and the similarity by brute force."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa

from raytune_ft.core.digest import short_hash
from raytune_ft.data.groups import with_nodes
from raytune_ft.data.rows import ROW_SCHEMA

WORDS = 104
"""Words of a row: 100 shingles."""
CHANGES = {0.5: (1, 1, 1, 1, 1, 4), 0.6: (1, 1, 1, 1, 1), 0.7: (1, 1, 3), 0.8: (1, 2), 0.9: (1,)}
"""Runs of words to change: one of n words changes n + 4 shingles, and x changed ones of 100 leave a similarity of
(100 - x) / (100 + x): 0.504, 0.600, 0.709, 0.802 and 0.905."""


def planted_texts(pairs: int, seed: int = 0) -> list[str]:
    """`pairs` originals for each similarity, in order, followed by their changed copies in the same order."""
    rng = random.Random(seed)
    originals = [[f"w{rng.randrange(5000)}" for _ in range(WORDS)] for _ in range(pairs * len(CHANGES))]
    copies = []
    for number, words in enumerate(originals):
        changed = list(words)
        for place, run in enumerate(list(CHANGES.values())[number // pairs]):
            start = 6 + 15 * place + rng.randrange(5)  # so far apart that no shingle has two runs
            changed[start : start + run] = [f"x{number}_{n}" for n in range(run)]
        copies.append(changed)
    return [" ".join(words) for words in originals + copies]


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """The sets of 5 words in a row, by plain Python."""
    words = text.lower().split()
    return {tuple(words[at : at + 5]) for at in range(max(len(words) - 4, 1))}


def similarity(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
    """Jaccard similarity."""
    return len(one & other) / len(one | other)


def settled(texts: list[str], **columns: list[Any]) -> pa.Table:
    """Rows as they are after settling, one text each; `columns` replaces values of theirs."""
    count = len(texts)
    values: dict[str, list[Any]] = {
        "id": [short_hash(text) for text in texts],
        "text": texts,
        "group": [short_hash(text) for text in texts],
        "source": ["a"] * count,
        "file": [0] * count,
        "position": list(range(count)),
        "is_test": [False] * count,
        "metadata": ["{}"] * count,
        **columns,
    }
    stratum = values.pop("stratum", [0] * count)
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA).append_column("stratum", pa.array(stratum, pa.int64()))
    table = table.append_column("conflicting", pa.array([False] * count))
    return with_nodes(table.sort_by([("group", "ascending"), ("file", "ascending"), ("position", "ascending")]))


def parts_of(table: pa.Table, count: int) -> list[pa.Table]:
    """The table in `count` slices."""
    size = -(-table.num_rows // count)
    return [table.slice(at * size, size) for at in range(count)]
