"""Lines that are added to an open file, each of them whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class WholeLines:
    """Takes back what was written of a line that is not whole: the next one would go on from there."""

    def __init__(self) -> None:
        self._half_from: int | None = None

    @contextmanager
    def line(self, file: int) -> Iterator[None]:
        """Around the writing of a line to a file; behind the block it is on the disk.

        Raises:
            OSError: if the line, or what is left of the one before, cannot be written or taken back.
        """
        self._take_back(file)
        before = os.fstat(file).st_size
        try:
            yield
            os.fsync(file)
        except OSError:
            self._half_from = before
            with suppress(OSError):  # which says less than why the line could not be written
                self._take_back(file)
            raise

    def _take_back(self, file: int) -> None:
        if self._half_from is not None:
            if os.fstat(file).st_size > self._half_from:
                os.ftruncate(file, self._half_from)
            self._half_from = None
