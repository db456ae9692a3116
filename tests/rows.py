"""Tokenized rows as Parquet files, as the data room leaves them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ft.core.records import Message
from raytune_ft.models.chat import Chat
from raytune_ft.models.loading import load_tokenizer


def token_files(model: Path, folder: Path, *, train: int, validation: int) -> dict[str, list[str]]:
    """So many rows of uneven length for each split, in a file each."""
    chat = Chat(load_tokenizer(str(model)))
    rows = [
        chat.encode([Message("user", f"order {i} red {i * 7}"), Message("assistant", "yes " * (i % 5 + 1))])
        for i in range(train + validation)
    ]
    files = {}
    for name, part in (("train", rows[:train]), ("validation", rows[train:])):
        path = folder / f"{name}.parquet"
        table = {"input_ids": [r.input_ids for r in part], "supervised": [r.supervised for r in part]}
        pq.write_table(pa.table(table), path)
        files[name] = [str(path)]
    return files


def pair_files(model: Path, folder: Path, *, train: int, validation: int) -> dict[str, list[str]]:
    """So many preferences of uneven length for each split: "yes" is preferred to "no", the longer to the shorter."""
    chat = Chat(load_tokenizer(str(model)))
    pairs = [
        [
            chat.encode([Message("user", f"order {i} red {i * 7}"), Message("assistant", answer)])
            for answer in ("yes " * (i % 5 + 2), "no " * (i % 4 + 1))
        ]
        for i in range(train + validation)
    ]
    files = {}
    for name, part in (("train", pairs[:train]), ("validation", pairs[train:])):
        path = folder / f"{name}-pairs.parquet"
        table = {
            "input_ids": [chosen.input_ids for chosen, _ in part],
            "supervised": [chosen.supervised for chosen, _ in part],
            "rejected_input_ids": [rejected.input_ids for _, rejected in part],
            "rejected_supervised": [rejected.supervised for _, rejected in part],
        }
        pq.write_table(pa.table(table), path)
        files[name] = [str(path)]
    return files


def rated_files(model: Path, folder: Path, *, train: int, validation: int) -> dict[str, list[str]]:
    """Answers of uneven length: people like yes and dislike no."""
    chat = Chat(load_tokenizer(str(model)))
    rows, labels = [], []
    for n in range(train + validation):
        answer = "yes " * (n % 5 + 1) if n % 3 else "no " * (n % 4 + 1)
        rows.append(chat.encode([Message("user", f"order {n} red {n * 7}"), Message("assistant", answer)]))
        labels.append(bool(n % 3))
    files = {}
    for name, part in (("train", slice(0, train)), ("validation", slice(train, None))):
        columns = {
            "input_ids": [row.input_ids for row in rows[part]],
            "supervised": [row.supervised for row in rows[part]],
            "label": labels[part],
        }
        path = folder / f"{name}-rated.parquet"
        pq.write_table(pa.table(columns), path)
        files[name] = [str(path)]
    return files


def turns_file(model: Path, path: Path, turns: list[tuple[str, str]]) -> str:
    """Rows of one question and one answer each, in a file."""
    chat = Chat(load_tokenizer(str(model)))
    rows = [chat.encode([Message("user", asked), Message("assistant", said)]) for asked, said in turns]
    return _written(path, [(row.input_ids, row.supervised, None) for row in rows])


def prompts_file(model: Path, path: Path, prompts: list[tuple[str, str | None]]) -> str:
    """Rows of one question each that nobody answers, with what would be right, in a file."""
    chat = Chat(load_tokenizer(str(model)))
    rows = [(chat.prompt_ids([Message("user", asked)]), reference) for asked, reference in prompts]
    return _written(path, [(ids, [False] * len(ids), reference) for ids, reference in rows])


def _written(path: Path, rows: list[tuple[list[int], list[bool], str | None]]) -> str:
    ids, supervised, references = zip(*rows, strict=True)
    table = {"input_ids": ids, "supervised": supervised, "reference": pa.array(references, pa.string())}
    pq.write_table(pa.table(table), path)
    return str(path)
