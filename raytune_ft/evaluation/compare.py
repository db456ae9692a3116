"""Is one model better than another on the same rows? Differences with their tests, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raytune_ft.evaluation.statistics import (
    Columns,
    Floats,
    Statistic,
    bootstrap,
    fewest_differing_rows,
    holm,
    percentiles,
    permutation_p_value,
    row_count,
    rows_needed,
    visible_difference,
)

Verdict = Literal["better", "worse", "cannot tell"]

_MOST_ROWS = 10_000_000
"""Above, how many rows it would take is no longer worth a number."""


@dataclass(frozen=True)
class Difference:
    """What a model gains over another on the same rows: `difference` is its value minus the other's."""

    difference: float
    low: float
    high: float
    confidence: float
    standard_error: float
    wins: int
    ties: int
    losses: int
    lower_is_better: bool
    p_value: float
    """Of the paired permutation test, this comparison alone."""
    p_adjusted: float
    """The same after Holm's correction for all `tests` comparisons that were made together."""
    tests: int
    verdict: Verdict
    rows_to_tell: int | None
    """How many rows would tell, were the difference what it seems (80% power); None where they already do."""
    visible_difference: float | None
    """The least difference that this many rows show four times in five; None where the rows show no spread."""

    @property
    def rows(self) -> int:
        """Rows that both models answered."""
        return self.wins + self.ties + self.losses


def difference(
    statistic: Statistic,
    columns: Columns,
    others: Columns,
    *,
    scores: tuple[Floats, Floats],
    lower_is_better: bool = False,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """Compares a model with another by a paired bootstrap (interval) and a paired permutation test (verdict).

    Args:
        statistic: from sums of columns to the value.
        columns: of the model, one number a row under each name.
        others: the same of the other model, rows in the same order.
        scores: the rows' own scores of the two models, for wins, ties and losses.
        lower_is_better: as for perplexity.
        confidence: of the interval; the verdict needs p <= 1 - confidence.
        seed: of the resampling.
    """
    own, their = scores
    with np.errstate(invalid="ignore"):
        gain = _rounded(*((their, own) if lower_is_better else (own, their)))
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    with np.errstate(invalid="ignore"):  # values beyond numbers, as an overflowed perplexity, cannot be told apart
        samples = bootstrap(statistic, columns, seed=seed) - bootstrap(statistic, others, seed=seed)
        found = percentiles(samples, confidence)
        alone = Difference(
            difference=float(statistic(_sums(columns)) - statistic(_sums(others))),
            low=found.low,
            high=found.high,
            confidence=confidence,
            standard_error=float(np.std(samples)),
            wins=wins,
            ties=row_count(columns) - wins - losses,
            losses=losses,
            lower_is_better=lower_is_better,
            p_value=permutation_p_value(statistic, columns, others, seed=seed),
            p_adjusted=1.0,
            tests=1,
            verdict="cannot tell",
            rows_to_tell=None,
            visible_difference=None,
        )
    return judged([alone])[0]


def judged(family: Sequence[Difference]) -> list[Difference]:
    """The differences with their verdicts, corrected (Holm) for being one family of tests.

    Better or worse is said only if the corrected p-value allows it and the interval leaves out 0.
    """
    adjusted = holm([found.p_value for found in family])
    return [_judged(found, p, len(family)) for found, p in zip(family, adjusted, strict=True)]


def sentence(found: Difference, *, model: str, other: str, metric: str) -> str:
    """The verdict in words, with the numbers that carry it, and what it would take where they do not."""
    corrected = f" after Holm's correction for {found.tests} comparisons" if found.tests > 1 else ""
    numbers = (
        f"difference {signed(found.difference)}, {found.confidence:.0%} interval {signed(found.low)} to "
        f"{signed(found.high)}, p {_probability(found.p_adjusted)}{corrected}; {found.wins} rows won, "
        f"{found.ties} tied, {found.losses} lost"
    )
    if found.verdict == "cannot tell":
        words = f"{metric}: cannot tell {model} from {other} with {found.rows} rows ({numbers})."
        return f"{words} {outlook(found)}"
    return f"{metric}: {model} is {found.verdict} than {other} on {found.rows} rows ({numbers})."


def outlook(found: Difference) -> str:
    """What it would take to tell the two apart."""
    if found.wins + found.losses == 0 and found.difference == 0:
        return "They score the same on every row, so how many rows it would take cannot be said."
    said = []
    if found.rows_to_tell is not None:
        said.append(f"If the difference is what it seems, {_rough(found.rows_to_tell)} rows would tell.")
    if found.visible_difference is not None:
        least = f"{found.visible_difference:.2g}"
        said.append(f"With {found.rows} rows only a difference of {least} or more would show four times in five.")
    return " ".join(said)


def signed(value: float) -> str:
    """A difference with its sign, to three decimals or, above 100, three digits."""
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+.3g}"


def _judged(found: Difference, p_adjusted: float, tests: int) -> Difference:
    alpha = 1 - found.confidence
    strictest = alpha / tests
    verdict: Verdict = "cannot tell"
    needed = None
    if p_adjusted <= alpha + 1e-12 and (found.low > 0 or found.high < 0):
        verdict = "better" if (found.difference > 0) is not found.lower_is_better else "worse"
    else:
        needed = _rows_to_tell(found, strictest)
    visible = visible_difference(found.standard_error, alpha=strictest) if 0 < found.standard_error < math.inf else None
    return replace(
        found, p_adjusted=p_adjusted, tests=tests, verdict=verdict, rows_to_tell=needed, visible_difference=visible
    )


def _rows_to_tell(found: Difference, alpha: float) -> int | None:
    """By the spread, and by how rarely rows differ at all; always more than there are."""
    needed = rows_needed(found.difference, found.standard_error, found.rows, alpha=alpha)
    if found.difference == 0:
        return None
    differing = max(1, found.wins + found.losses)
    enough_differ = fewest_differing_rows(alpha) * found.rows / differing
    return max(needed or 0, round(enough_differ), found.rows + 1)


def _sums(columns: Columns) -> Columns:
    return {name: np.asarray(np.sum(column)) for name, column in columns.items()}


def _rounded(own: Floats, their: Floats) -> Floats:
    """Differences with those that rounding alone makes set to 0."""
    gain = own - their
    return np.where(np.abs(gain) < 1e-9 * np.maximum(np.abs(own), np.abs(their)), 0.0, gain)


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _rough(rows: int) -> str:
    """A number of rows to two digits: it is an estimate."""
    return f"about {float(f'{rows:.2g}'):,.0f}" if rows <= _MOST_ROWS else f"more than {_MOST_ROWS:,}"
