"""Sequences that lie on this machine's disk, for what is as long as the data: in memory are 8 bytes an item."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")


class Spool(Sequence[T]):
    """The items of an iterable, in an unnamed temporary file that ends with this object; a slice is a tuple.

    Equal to any sequence of equal items. Pickled, and so sent to another process, it is the tuple of its items.
    """

    def __init__(self, items: Iterable[T], encode: Callable[[T], Any], decode: Callable[[Any], T]) -> None:
        """Takes all items.

        Args:
            items: of any number; one at a time is in memory.
            encode: an item as a value that JSON can say.
            decode: the item again.

        Raises:
            OSError: if the disk of the temporary folder (``TMPDIR``) is full.
        """
        self._decode = decode
        self._file = tempfile.TemporaryFile(prefix="raytune-ft-")  # noqa: SIM115 - open as long as this object is
        self._ends = array("q", [0])
        for item in items:
            line = json.dumps(encode(item), ensure_ascii=False).encode("utf-8", "surrogatepass")
            self._file.write(line)
            self._ends.append(self._ends[-1] + len(line))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> tuple[T, ...]: ...

    def __getitem__(self, place: int | slice) -> T | tuple[T, ...]:
        if isinstance(place, slice):
            return tuple(self[number] for number in range(*place.indices(len(self))))
        number = range(len(self))[place]
        start, end = self._ends[number], self._ends[number + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        return self._decode(json.loads(line.decode("utf-8", "surrogatepass")))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(own == their for own, their in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} items on disk>"

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)


class Places(Mapping[int, dict[str, Any]]):
    """Rows by their ``position``, on disk; of two rows of one position the later counts."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        """Takes all rows; `position` is not negative."""
        positions = array("q")

        def noted() -> Iterator[dict[str, Any]]:
            for row in rows:
                positions.append(row["position"])
                yield row

        self._rows: Spool[dict[str, Any]] = Spool(noted(), _itself, _itself)
        taken = np.frombuffer(positions, np.int64) if positions else np.empty(0, np.int64)
        self._numbers = np.full(taken.max(initial=-1) + 1, -1)
        self._numbers[taken] = np.arange(len(taken))

    def __len__(self) -> int:
        return int((self._numbers >= 0).sum())

    def __iter__(self) -> Iterator[int]:
        return (int(place) for place in np.flatnonzero(self._numbers >= 0))

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and 0 <= place < len(self._numbers) and self._numbers[place] >= 0

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place not in self:
            raise KeyError(place)
        return self._rows[int(self._numbers[place])]


def _itself(value: Any) -> Any:
    return value
