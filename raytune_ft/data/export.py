"""A dataset as plain files: JSONL, CSV, Parquet, or Hugging Face's ``save_to_disk``, one file (or folder) a split."""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.storage import Location
from raytune_ft.data.config import DatasetFormat

MARKER = "export.json"
_BATCH_ROWS = 1000


def export_splits(splits: Mapping[str, Any], target: Location, output_format: DatasetFormat) -> Location:
    """Writes every split (a `datasets.Dataset`) below `target`; the same export there already is left as it is.

    In CSV, cells that are no text (messages, token ids, true/false) hold JSON, and an empty cell is null.

    Raises:
        ArtifactError: if `target` holds something else; nothing is overwritten.
    """
    marker = {"format": str(output_format), "splits": {name: _content(split) for name, split in splits.items()}}
    present = target.files()
    if MARKER in present and json.loads((target / MARKER).read()) == marker:
        return target
    if present or target.is_file():
        held = ", ".join(list(present)[:3]) or "a file"
        raise ArtifactError(f"{target}: holds something else ({held}); choose another folder. Nothing was overwritten.")
    with tempfile.TemporaryDirectory(prefix="raytune-ft-export-") as scratch:
        for name, split in splits.items():
            _WRITERS[output_format](split, Path(scratch) / name)
        target.upload(Path(scratch))
    (target / MARKER).write(json.dumps(marker, indent=2).encode())
    return target


def _content(split: Any) -> list[Any]:
    """Columns, rows and a hash of the record ids (of all columns where there is none)."""
    hasher = hashlib.sha256()
    names = ["id"] if "id" in split.column_names else list(split.column_names)
    for batch in split.select_columns(names).iter(batch_size=_BATCH_ROWS):
        hasher.update(json.dumps(batch, default=str).encode())
    return [list(split.column_names), split.num_rows, hasher.hexdigest()[:16]]


def _rows(split: Any) -> Iterator[dict[str, Any]]:
    for batch in split.iter(batch_size=_BATCH_ROWS):
        columns: Iterable[tuple[Any, ...]] = zip(*batch.values(), strict=True)
        yield from (dict(zip(batch, cells, strict=True)) for cells in columns)


def _write_jsonl(split: Any, path: Path) -> None:
    with path.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
        for row in _rows(split):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_csv(split: Any, path: Path) -> None:
    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(split.column_names)
        for row in _rows(split):
            writer.writerow(map(_cell, row.values()))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_parquet(split: Any, path: Path) -> None:
    split.to_parquet(str(path.with_suffix(".parquet")))


def _write_huggingface(split: Any, path: Path) -> None:
    split.save_to_disk(str(path))


_WRITERS = {
    DatasetFormat.JSONL: _write_jsonl,
    DatasetFormat.CSV: _write_csv,
    DatasetFormat.PARQUET: _write_parquet,
    DatasetFormat.HUGGINGFACE: _write_huggingface,
}
