"""Is one model better than another on the same rows? Paired bootstrap intervals, counts, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[np.float64]]
Statistic = Callable[[Columns], NDArray[np.float64]]
"""From summed columns to a value, elementwise over samples."""

Verdict = Literal["better", "worse", "cannot tell"]

_SAMPLES = 2000
_CHUNK = 2_000_000  # resampled counts held at once


@dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """What a model gains over another on the same rows: `difference` is its value minus the other's."""

    difference: float
    low: float
    high: float
    confidence: float
    wins: int
    ties: int
    losses: int
    verdict: Verdict

    @property
    def rows(self) -> int:
        """Rows that both models answered."""
        return self.wins + self.ties + self.losses


def interval(statistic: Statistic, columns: Columns, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """How far the value of one model would move, had other rows of the same kind been drawn.

    Args:
        statistic: from sums of `columns` to the value.
        columns: one number a row under each name.
        confidence: of the interval.
        seed: of the resampling.
    """
    return _percentiles(statistic(_resampled(columns, seed)), confidence)


def difference(
    statistic: Statistic,
    columns: Columns,
    others: Columns,
    *,
    scores: tuple[NDArray[np.float64], NDArray[np.float64]],
    lower_is_better: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compares a model with another by a paired bootstrap: each sample draws the same rows for both.

    The verdict is better or worse only if the interval leaves out 0 and enough rows differ for a two-sided sign test
    to be able to reject at this confidence (6 rows at 95%): a bootstrap of a handful of rows is too sure of itself.

    Args:
        statistic: from sums of columns to the value.
        columns: of the model, one number a row under each name.
        others: the same of the other model, rows in the same order.
        scores: the rows' own scores of the two models, for wins, ties and losses.
        lower_is_better: as for perplexity.
        confidence: of the interval.
        seed: of the resampling.
    """
    own, their = scores
    gain = _rounded(their - own if lower_is_better else own - their)
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    value = float(statistic(_sums(columns)) - statistic(_sums(others)))
    found = _percentiles(statistic(_resampled(columns, seed)) - statistic(_resampled(others, seed)), confidence)
    verdict: Verdict = "cannot tell"
    enough = wins + losses >= rows_to_tell(confidence)
    if enough and (found.low > 0 or found.high < 0):
        verdict = "better" if (value > 0) is not lower_is_better else "worse"
    return Difference(value, found.low, found.high, confidence, wins, len(gain) - wins - losses, losses, verdict)


def rows_to_tell(confidence: float) -> int:
    """Fewest differing rows with which a two-sided sign test can reject: the least n with 2 / 2^n <= 1 - confidence."""
    return math.ceil(1 - math.log2(1 - confidence))


def sentence(found: Difference, *, model: str, other: str, metric: str) -> str:
    """The verdict in words, with the numbers that carry it."""
    numbers = (
        f"difference {signed(found.difference)}, {found.confidence:.0%} interval {signed(found.low)} to "
        f"{signed(found.high)}; {found.wins} rows won, {found.ties} tied, {found.losses} lost"
    )
    if found.verdict == "cannot tell":
        return f"{metric}: cannot tell {model} from {other} with {found.rows} rows ({numbers})."
    return f"{metric}: {model} is {found.verdict} than {other} on {found.rows} rows ({numbers})."


def signed(value: float) -> str:
    """A difference with its sign, to three decimals or, above 100, three digits."""
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+.3g}"


def _sums(columns: Columns) -> Columns:
    return {name: np.asarray(np.sum(column)) for name, column in columns.items()}


def _resampled(columns: Columns, seed: int) -> Columns:
    """Sums of the columns over rows drawn with replacement, one a sample; the draws depend on rows and seed alone."""
    table = np.stack([np.asarray(column, float) for column in columns.values()], axis=1)  # [rows, columns]
    sums = np.concatenate([counts @ table for counts in _draws(len(table), seed)])  # [samples, columns]
    return {name: sums[:, place] for place, name in enumerate(columns)}


def _draws(rows: int, seed: int) -> Iterator[NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    chunk = max(1, min(_SAMPLES, _CHUNK // rows))
    for start in range(0, _SAMPLES, chunk):
        size = min(chunk, _SAMPLES - start)
        yield generator.multinomial(rows, np.full(rows, 1 / rows), size=size).astype(float)


def _percentiles(values: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _rounded(gain: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences with those that rounding alone makes set to 0."""
    return np.where(np.abs(gain) < 1e-9, 0.0, gain)
