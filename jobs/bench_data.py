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
import pyarrow.compute as pc

from jobs.bench_machine import measured

STARTER = "starter:smollm2-135m"
WORDS, VOCABULARY, THRESHOLD = 104, 30_000, 0.7
RUNS = {0.5: (1, 1, 1, 1, 1, 4), 0.6: (1, 1, 1, 1, 1), 0.7: (1, 1, 3), 0.8: (1, 2), 0.9: (1,)}
"""Runs of words to change for a similarity: one of n words changes n + 4 of a row's 100 shingles, and x changed ones
leave (100 - x) / (100 + x)."""


def near_duplicates(rows: int, repeats: int) -> dict[str, Any]:
    """Near-duplicate detection against datasketch on the same rows, and what share of planted pairs each finds."""
    import ray

    from raytune_ft.data.ray_blocks import ray_data

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
            "datasketch, as complete": lambda: by_datasketch(texts, complete=True),
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
    from raytune_ft.core.digest import short_hash
    from raytune_ft.data.groups import with_nodes
    from raytune_ft.data.rows import ROW_SCHEMA

    count = len(texts)
    known = {"text": texts, "group": list(map(short_hash, texts)), "position": range(count), "file": [0] * count}
    known["is_test"] = [False] * count
    columns = [pa.array(known[f.name], f.type) if f.name in known else pa.nulls(count, f.type) for f in ROW_SCHEMA]
    table = pa.table(columns, schema=ROW_SCHEMA)
    return with_nodes(table.append_column("stratum", pa.array(np.zeros(count, np.int64))))


def on_ray(dataset: Any) -> set[tuple[int, int]]:
    """The pairs by our shuffles, with the clusters made from them."""
    from raytune_ft.data.ray_blocks import RayBlocks

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


def by_datasketch(texts: list[str], *, complete: bool = False) -> set[tuple[int, int]]:
    """The pairs by datasketch's index, verified by its signatures, as its documentation shows; with a fast hash.

    As it comes, bands are chosen for few false matches and estimates miss pairs near the threshold; `complete` asks it
    for what our pass gives: nearly all pairs from the threshold on, verified by their shingles.
    """
    import xxhash
    from datasketch import MinHash, MinHashLSH

    shingles = (
        [" ".join(words[at : at + 5]).encode() for at in range(len(words) - 4)] for words in map(str.split, texts)
    )
    signatures = list(MinHash.generator(shingles, num_perm=128, hashfunc=xxhash.xxh32_intdigest))
    index = MinHashLSH(threshold=THRESHOLD, num_perm=128, weights=(0.05, 0.95) if complete else (0.5, 0.5))
    with index.insertion_session() as session:
        for number, signature in enumerate(signatures):
            session.insert(number, signature, check_duplication=False)
    met = ((number, other) for number, one in enumerate(signatures) for other in index.query(one) if other > number)
    if complete:
        return {(one, other) for one, other in met if similarity(texts[one], texts[other]) >= THRESHOLD}
    return {(one, other) for one, other in met if signatures[one].jaccard(signatures[other]) >= THRESHOLD}


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of two texts' runs of five words."""

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    mine, theirs = shingles(one), shingles(other)
    return len(mine & theirs) / len(mine | theirs)


def judged(
    found: set[tuple[int, int]], planted: dict[float, list[tuple[int, int]]], texts: list[str]
) -> dict[str, Any]:
    """Share of the planted pairs that were found, by similarity, and of the found that brute force agrees with."""
    right = sum(similarity(texts[one], texts[other]) >= THRESHOLD for one, other in found)
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


