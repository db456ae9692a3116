"""Measures the data stage against its peers, one part a run; prints a table and writes JSON below jobs/results/.

python jobs/bench_data.py --part near_duplicates [--rows 100000] [--repeats 3] [--allow-busy]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import pyarrow as pa

from jobs.bench_machine import measured

WORDS, VOCABULARY, THRESHOLD = 104, 30_000, 0.7
RUNS = {0.5: (1, 1, 1, 1, 1, 4), 0.6: (1, 1, 1, 1, 1), 0.7: (1, 1, 3), 0.8: (1, 2), 0.9: (1,)}
"""Runs of words to change for a similarity: one of n words changes n + 4 of a row's 100 shingles, and x changed ones
leave (100 - x) / (100 + x)."""


def near_duplicates(rows: int, repeats: int) -> dict[str, Any]:
    """Near-duplicate detection against datasketch on the same rows, and what share of planted pairs each finds."""
    import ray

    from raytune_ft.data.run import ray_data

    texts, planted = planted_rows(rows)
    table = settled_table(texts)
    began = time.perf_counter()
    with ray_data() as cluster:
        on_ray(ray.data.from_arrow([table.slice(0, 200), table.slice(rows - 200, 200)]).materialize())
        startup = time.perf_counter() - began
        size = -(-rows // (2 * int(cluster.cpus)))
        dataset = ray.data.from_arrow([table.slice(at, size) for at in range(0, rows, size)]).materialize()
        rivals: dict[str, Callable[[], set[tuple[int, int]]]] = {
            "raytune-ft on Ray": lambda: on_ray(dataset),
            "raytune-ft in one process": lambda: in_process(table),
            "datasketch": lambda: by_datasketch(texts),
        }
        seconds, found = interleaved(rivals, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"{rows:,} rows of {WORDS} words, threshold {THRESHOLD}; start-up of Ray and its workers {startup:.1f} s, apart"
    )
    print(
        f"{'':28}{'median s':>10}{'of ours':>9}" + "".join(f"{f'J {bin_}':>8}" for bin_ in RUNS) + f"{'precision':>11}"
    )
    quality = {name: judged(pairs, planted, texts) for name, pairs in found.items()}
    for name, median in medians.items():
        recall = "".join(f"{value:8.3f}" for value in quality[name]["recall"].values())
        ours = median / medians["raytune-ft on Ray"]
        print(f"{name:28}{median:10.1f}{ours:9.1f}{recall}{quality[name]['precision']:11.4f}")
    return {"rows": rows, "startup_s": startup, "seconds": seconds, "medians": medians, "quality": quality}


def planted_rows(count: int) -> tuple[list[str], dict[float, list[tuple[int, int]]]]:
    """`count` texts of which a tenth are changed copies, and the pairs by similarity."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"word{number}" for number in range(VOCABULARY)])
    words = vocabulary[np.minimum(rng.zipf(1.2, (count, WORDS)) - 1, VOCABULARY - 1)]
    pairs: dict[float, list[tuple[int, int]]] = {bin_: [] for bin_ in RUNS}
    for number in range(count // 10):
        bin_ = list(RUNS)[number % len(RUNS)]
        copy = count - 1 - number
        words[copy] = words[number]
        for place, run in enumerate(RUNS[bin_]):
            start = 6 + 15 * place + rng.integers(5)
            words[copy, start : start + run] = [f"new{number}x{offset}" for offset in range(run)]
        pairs[bin_].append((number, copy))
    return [" ".join(row) for row in words], pairs


def settled_table(texts: list[str]) -> pa.Table:
    """The texts as rows that went through all steps before this one."""
    from raytune_ft.data.groups import with_nodes
    from raytune_ft.data.rows import ROW_SCHEMA, short_hash

    count = len(texts)
    known = {"text": texts, "group": list(map(short_hash, texts)), "position": range(count), "file": [0] * count}
    known["is_test"] = [False] * count
    columns = [pa.array(known[f.name], f.type) if f.name in known else pa.nulls(count, f.type) for f in ROW_SCHEMA]
    table = pa.table(columns, schema=ROW_SCHEMA)
    return with_nodes(table.append_column("stratum", pa.array(np.zeros(count, np.int64))))


def on_ray(dataset: Any) -> set[tuple[int, int]]:
    """The pairs by our shuffles, with the clusters made from them."""
    from raytune_ft.data.run import RayBlocks

    return _ours(RayBlocks(dataset, dataset.num_blocks()))


def in_process(table: pa.Table) -> set[tuple[int, int]]:
    """The pairs by the same pass without Ray."""
    from raytune_ft.data.blocks import LocalBlocks

    return _ours(LocalBlocks([table]))


def _ours(rows: Any) -> set[tuple[int, int]]:
    from raytune_ft.data.groups import sketches
    from raytune_ft.data.near import near_edges, near_labels

    edges = near_edges(rows.map(sketches), THRESHOLD)
    near_labels(edges).rows()
    found = edges.table()
    return set(zip(found.column("low").to_pylist(), found.column("high").to_pylist(), strict=True))


def by_datasketch(texts: list[str]) -> set[tuple[int, int]]:
    """The pairs by datasketch's index, verified by its signatures, as its documentation shows; with a fast hash."""
    import xxhash
    from datasketch import MinHash, MinHashLSH

    shingles = (
        [" ".join(words[at : at + 5]).encode() for at in range(len(words) - 4)] for words in map(str.split, texts)
    )
    signatures = list(MinHash.generator(shingles, num_perm=128, hashfunc=xxhash.xxh32_intdigest))
    index = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    with index.insertion_session() as session:
        for number, signature in enumerate(signatures):
            session.insert(number, signature, check_duplication=False)
    met = ((number, other) for number, one in enumerate(signatures) for other in index.query(one) if other > number)
    return {(one, other) for one, other in met if signatures[one].jaccard(signatures[other]) >= THRESHOLD}


def judged(
    found: set[tuple[int, int]], planted: dict[float, list[tuple[int, int]]], texts: list[str]
) -> dict[str, Any]:
    """Share of the planted pairs that were found, by similarity, and of the found that brute force agrees with."""

    def shingles(number: int) -> set[tuple[str, ...]]:
        words = texts[number].split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    def similarity(one: set[tuple[str, ...]], other: set[tuple[str, ...]]) -> float:
        return len(one & other) / len(one | other)

    right = sum(similarity(shingles(one), shingles(other)) >= THRESHOLD for one, other in found)
    recall = {bin_: sum(pair in found for pair in pairs) / len(pairs) for bin_, pairs in planted.items()}
    return {"pairs": len(found), "recall": recall, "precision": right / max(len(found), 1)}


def interleaved(rivals: dict[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each rival in each round, and what each gave; they take turns, so that a slow spell hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    given = {}
    for _ in range(repeats):
        for name, run in rivals.items():
            began = time.perf_counter()
            given[name] = run()
            seconds[name].append(time.perf_counter() - began)
    return seconds, given


PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {"near_duplicates": near_duplicates}


def main() -> int:
    """Runs one part; 2 if the machine was busy before, or another speed after than before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--allow-busy", action="store_true", help="measure all the same, and say so in the result")
    options = parser.parse_args()
    work = functools.partial(PARTS[options.part], options.rows, options.repeats)
    return measured(f"bench_data_{options.part}", work, allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
