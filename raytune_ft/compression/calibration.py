"""Rows that show a model's layers what they usually see: token ids from a dataset."""

from __future__ import annotations

from collections.abc import Iterator

from raytune_ft.compression.config import CalibrationConfig
from raytune_ft.core.artifacts import has_manifest, open_artifact
from raytune_ft.core.errors import DataError
from raytune_ft.core.manifest import ArtifactKind
from raytune_ft.core.records import Record
from raytune_ft.core.row_files import rows_of
from raytune_ft.core.storage import Location
from raytune_ft.models.chat import Chat, encode_record


def calibration_rows(config: CalibrationConfig, chat: Chat, *, context_tokens: int | None) -> list[list[int]]:
    """Token ids of the first training rows, each cut where the settings, or the model's context, end.

    Args:
        config: which dataset, how many of its rows, and how much of each; rows have ``messages`` or ``text``.
        chat: of the model that is calibrated; rows are rendered as in training.
        context_tokens: the model's limit, if it has one.

    Raises:
        DataError: if there is no such dataset, a row is no record, or there is none.
    """
    longest = min(config.calibration_tokens, context_tokens or config.calibration_tokens)
    found: list[list[int]] = []
    for record, where in _records(Location.at(str(config.calibration_path))):
        try:
            ids = encode_record(chat, record).input_ids[:longest]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if len(ids) > 1:
            found.append(ids)
        if len(found) == config.calibration_rows:
            break
    if not found:
        raise DataError(f"{config.calibration_path}: holds no rows to calibrate with")
    return found


def _records(location: Location) -> Iterator[tuple[Record, str]]:
    if not location.exists():
        raise DataError(f"calibration_path: {location}: there is no such dataset")
    if has_manifest(location):
        names = sorted(open_artifact(location, ArtifactKind.DATASET).manifest.files)
        files = [location / name for name in names if name.startswith("train/")]
    elif location.is_file():
        files = [location]
    else:
        raise DataError(f"calibration_path: {location}: expected a dataset artifact, or a JSONL or Parquet file")
    for file in files:
        for row, where in rows_of(file):
            if not isinstance(row, dict) or not (row.get("messages") or row.get("text")):
                raise DataError(f"{where}: has neither `messages` nor `text`; run `raytune-ft prepare` on it first")
            try:
                yield Record.from_row(row), where
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{where}: is no record ({error!r}); run `raytune-ft prepare` on it first") from None
