"""The rows in one source file, streamed on a worker; a fault names the row, an error the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.errors import DataError
from raytune_ft.core.storage import Location
from raytune_ft.data.sources import SourceFile


@dataclass(frozen=True)
class SourceRow:
    """One row as it lies in a file: its `values` by column, or the `fault` that keeps it from having any.

    `position` is its place from 0 (in line files the line's), `line` its line from 1 where there are lines.
    """

    position: int
    values: dict[str, Any] | None = None
    line: int | None = None
    fault: str | None = None
    text: str | None = None

    @property
    def raw(self) -> str:
        """The row as text, as near to the file as the format allows."""
        if self.text is not None:
            return self.text
        return json.dumps(self.values, ensure_ascii=True, default=str)


def read_rows(file: SourceFile) -> Iterator[SourceRow]:
    """The rows of a file in order, streamed (a JSON list is read whole).

    Raises:
        DataError: if the file as a whole cannot be read: not a list, no header, damaged.
    """
    location = Location(file.uri)
    readers = {"jsonl": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet, "text": _text}
    try:
        yield from readers[file.kind](location)
    except OSError as error:
        raise DataError(f"{location}: cannot be read: {error}") from None


def _open(location: Location) -> io.BufferedReader:
    return io.BufferedReader(location.filesystem.open_input_stream(location.path, compression="detect"), 1 << 20)


def _lines(location: Location) -> Iterator[tuple[int, str, str | None]]:
    """Place from 0, text and fault of every line that is not blank."""
    with _open(location) as stream:
        for place, data in enumerate(stream):
            line = data.removeprefix(b"\xef\xbb\xbf") if place == 0 else data
            if not line.strip():
                continue
            try:
                yield place, line.decode("utf-8").rstrip("\r\n"), None
            except UnicodeDecodeError as error:
                text = line.decode("utf-8", "replace").rstrip("\r\n")
                yield place, text, f"not UTF-8: byte 0x{line[error.start]:02x} at place {error.start + 1} of the line"


def _text(location: Location) -> Iterator[SourceRow]:
    for place, line, fault in _lines(location):
        yield SourceRow(place, None if fault else {"text": line}, place + 1, fault, line)


def _jsonl(location: Location) -> Iterator[SourceRow]:
    for place, line, fault in _lines(location):
        values, malformed = (None, fault) if fault else _object(line)
        yield SourceRow(place, values, place + 1, malformed, line)


def _object(line: str) -> tuple[dict[str, Any] | None, str | None]:
    """The JSON object in a line, or why there is none."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, f"malformed JSON: {_reason(error)}"
    if not isinstance(values, dict):
        return None, f"expected a JSON object, found {_json_kind(values)}"
    return _whole(values, line), None


def _json(location: Location) -> Iterator[SourceRow]:
    with _open(location) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
        content = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not UTF-8: byte 0x{data[error.start]:02x} at place {error.start + 1}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DataError(
                f"{location}:{error.lineno}: more follows the first JSON value; if it has a record a line, "
                "name the file .jsonl"
            ) from None
        raise DataError(f"{location}:{error.lineno}: malformed JSON: {_reason(error)}") from None
    except RecursionError:
        raise DataError(f"{location}: malformed JSON: nested too deep") from None
    if not isinstance(content, list):
        raise DataError(f"{location}: expected a JSON list of records, found {_json_kind(content)}")
    for place, values in enumerate(content):
        if isinstance(values, dict):
            yield SourceRow(place, _whole(values, text))
        else:
            fault = f"expected a JSON object, found {_json_kind(values)}"
            yield SourceRow(place, fault=fault, text=json.dumps(values))


def _csv(location: Location) -> Iterator[SourceRow]:
    csv.field_size_limit(1 << 30)
    with _open(location) as stream:
        reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{location}: has no header line with column names")
            _refuse_repeated(location, header)
            yield from _csv_rows(reader, header)
        except UnicodeDecodeError as error:
            where = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(f"{location}: not UTF-8: {where} behind line {reader.line_num}") from None
        except csv.Error as error:
            raise DataError(f"{location}:{reader.line_num}: malformed CSV: {error}") from None


def _csv_rows(reader: Any, header: list[str]) -> Iterator[SourceRow]:
    cells: list[str]
    for place, cells in enumerate(row for row in reader if row):
        if len(cells) != len(header):
            fault = f"ragged row: {len(cells)} cells where the header has {len(header)} columns"
            yield SourceRow(place, None, reader.line_num, fault, json.dumps(cells, ensure_ascii=False))
        else:
            yield SourceRow(place, dict(zip(header, cells, strict=True)), reader.line_num)


def _parquet(location: Location) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with location.filesystem.open_input_file(location.path) as stream:
            parquet = pq.ParquetFile(stream)
            _refuse_repeated(location, parquet.schema_arrow.names)
            place = 0
            for batch in parquet.iter_batches(batch_size=512):
                for values in batch.to_pylist():
                    yield SourceRow(place, values)
                    place += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location}: cannot be read as Parquet: {_reason(error)}") from None


def _refuse_repeated(location: Location, names: Iterable[str]) -> None:
    names = list(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{location}: has more than one column named {', '.join(map(repr, repeated))}")


def _whole(value: Any, raw: str) -> Any:
    """`value` with half surrogate pairs replaced, which JSON may escape but no text may hold."""
    return _mended(value) if "\\ud" in raw.lower() else value


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(key): _mended(item) for key, item in value.items()}
    return value


def _json_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true/false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