def rendering(rows: int, repeats: int) -> dict[str, Any]:
    """Rendering and tokenizing of chat rows, masks included, against what renders and tokenizes without masks."""
    import os

    import datasets
    import ray

    from raytune_ft.data.ray_blocks import ray_data
    from raytune_ft.data.tokenize import chat_for
    from raytune_ft.models.references import resolve_model

    model = resolve_model(STARTER).tokenizer_source
    table = chat_table(rows, chat_for(model).tokenizer)
    chats = [
        [{"role": m["role"], "content": m["content"]} for m in row] for row in table.column("messages").to_pylist()
    ]
    theirs = datasets.Dataset.from_dict({"messages": chats})
    began = time.perf_counter()
    with ray_data() as cluster:
        cores = min(int(cluster.cpus), os.cpu_count() or 1)
        tokenized_on_ray(ray.data.from_arrow([table.slice(at, 100) for at in range(0, 100 * cores, 100)]), model)
        startup = {"raytune-ft on Ray": time.perf_counter() - began}
        began = time.perf_counter()
        by_datasets(theirs.select(range(50 * cores)), model, cores)
        startup["datasets.map"] = time.perf_counter() - began
        size = -(-rows // (4 * cores))
        dataset = ray.data.from_arrow([table.slice(at, size) for at in range(0, rows, size)]).materialize()
        rivals: dict[str, Callable[[], int]] = {
            "raytune-ft on Ray": lambda: tokenized_on_ray(dataset, model),
            "raytune-ft in one process": lambda: tokenized_here(table, model),
            "bare loop": lambda: by_bare_loop(chats, model),
            "datasets.map": lambda: by_datasets(theirs, model, cores),
        }
        seconds, tokens = interleaved(rivals, repeats)
    if len(set(tokens.values())) > 1:
        raise SystemExit(f"the rivals made different numbers of tokens: {tokens}")
    # datasets starts its processes in each call; what that takes is told by the call on few rows.
    seconds["datasets.map"] = [taken - startup["datasets.map"] for taken in seconds["datasets.map"]]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    total = next(iter(tokens.values()))
    print(f"{rows:,} chat rows, {total:,} tokens, {cores} cores; start-up apart: {rounded(startup)} s")
    print(f"{'':28}{'median s':>10}{'rows/s':>10}{'speed of ours':>15}")
    for name, median in medians.items():
        print(f"{name:28}{median:10.1f}{rows / median:10.0f}{median / medians['raytune-ft on Ray']:15.2f}")
    return {"rows": rows, "tokens": total, "startup_s": startup, "seconds": seconds, "medians": medians}


def rounded(values: dict[str, float]) -> str:
    """Values to a tenth, by name."""
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())


def chat_table(count: int, tokenizer: Any) -> pa.Table:
    """Conversations of two or four turns, about 150 words each, as rows that went through all steps before this one."""
    from raytune_ft.core.records import Message, Record, records_to_table

    rng = np.random.default_rng(0)
    found = (token[1:] for token in tokenizer.get_vocab() if token.startswith("Ġ"))
    words = np.array(sorted(word for word in found if word.isascii() and word.isalpha() and word.islower()))
    records = []
    for number in range(count):
        turns = int(rng.choice([2, 4]))
        texts = [
            " ".join(words[rng.zipf(1.1, int(length)) % len(words)]) + "." for length in rng.integers(20, 80, turns)
        ]
        messages = tuple(Message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts))
        records.append(Record(messages=messages, source="bench", position=number))
    table = records_to_table(records)
    for name in ("reason", "notes"):
        table = table.append_column(name, pa.nulls(count, pa.string()))
    return table


def tokenized_here(table: pa.Table, model: str) -> int:
    """The tokens that our step makes of the rows, counted."""
    return count_tokens(tokenized(table, model))


def tokenized(table: pa.Table, model: str) -> pa.Table:
    """Our step, as `prepare` runs it on a block."""
    from raytune_ft.data.tokenize import TokenPolicy, add_tokens, chat_for

    return add_tokens(table, chat_for(model), TokenPolicy(4096))


def tokenized_on_ray(dataset: Any, model: str) -> int:
    """The tokens that our step makes of the blocks on Ray, counted."""
    done = dataset.map_batches(
        tokenized, batch_size=None, batch_format="pyarrow", zero_copy_batch=True, fn_kwargs={"model": model}
    ).materialize()
    counts = done.map_batches(token_counts, batch_size=None, batch_format="pyarrow", zero_copy_batch=True).take_all()
    return sum(row["tokens"] for row in counts)


def token_counts(table: pa.Table) -> pa.Table:
    """The number of tokens of a block."""
    return pa.table({"tokens": [count_tokens(table)]})


def count_tokens(table: pa.Table) -> int:
    """The number of tokens in a table."""
    return int(pc.sum(pc.list_value_length(table.column("input_ids"))).as_py() or 0)


def by_bare_loop(chats: list[list[dict[str, str]]], model: str) -> int:
    """The chat template row by row and the fast tokenizer in batches on all cores: ids, and no masks."""
    from raytune_ft.data.tokenize import chat_for

    tokenizer = chat_for(model).tokenizer
    made = []
    for at in range(0, len(chats), 1024):
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats[at : at + 1024]]
        batch = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        made += [encoding.ids for encoding in batch]
    return sum(map(len, made))


