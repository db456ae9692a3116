"""What storage does not take of a search: Ray Tune would log it and try again, for ever; here it ends the search.

Apart from `progress` because it is Ray Tune's file system and its log, not its trials, that tell of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import fs

from raytune_ft.core.refusals import not_stored
from raytune_ft.core.storage import Location, whole_file

_LOGS = ("ray.tune.execution.tune_controller", "ray.tune.execution.experiment_state")
_UNASKED = "RAY_IGNORE_UNHANDLED_ERRORS"
_noted: list[Exception] = []  # by threads of Ray's, which nobody asks how they ended


def for_ray(folder: Location) -> tuple[str, Any]:
    """Path and file system as Ray Tune takes them; a local file is there as a whole, or as it was before.

    Ray itself writes the state of a search over the one before: where it is killed, or the disk full, both are lost.
    """
    return (folder.path, fs.PyFileSystem(_WholeFiles())) if folder.is_local else folder.for_ray


@contextmanager
def told_of() -> Iterator[None]:
    """Within the block, what storage does not take is kept for `raise_noted`; Ray Tune's tracebacks of it are not said.

    Raises:
        Exception: in the end, what storage did not take of the last state.
    """
    _noted.clear()
    logs, silence = [logging.getLogger(name) for name in _LOGS], _Silence()
    for log in logs:
        log.addFilter(silence)
    try:
        yield
        raise_noted()
    finally:
        for log in logs:
            log.removeFilter(silence)


def raise_noted() -> None:
    """Ends a search of which storage did not take something.

    Raises:
        Exception: what the system said.
    """
    if _noted:
        os.environ.setdefault(_UNASKED, "1")  # other trials meet the same, and nobody asks any more
        raise _noted[0]


class _Silence(logging.Filter):
    """Keeps tracebacks of what storage did not take out of Ray Tune's log: it is told in words in the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is said."""
        cause = not_stored(record.exc_info[1]) if record.exc_info else None
        if cause is not None:
            _noted.append(cause)
        return cause is None


class _WholeFiles(fs.FSSpecHandler):  # type: ignore[misc]  # pyarrow's classes count as Any
    """Local files, each of which nobody finds by its name before all of it is there."""

    def __init__(self) -> None:
        super().__init__(LocalFileSystem())

    def __reduce__(self) -> tuple[Any, ...]:
        return _WholeFiles, ()

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """A file to write, as pyarrow has it."""
        return pa.PythonFile(_Writing(Path(path)), mode="w")


class _Writing:
    """A file on its way, as Python has it."""

    def __init__(self, path: Path) -> None:
        self.closed, self._whole = False, whole_file(path)
        with _noting():
            self._file = self._whole.__enter__()

    def write(self, content: Any) -> int:
        """Takes a part of it."""
        with _noting():
            try:
                return self._file.write(content)
            except OSError as error:
                self._end(error)
                raise

    def flush(self) -> None:
        """Does nothing: before the end nobody reads it."""

    def close(self) -> None:
        """Puts the file where its name says, unless a part was refused."""
        with _noting():
            self._end(None)

    def _end(self, error: OSError | None) -> None:
        if not self.closed:
            self.closed = True
            self._whole.__exit__(type(error) if error else None, error, None)


@contextmanager
def _noting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not_stored(error) is not None:
            _noted.append(error)
        raise
