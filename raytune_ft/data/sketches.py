"""Counts of bounded size that add up: whatever blocks rows came in, the sum of their sketches is the same."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_REGISTER_BITS = 14
_MOST_REPEATED = 0xFFFFFFFF


class DistinctCount:
    """How many different 64-bit hashes were added, within about 1% (HyperLogLog; Flajolet et al., 2007).

    16,384 registers; small counts are told by the empty ones (linear counting), as the paper has it.
    """

    def __init__(self, registers: NDArray[np.uint8] | None = None) -> None:
        self.registers = np.zeros(1 << _REGISTER_BITS, np.uint8) if registers is None else registers

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Counts hashes, which must be uniform over 64 bits."""
        if not len(hashes):
            return
        place = (hashes >> np.uint64(64 - _REGISTER_BITS)).astype(np.int64)
        rest = hashes << np.uint64(_REGISTER_BITS) | np.uint64((1 << _REGISTER_BITS) - 1)  # never all zero
        # Leading zeros: 63 minus the exponent, told on the upper half first, since a float has 53 bits.
        upper = (rest >> np.uint64(32)).astype(np.float64)
        lower = (rest & np.uint64(_MOST_REPEATED)).astype(np.float64)
        exponent = np.where(upper > 0, np.frexp(upper)[1] + 32, np.frexp(lower)[1])
        np.maximum.at(self.registers, place, (65 - exponent).astype(np.uint8))

    def update(self, other: DistinctCount) -> None:
        """Adds what another counted."""
        np.maximum(self.registers, other.registers, out=self.registers)

    @property
    def estimate(self) -> float:
        """The number of different hashes."""
        size = len(self.registers)
        raw = 0.7213 / (1 + 1.079 / size) * size**2 / np.exp2(-self.registers.astype(np.float64)).sum()
        empty = int((self.registers == 0).sum())
        return float(size * np.log(size / empty)) if raw <= 2.5 * size and empty else float(raw)

    def to_text(self) -> str:
        """The registers as text."""
        return self.registers.tobytes().hex()

    @classmethod
    def from_text(cls, text: str) -> DistinctCount:
        """What `to_text` wrote."""
        return cls(np.frombuffer(bytes.fromhex(text), np.uint8).copy())


class ValueCount:
    """How often each value occurs, exact for up to `most` different values.

    Of more, those with the lowest hashes are kept, with exact counts (bottom-k sampling; Cohen and Kaplan, 2007):
    which they are does not depend on the order or the blocks of the values. `total` counts all.
    """

    def __init__(self, most: int = 512) -> None:
        self.most = most
        self.counts: Counter[str] = Counter()
        self.total = 0
        self.complete = True

    def add(self, values: Iterable[str | None]) -> None:
        """Counts values; None is none."""
        self._merge(Counter(value for value in values if value is not None))

    def update(self, other: ValueCount) -> None:
        """Adds what another counted."""
        self.total += other.total - other.counts.total()
        self.complete &= other.complete
        self._merge(other.counts)

    def _merge(self, counts: Counter[str]) -> None:
        self.total += counts.total()
        self.counts.update(counts)
        if len(self.counts) > self.most:
            self.complete = False
            kept = heapq.nsmallest(self.most, self.counts, key=lambda value: xxhash.xxh64_intdigest(value.encode()))
            self.counts = Counter({value: self.counts[value] for value in kept})

    def __len__(self) -> int:
        """How many different values are kept."""
        return len(self.counts)

    @property
    def evenness(self) -> float | None:
        """Entropy over that of equally frequent values (Pielou, 1966): 1 where all are as frequent; None below two."""
        return evenness(list(self.counts.values()))

    def to_json(self) -> list[Any]:
        """What `from_json` reads."""
        return [self.most, self.counts, self.total, self.complete]

    @classmethod
    def from_json(cls, given: Sequence[Any]) -> ValueCount:
        """What `to_json` gave."""
        found = cls(given[0])
        found.counts, found.total, found.complete = Counter(given[1]), given[2], given[3]
        return found


class Histogram:
    """Counts of numbers in bins of one width from 0 on; the last of `bins` holds all that are higher."""

    def __init__(self, width: float, bins: int) -> None:
        self.width = width
        self.counts = np.zeros(bins, np.int64)

    def add(self, values: NDArray[np.float64]) -> None:
        """Counts numbers of 0 and more."""
        places = np.clip(np.floor(values / self.width), 0, len(self.counts) - 1).astype(np.int64)
        self.counts += np.bincount(places, minlength=len(self.counts))

    def median(self) -> float:
        """The middle of the bin with the median."""
        return (_weighted_median(self.counts) + 0.5) * self.width

    def deviation(self) -> float:
        """Median absolute deviation from the median, from the middles of the bins."""
        middle = _weighted_median(self.counts)
        distance = np.abs(np.arange(len(self.counts)) - middle)
        return _weighted_median(np.bincount(distance, weights=self.counts).astype(np.int64)) * self.width


def _weighted_median(counts: NDArray[np.int64]) -> int:
    below = np.cumsum(counts)
    return int(np.searchsorted(below, (int(below[-1]) + 1) // 2)) if below[-1] else 0


def evenness(counts: Sequence[int]) -> float | None:
    """Entropy of counts over the highest possible for as many values; None for fewer than two values."""
    there = np.array(sorted(count for count in counts if count), np.float64)  # in any order, the same to the last bit
    if len(there) < 2:
        return None
    share = there / there.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(there)))


def most_common(counts: Mapping[str, int], number: int) -> list[tuple[str, int]]:
    """The most frequent values with their counts; ties in the order of the values."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]
