"""Which values of which tensors lie where: pure arithmetic, so that any number of ranks can read what others wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Consecutive values of a flattened tensor, with the shape of the whole and the place of the first in it."""

    shape: tuple[int, ...]
    start: int
    values: Tensor
    """One-dimensional."""


@dataclass(frozen=True)
class Stored:
    """A slice on storage: values `start` to `start + count` of the flattened whole are in `file`."""

    file: str
    start: int
    count: int


@dataclass(frozen=True)
class Piece:
    """What is read of a stored slice (`count` values from its own `first`), and where it goes in what was wanted."""

    file: str
    first: int
    count: int
    goes_to: int


def share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and number of a rank's values, where each of `count` values belongs to one rank, as evenly as can be."""
    start, end = count * rank // world_size, count * (rank + 1) // world_size
    return start, end - start


def pieces(stored: Iterable[Stored], start: int, count: int) -> list[Piece]:
    """How values `start` to `start + count` of a whole are put together from slices of it; each is read once.

    Raises:
        ValueError: if some of the values are in no slice.
    """
    found, place = [], start
    for slice_ in sorted(stored, key=lambda slice_: (slice_.start, -slice_.count)):
        end = min(slice_.start + slice_.count, start + count)
        if slice_.start <= place < end:
            found.append(Piece(slice_.file, place - slice_.start, end - place, place - start))
            place = end
    if place < start + count:
        raise ValueError(f"values {place} to {start + count} are in no file")
    return found
