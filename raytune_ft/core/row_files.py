"""Files of rows, JSON lines or Parquet, read a row at a time: none is in memory whole.

In core, as a file of its own, because evaluation and compression read such files, and neither knows the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raytune_ft.core.errors import DataError
from raytune_ft.core.refusals import storage_errors
from raytune_ft.core.storage import Location

_BATCH_ROWS = 256


def rows_of(file: Location, columns: Callable[[pa.Schema], Sequence[str]] | None = None) -> Iterator[tuple[Any, str]]:
    """The rows of a JSONL file, blank lines aside, or of a ``.parquet`` file, each with its place in words.

    Args:
        file: the file.
        columns: of a Parquet file, from its schema those that are read; all by default.

    Raises:
        DataError: if a line is no JSON, or a Parquet file is none or cannot be read.
        ArtifactError: if a JSONL file cannot be read.
    """
    return _parquet_rows(file, columns) if file.name.endswith(".parquet") else _json_rows(file)


def _json_rows(file: Location) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(file.lines(errors="replace"), 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: is not valid JSON ({error})") from None
            yield row, where


def _parquet_rows(file: Location, columns: Callable[[pa.Schema], Sequence[str]] | None) -> Iterator[tuple[Any, str]]:
    try:
        with file.filesystem.open_input_file(file.path) as stream:
            parquet = pq.ParquetFile(stream)
            chosen = None if columns is None else list(columns(parquet.schema_arrow))
            number = 0
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=chosen):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}, row {number}"
    except storage_errors() as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error})") from None
