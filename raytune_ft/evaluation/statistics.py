"""Paired statistics over rows: bootstrap, permutation test, Holm's correction, and the power of a comparison.

Everything is stated for a `Statistic` of summed columns, so that corpus metrics (BLEU, perplexity) are resampled as
what they are. The same rows and seed give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]
Statistic = Callable[[Columns], Floats]
"""From summed columns to a value, elementwise over samples."""

Alternative = Literal["two-sided", "greater", "less"]

SAMPLES = 2000
PERMUTATIONS = 9999
MOST_BLOCKS = 5000
"""With more rows, random blocks of them are resampled, so that the time does not grow with the rows."""
POWER = 0.8
"""How often a comparison of the planned size is to see a difference that is there."""

_CHUNK = 2_000_000  # resampled rows held at once
_EXACT_UP_TO = 13  # differing rows whose 2^n sign patterns are all tried


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedInterval(Interval):
    """Of a difference: both ends are NaN where there is none, `standard_error` is 0 where no sample differs."""

    standard_error: float


def interval(
    statistic: Statistic, columns: Columns, *, confidence: float = 0.95, seed: int = 0, best: float | None = None
) -> Interval:
    """How far the value of one model would move, had other rows of the same kind been drawn.

    Where all samples agree (every row right), a bootstrap knows nothing of rows unlike those it has; with `best`, the
    interval then allows for a share of such rows that would have stayed unseen, which for a share of right rows is
    the interval of Clopper and Pearson (1934). On an open scale there is none (both ends are NaN).

    Args:
        statistic: from sums of `columns` to the value.
        columns: one number a row under each name.
        confidence: of the interval.
        seed: of the resampling.
        best: the upper end of a scale that starts at 0; None for an open one.
    """
    found = percentiles(bootstrap(statistic, columns, seed=seed), confidence)
    if found.high - found.low > 1e-12:
        return found
    if best is None:
        return Interval(math.nan, math.nan)
    unseen = unseen_share(row_count(columns), confidence)
    return Interval(found.low - unseen * found.low, found.high + unseen * (best - found.high))


def paired_interval(
    statistic: Statistic,
    columns: Columns,
    others: Columns,
    *,
    confidence: float,
    seed: int,
    best: float | None,
) -> PairedInterval:
    """How far the difference of two models would move, had other rows of the same kind been drawn.

    Where all samples agree (one row, or the same difference on every row), a bootstrap knows nothing of rows unlike
    those it has. The interval then allows for a share of such rows that would have stayed unseen, with differences
    from -`best` to `best`, as `interval` does. Of rows that are all right against wrong, it leaves out 0 from the
    number of rows on at which a two-sided sign test rejects: six, at 95%. On an open scale there is no interval.

    Args:
        statistic: from sums of columns to the value.
        columns: of the model, one number a row under each name.
        others: the same of the other model, rows in the same order.
        confidence: of the interval.
        seed: of the resampling.
        best: the upper end of a scale that starts at 0; None for an open one.
    """
    own, their = (bootstrap(statistic, side, seed=seed) for side in (columns, others))
    samples = own - their
    found = percentiles(samples, confidence)
    if not np.ptp(samples) <= 1e-12 * max(np.abs(own).max(), np.abs(their).max()):  # rounding aside; NaN is no spread
        return PairedInterval(found.low, found.high, float(np.std(samples)))
    if best is None:
        return PairedInterval(math.nan, math.nan, 0.0)
    unseen = unseen_share(row_count(columns), confidence)
    return PairedInterval(found.low - unseen * (best + found.low), found.high + unseen * (best - found.high), 0.0)


def unseen_share(rows: int, confidence: float) -> float:
    """The largest share of rows of some kind of which so many rows may hold none, by a two-sided interval."""
    return float(1 - ((1 - confidence) / 2) ** (1 / rows))


def bootstrap(statistic: Statistic, columns: Columns, *, seed: int = 0) -> Floats:
    """The statistic of `SAMPLES` resamples of the rows; which rows are drawn depends on their number and seed alone."""
    table = _blocks(np.stack([np.asarray(column, float) for column in columns.values()], axis=1), seed)
    sums = np.concatenate([counts @ table for counts in _draws(len(table), seed)])  # [samples, columns]
    return statistic({name: sums[:, place] for place, name in enumerate(columns)})


def permutation_p_value(
    statistic: Statistic, columns: Columns, others: Columns, *, alternative: Alternative = "two-sided", seed: int = 0
) -> float:
    """How often a difference this large comes up when the two models' results of each row are swapped at random.

    Exact where up to 13 rows differ (all swaps are tried); else by 9999 random swaps, with the observed one counted in
    (Phipson and Smyth 2010). 1.0 where no row differs, or the difference is beyond numbers.

    Args:
        statistic: from sums of columns to the value.
        columns: of the model, one number a row under each name.
        others: the same of the other model, rows in the same order.
        alternative: ``greater`` asks whether the model's value is above the other's.
        seed: of the swaps.
    """
    own, their = (
        _blocks(np.stack([np.asarray(side[name], float) for name in columns], axis=1), seed)
        for side in (columns, others)
    )
    gaps = their - own  # [rows, columns]
    gaps = gaps[np.any(gaps != 0, axis=1)]
    if not len(gaps):
        return 1.0

    def values(swapped: Floats) -> tuple[Floats, Floats]:
        """Of both models, for each pattern [patterns, rows] of swapped rows."""
        moved = swapped @ gaps
        first, second = own.sum(axis=0) + moved, their.sum(axis=0) - moved
        return statistic(dict(zip(columns, first.T, strict=True))), statistic(dict(zip(columns, second.T, strict=True)))

    value, other = (float(found[0]) for found in values(np.zeros((1, len(gaps)))))
    if not math.isfinite(observed := value - other):
        return 1.0
    slack = 1e-9 * abs(observed) + 1e-12 * max(abs(value), abs(other))
    exact = len(gaps) <= _EXACT_UP_TO
    patterns = _all_swaps(len(gaps)) if exact else _random_swaps(len(gaps), seed)
    extreme = total = 0
    for swapped in patterns:
        first, second = values(swapped)
        with np.errstate(invalid="ignore"):
            found = first - second
        extreme += int(_at_least(found, observed, alternative, slack).sum())
        total += len(found)
    return extreme / total if exact else (extreme + 1) / (total + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that, of all these tests together, a false finding is as rare as for one (Holm 1979)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for place, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, p_values[number] * (len(p_values) - place)))
        adjusted[number] = largest
    return adjusted


def rows_needed(difference: float, standard_error: float, rows: int, *, alpha: float) -> int | None:
    """How many rows a two-sided test at `alpha` needs to see this difference four times in five.

    From the normal approximation: the standard error shrinks with the root of the rows.

    Args:
        difference: that is assumed to be there.
        standard_error: of the difference, measured on `rows` rows.
        rows: measured on.
        alpha: level of the test.

    Returns:
        The number of rows; None where the difference is 0, a bootstrap saw no spread, or a value is beyond numbers (a
        perplexity that overflowed).
    """
    if difference == 0 or standard_error == 0 or not math.isfinite(difference + standard_error):
        return None
    errors = min(_reach(alpha) * standard_error / abs(difference), 1e9)
    return math.ceil(rows * errors**2)


def visible_difference(standard_error: float, *, alpha: float) -> float:
    """The least difference that a two-sided test at `alpha` sees four times in five."""
    return _reach(alpha) * standard_error


def fewest_differing_rows(alpha: float) -> int:
    """With how many differing rows, all in one direction, a two-sided sign test can reject: 2 / 2^n <= alpha."""
    return math.ceil(1 - math.log2(alpha) - 1e-9)


def percentiles(values: Floats, confidence: float) -> Interval:
    """The middle `confidence` of the values."""
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):  # between two infinities lies no number
        low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def row_count(columns: Columns) -> int:
    """How many rows the columns have."""
    return len(next(iter(columns.values())))


def _reach(alpha: float) -> float:
    """How many standard errors a difference has to be away from 0, to be seen with `POWER`."""
    from scipy.stats import norm

    return float(norm.ppf(1 - alpha / 2) + norm.ppf(POWER))


def _blocks(table: Floats, seed: int) -> Floats:
    """The rows [rows, columns], or, of many, the sums of `MOST_BLOCKS` random blocks of them.

    Blocks of rows that were drawn independently may be resampled, and swapped, in the place of rows; with so many, the
    spread is still right to 2%.
    """
    rows = len(table)
    if rows <= MOST_BLOCKS:
        return table
    order = np.random.default_rng([seed, rows, MOST_BLOCKS]).permutation(rows)
    starts = np.arange(MOST_BLOCKS) * rows // MOST_BLOCKS
    return np.asarray(np.add.reduceat(table[order], starts, axis=0))


def _draws(rows: int, seed: int) -> Iterator[Floats]:
    """How often each row is drawn in each sample, as [samples, rows], in chunks."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(SAMPLES, _CHUNK // rows))
    for start in range(0, SAMPLES, chunk):
        size = min(chunk, SAMPLES - start)
        drawn = generator.integers(0, rows, size=(size, rows)) + np.arange(size)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(float)


def _all_swaps(rows: int) -> Iterator[Floats]:
    yield ((np.arange(2**rows)[:, None] >> np.arange(rows)) & 1).astype(float)


def _random_swaps(rows: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng([seed, rows])
    chunk = max(1, min(PERMUTATIONS, _CHUNK // rows))
    for start in range(0, PERMUTATIONS, chunk):
        size = min(chunk, PERMUTATIONS - start)
        bits = np.frombuffer(generator.bytes(size * (-(-rows // 8))), np.uint8).reshape(size, -1)
        yield np.unpackbits(bits, axis=1, count=rows).astype(float)


def _at_least(found: Floats, observed: float, alternative: Alternative, slack: float) -> NDArray[np.bool_]:
    """Which differences are as extreme as the observed one, `slack` for rounding aside."""
    if alternative == "greater":
        return found >= observed - slack
    if alternative == "less":
        return found <= observed + slack
    return np.abs(found) >= abs(observed) - slack