def by_datasets(rows: Any, model: str, cores: int) -> int:
    """The same in `datasets.map` with a process a core: ids, and no masks."""
    import datasets

    from raytune_ft.data.tokenize import chat_for

    tokenizer = chat_for(model).tokenizer

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in batch["messages"]]
        return {"input_ids": tokenizer(texts, add_special_tokens=False)["input_ids"]}

    datasets.disable_progress_bars()
    done = rows.map(encode, batched=True, num_proc=cores, remove_columns=["messages"], load_from_cache_file=False)
    return int(pc.sum(pc.list_value_length(done.data.column("input_ids"))).as_py())


def memory(rows: int, repeats: int) -> dict[str, Any]:
    """Memory of `prepare` (all its steps, tokens included) at a sixteenth, a quarter and all of the rows.

    Private memory is told apart for the driver and its largest worker; what they share (Ray's object store, which
    spills to disk when it is full) is its own column.
    """
    import tempfile

    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for share in (16, 4, 1):
            count = rows // share
            with tempfile.TemporaryDirectory() as folder:
                write_chats(Path(folder) / "rows", count)
                found.setdefault(str(count), []).append(watched_prepare(Path(folder)))
    medians = {n: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for n, runs in found.items()}
    print(f"{'rows':>10}{'s':>8}{'driver MB':>12}{'worker MB':>12}{'all workers MB':>16}{'object store MB':>17}")
    for count, row in medians.items():
        columns = ("driver_mb", "worker_mb", "workers_mb", "store_mb")
        widths = (12, 12, 16, 17)
        cells = "".join(f"{row[name]:{width}.0f}" for name, width in zip(columns, widths, strict=True))
        print(f"{int(count):10,}{row['seconds']:8.1f}{cells}")
    return {"rows": rows, "runs": found, "medians": medians}


def write_chats(folder: Path, count: int, rows_per_file: int = 2500) -> None:
    """Conversations of about 150 words as JSONL files."""
    import json

    rng = np.random.default_rng(0)
    folder.mkdir()
    for start in range(0, count, rows_per_file):
        with (folder / f"part-{start:09}.jsonl").open("w") as file:
            for number in range(start, min(start + rows_per_file, count)):
                words = [f"word{word}" for word in np.minimum(rng.zipf(1.2, 150), VOCABULARY)]
                asked, answer = " ".join([str(number), *words[:75]]), " ".join(words[75:])
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")


def watched_prepare(folder: Path) -> dict[str, float]:
    """Runs ``raytune-ft prepare`` on ``rows/`` and gives seconds and the highest memory of its processes, in MB."""
    import subprocess

    import psutil

    arguments = [f"sources=[{folder / 'rows'}]", f"output_path={folder / 'out'}", f"model_path={STARTER}"]
    (folder / "prepare.yaml").write_text("quality: {report: true}\n")
    code = "import sys; from raytune_ft.cli import run_verb; sys.exit(run_verb('prepare', sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(folder / "prepare.yaml"), *arguments]
    began = time.perf_counter()
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
    peak = dict.fromkeys(("driver_mb", "worker_mb", "workers_mb", "store_mb"), 0.0)
    shared_before = shared_mb()
    while run.poll() is None:
        now = dict.fromkeys(peak, 0.0)
        for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
            try:
                memory, name = process.memory_info(), " ".join(process.cmdline())
            except psutil.Error:
                continue
            own = (memory.rss - memory.shared) / 1e6  # without the object store, which is mapped into all
            if process.pid == run.pid:
                now["driver_mb"] = own
            elif name.startswith("ray::"):
                now["worker_mb"] = max(now["worker_mb"], own)
                now["workers_mb"] += own
        now["store_mb"] = shared_mb() - shared_before
        peak = {key: max(peak[key], now[key]) for key in peak}
        time.sleep(0.3)
    if run.returncode:
        raise SystemExit((folder / "log").read_text()[-3000:])
    return {"seconds": time.perf_counter() - began, **peak}


def shared_mb() -> float:
    """Memory of this machine's shared segments, in which Ray's object store lies."""
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(found.split()[1]) * 1024 / 1e6


PARTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "near_duplicates": near_duplicates,
    "rendering": rendering,
    "memory": memory,
}


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
