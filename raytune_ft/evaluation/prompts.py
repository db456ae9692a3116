"""The prompts of offline batch inference: files in shards, each row a record, read where the cluster works."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa

from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.errors import DataError, RaytuneError
from raytune_ft.core.manifest import CLAIM, ArtifactKind, Parent
from raytune_ft.core.records import Record
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.folders import ROWS, files_of, files_of_split, split_files
from raytune_ft.evaluation.record_files import record_of, rows_in, with_columns
from raytune_ft.evaluation.rows import files_digest
from raytune_ft.evaluation.shards import fault_table, shard_table

ROWS_PER_SHARD = 256


def prompt_files(dataset_path: str, split: str | None) -> tuple[list[Location], Parent]:
    """The files of a dataset artifact's split, of a folder, or the one file; and the entry in the manifest.

    Raises:
        DataError: if there are none.
        ArtifactError: if the dataset is unfinished or damaged.
    """
    location = Location.at(dataset_path)
    if not location.exists():
        raise DataError(f"{location}: there are no such prompts")
    if has_manifest(location) or (location / CLAIM).exists():
        artifact = open_artifact(location, ArtifactKind.DATASET)
        files = split_files(location, sorted(artifact.manifest.files), split or "test")
        return files, artifact.as_parent("dataset")
    if location.is_file():
        if split is not None:
            raise DataError(f"split: {location} is a single file, taken whole; leave split out (got {split!r})")
        files = [location]
    elif split is not None:
        files = files_of_split(location, split)
    else:
        files = files_of(location)
    if not files or not all(file.name.endswith(ROWS) for file in files):
        raise DataError(f"{location}: holds no .jsonl or .parquet file with prompts")
    return files, Parent(role="dataset", where=str(location), digest=files_digest(files))


def read_shards(files: pa.Table, target: str) -> Iterator[pa.Table]:
    """The rows of files (columns ``number`` and ``uri``) as tables of `SHARD_SCHEMA`, one a shard.

    Columns that a record has no place for are in its metadata: see `record_files.with_columns`.

    A row that is no prompt ends its file with a `shards.fault_table`, which names file and row: an exception would
    be drowned by Ray Data's words.
    """
    for entry in files.to_pylist():
        rows = _records(Location(entry["uri"]))
        start = 0
        try:
            while records := list(islice(rows, ROWS_PER_SHARD)):
                yield shard_table(records, target, f"{entry['number']:05d}-{start:012d}")
                start += len(records)
        except RaytuneError as error:
            yield fault_table(error, target, f"{entry['number']:05d}-{start:012d}")


def prompt_record(row: Any, where: str, position: int) -> Record:
    """A row with ``prompt`` or ``messages`` as a record at its place.

    Raises:
        DataError: if it has neither.
    """
    if isinstance(row, dict) and row.get("prompt") is not None and not row.get("messages"):
        asked = row["prompt"]
        if not isinstance(asked, str | list):
            raise DataError(f"{where}: `prompt` must be text or a list of messages (got {asked!r:.60})")
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        row = {**{key: value for key, value in row.items() if key != "prompt"}, "messages": turns}
    if not isinstance(row, dict) or not row.get("messages"):
        raise DataError(f"{where}: has neither `prompt` nor `messages`")
    record = record_of(row, where)
    if not record.prompt:
        raise DataError(f"{where}: has no prompt: expected `prompt`, or `messages` with a turn before the answer")
    return Record(**{**vars(record), "position": position})


def _records(file: Location) -> Iterator[Record]:
    for position, (row, where) in enumerate(rows_in(file, whole=True)):
        yield with_columns(prompt_record(row, where, position), row, where)
