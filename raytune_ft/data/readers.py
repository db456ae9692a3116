"""The rows in one source file, streamed on a worker; a fault names the row, an error the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from raytune_ft.core.errors import DataError, first_line
from raytune_ft.core.refusals import storage_errors, storage_reason
from raytune_ft.core.storage import Location
from raytune_ft.core.words import whole
from raytune_ft.data.hub import hub_rows
from raytune_ft.data.json_text import JsonFault, kind_in_words, list_items, parse
from raytune_ft.data.sources import SourceFile, compression_of

_BATCH_BYTES = 32 << 20
_BATCH_ROWS = 512
_MAGIC = {
    b"\x1f\x8b": "gzip-compressed; name it with .gz behind its name",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; name it with .zst behind its name",
    b"\xfd7zX": "xz-compressed; unpack it, or compress it anew with gzip, zstd or bzip2",
    b"BZh": "bzip2-compressed; name it with .bz2 behind its name",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"PAR1": "Parquet; name it .parquet",
    b"\xff\xfe": "UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8",
}
"""How files begin that are no UTF-8 text, and what to do with them."""


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
    """The rows of a file in order, streamed: in memory are a few rows (of a list, one item) at a time.

    Raises:
        DataError: if the file as a whole cannot be read: not a list, no header, damaged, no text, without any row.
    """
    location = Location(file.uri)
    rows = 0
    try:
        for row in _READERS[file.kind](location):
            yield row
            rows += 1
    except storage_errors() as error:
        raise DataError(f"{location}: cannot be read behind row {rows}: {storage_reason(error)}") from None
    if not rows and file.kind not in {"parquet", "arrow", "hub"}:  # those are written in parts, some of them empty
        raise DataError(f"{location}: holds no rows")


def _open(location: Location) -> io.BufferedReader:
    """The bytes of a text file, unpacked.

    Raises:
        DataError: if they begin like something else than UTF-8 text.
    """
    packed = compression_of(location.name)
    stream = io.BufferedReader(location.filesystem.open_input_stream(location.path, compression=packed), 1 << 20)
    head = stream.peek(4)[:4]
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"{location}: is {what}")
    if head.count(0) >= 2 and any(head):  # as every ASCII text in UTF-16 or UTF-32 begins
        raise DataError(f"{location}: is UTF-16 or UTF-32 without a mark that says so; convert it to UTF-8 with iconv")
    return stream


def _open_anywhere(location: Location) -> Any:
    """The bytes of a file that is not read from its beginning on.

    Raises:
        DataError: if a web server gives no parts of files.
    """
    stream = location.filesystem.open_input_file(location.path)
    try:
        stream.seek(0, 2)
        stream.seek(0)
    except ValueError:
        stream.close()
        raise DataError(f"{location}: its server gives no ranges of files; download it and give its path") from None
    return stream


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
        values = parse(line)
    except JsonFault as fault:
        return None, str(fault)
    if not isinstance(values, dict):
        return None, f"expected a JSON object, found {kind_in_words(values)}"
    return values, None


def _json(location: Location) -> Iterator[SourceRow]:
    try:
        with _open(location) as stream:
            for place, (line, value) in enumerate(list_items(stream.read1)):
                if isinstance(value, JsonFault):
                    yield SourceRow(place, None, line, str(value), value.text)
                elif isinstance(value, dict):
                    yield SourceRow(place, value, line)
                else:
                    fault = f"expected a JSON object, found {kind_in_words(value)}"
                    yield SourceRow(place, None, line, fault, json.dumps(value))
    except JsonFault as fault:
        where = f"{location}:{fault.line}" if fault.line else str(location)
        raise DataError(f"{where}: {fault}") from None


def _csv(location: Location) -> Iterator[SourceRow]:
    csv.field_size_limit(1 << 30)
    with _open(location) as stream:
        # Bytes that are no UTF-8 become surrogates, so that only their row is at fault.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        last = 0
        try:
            header = next(reader, None)
            if not header:
                raise DataError(f"{location}: has no header line with column names")
            fault = _undecoded(header, header)
            if fault:
                raise DataError(f"{location}:1: {fault} of the header; convert it to UTF-8: iconv -f LATIN1 -t UTF-8")
            _refuse_repeated(location, header)
            _refuse_other_separator(location, header)
            last = reader.line_num
            for row in _csv_rows(reader, header):
                yield row
                last = row.line or last
        except csv.Error as error:  # an open quote is noticed at the end only, so the line is that of its row
            raise DataError(f"{location}:{last + 1}: malformed CSV in the row that begins here: {error}") from None


def _csv_rows(reader: Any, header: list[str]) -> Iterator[SourceRow]:
    cells: list[str]
    for place, cells in enumerate(row for row in reader if row):
        fault = None
        if len(cells) != len(header):
            fault = f"ragged row: {len(cells)} cells where the header has {len(header)} columns"
        else:
            fault = _undecoded(header, cells)
        if fault:
            legible = [whole(cell) for cell in cells]
            yield SourceRow(place, None, reader.line_num, fault, json.dumps(legible, ensure_ascii=False))
        else:
            yield SourceRow(place, dict(zip(header, cells, strict=True)), reader.line_num)


def _undecoded(header: list[str], cells: list[str]) -> str | None:
    for name, cell in zip(header, cells, strict=True):
        if cell.isascii():
            continue
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"not UTF-8: byte 0x{ord(cell[error.start]) - 0xDC00:02x} in column {name!r}"
    return None


def _parquet(location: Location) -> Iterator[SourceRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = "its end, where the description of its columns should be"
    try:
        with _open_anywhere(location) as stream:
            parquet = pq.ParquetFile(stream)
            _refuse_repeated(location, parquet.schema_arrow.names)
            place = 0
            for group in range(parquet.num_row_groups):
                where = f"row group {group} of {parquet.num_row_groups} (rows from {place})"
                described = parquet.metadata.row_group(group)
                size = _rows_at_once(described.total_byte_size, described.num_rows)
                for batch in parquet.iter_batches(batch_size=size, row_groups=[group]):
                    for row in _batch_rows(batch, place):
                        yield row
                        place += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location}: cannot be read as Parquet at {where}: {first_line(error)}") from None


def _arrow(location: Location) -> Iterator[SourceRow]:
    """An Arrow stream, as `datasets` writes them, or an Arrow file."""
    import pyarrow as pa

    place = 0
    try:
        with _open_anywhere(location) as stream:
            for batch in _arrow_batches(stream):
                _refuse_repeated(location, batch.schema.names)
                size = _rows_at_once(batch.nbytes, batch.num_rows)
                for start in range(0, batch.num_rows, size):
                    for row in _batch_rows(batch.slice(start, size), place):
                        yield row
                        place += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location}: cannot be read as Arrow behind row {place}: {first_line(error)}") from None


def _batch_rows(batch: Any, place: int) -> Iterator[SourceRow]:
    """The rows of a batch, the first at `place`; a value that Python cannot hold is a fault of its row."""
    try:
        for at, values in enumerate(batch.to_pylist()):
            yield SourceRow(place + at, values)
    except (ValueError, OverflowError):  # no UTF-8, or a time out of range
        for at in range(batch.num_rows):
            yield _one_row(batch.slice(at, 1), place + at)


def _one_row(row: Any, place: int) -> SourceRow:
    values: dict[str, Any] = {}
    faults = []
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            faults.append(f"not UTF-8: byte 0x{error.object[error.start]:02x} in column {name!r}")
            values[name] = error.object.decode("utf-8", "replace")
        except (ValueError, OverflowError) as error:
            faults.append(f"out of range: a {column.type} in column {name!r}: {error}")
            values[name] = None
    if not faults:
        return SourceRow(place, values)
    return SourceRow(place, None, None, faults[0], json.dumps(values, ensure_ascii=False, default=str))


def _arrow_batches(stream: Any) -> Iterator[Any]:
    import pyarrow as pa

    if stream.read(6) == b"ARROW1":
        stream.seek(0)
        file = pa.ipc.open_file(stream)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    else:
        stream.seek(0)
        yield from pa.ipc.open_stream(stream)


def _rows_at_once(size: int, rows: int) -> int:
    """So many rows that they stay small as Python values, too, even where each has megabytes."""
    return max(1, min(_BATCH_ROWS, rows * _BATCH_BYTES // max(size, 1)))


def _hub(location: Location) -> Iterator[SourceRow]:
    for place, values in enumerate(hub_rows(location.uri)):
        yield SourceRow(place, values)


_READERS: dict[str, Callable[[Location], Iterator[SourceRow]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "text": _text,
    "hub": _hub,
}


def _refuse_repeated(location: Location, names: Iterable[str]) -> None:
    names = list(names)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{location}: has more than one column named {', '.join(map(repr, repeated))}")


def _refuse_other_separator(location: Location, header: list[str]) -> None:
    for sign, name in ((";", "';'"), ("\t", "tabs"), ("|", "'|'")):
        if len(header) == 1 and sign in header[0]:
            raise DataError(f"{location}:1: its columns are separated by {name}; write it anew with commas")
