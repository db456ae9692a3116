"""Is one model better than another on the same rows? Differences with their tests, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from raytune_ft.core.grammar import number_of
from raytune_ft.evaluation.statistics import (
    Columns,
    Floats,
    Statistic,
    fewest_differing_rows,
    holm,
    paired_interval,
    permutation_p_value,
    row_count,
    rows_needed,
    unseen_share,
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
    """Both ends are NaN where there is no interval: on an open scale where every row shows the same difference."""
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
    best: float | None = None,
) -> Difference:
    """Compares a model with another by a paired bootstrap (interval) and a paired permutation test (verdict).

    Where every row shows the same difference, the interval allows for rows that stayed unseen (`paired_interval`).

    Args:
        statistic: from sums of columns to the value.
        columns: of the model, one number a row under each name.
        others: the same of the other model, rows in the same order.
        scores: the rows' own scores of the two models, for wins, ties and losses.
        lower_is_better: as for perplexity.
        confidence: of the interval; the verdict needs p <= 1 - confidence.
        seed: of the resampling.
        best: the upper end of a scale that starts at 0; None for an open one.
    """
    own, their = scores
    with np.errstate(invalid="ignore"):
        gain = _rounded(*((their, own) if lower_is_better else (own, their)))
    wins, losses = int((gain > 0).sum()), int((gain < 0).sum())
    with np.errstate(invalid="ignore"):  # values beyond numbers, as an overflowed perplexity, cannot be told apart
        found = paired_interval(statistic, columns, others, confidence=confidence, seed=seed, best=best)
        alone = Difference(
            difference=float(statistic(_sums(columns)) - statistic(_sums(others))),
            low=found.low,
            high=found.high,
            confidence=confidence,
            standard_error=found.standard_error,
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

    Better or worse is said only if the corrected p-value allows it and the interval leaves out 0. Where there is no
    interval since every row shows the same difference, the test alone decides.
    """
    adjusted = holm([found.p_value for found in family])
    return [_judged(found, p, len(family)) for found, p in zip(family, adjusted, strict=True)]


def sentence(found: Difference, *, model: str, other: str, metric: str) -> str:
    """The verdict in words, with the numbers that carry it, and what it would take where they do not."""
    corrected = f" after Holm's correction for {found.tests} comparisons" if found.tests > 1 else ""
    span = interval_text(found)
    interval = f"no {found.confidence:.0%} interval" if span == "none" else f"{found.confidence:.0%} interval {span}"
    numbers = (
        f"difference {signed(found.difference)}, {interval}, p {stated(found.p_adjusted)}{corrected}; "
        f"{number_of(found.wins, 'row')} won, {found.ties} tied, {found.losses} lost"
    )
    if found.verdict == "cannot tell":
        words = f"{metric}: cannot tell {model} from {other} with {number_of(found.rows, 'row')} ({numbers})."
        return f"{words} {outlook(found)}".rstrip()
    return f"{metric}: {model} is {found.verdict} than {other} on {number_of(found.rows, 'row')} ({numbers})."


def outlook(found: Difference) -> str:
    """What it would take to tell the two apart."""
    if not math.isfinite(found.difference):
        return "A value is beyond numbers, so no number of rows would tell."
    if found.wins + found.losses == 0 and found.difference == 0:
        return "They score the same on every row, so how many rows it would take cannot be said."
    said = []
    if found.rows_to_tell is not None:
        said.append(f"If the difference is what it seems, {_rough(found.rows_to_tell)} rows would tell.")
    if found.visible_difference is not None:
        least = f"{found.visible_difference:.2g}"
        said.append(
            f"With {number_of(found.rows, 'row')} only a difference of {least} or more would show four times in five."
        )
    return " ".join(said)


def interval_text(found: Difference) -> str:
    """The interval with signs; ``none`` where there is none."""
    if math.isnan(found.low) or math.isnan(found.high):
        return "none"
    return f"{signed(found.low)} to {signed(found.high)}"


def signed(value: float) -> str:
    """A difference with its sign, to three decimals or, above 100, three digits."""
    return f"{value:+.3f}" if abs(value) < 100 else f"{value:+.3g}"


def _judged(found: Difference, p_adjusted: float, tests: int) -> Difference:
    alpha = 1 - found.confidence
    strictest = alpha / tests
    verdict: Verdict = "cannot tell"
    needed = None
    excluded = found.low > 0 or found.high < 0 or (math.isnan(found.low) and found.standard_error == 0)
    if p_adjusted <= alpha + 1e-12 and excluded:
        verdict = "better" if (found.difference > 0) is not found.lower_is_better else "worse"
    else:
        needed = _rows_to_tell(found, strictest)
    visible = visible_difference(found.standard_error, alpha=strictest) if 0 < found.standard_error < math.inf else None
    return replace(
        found, p_adjusted=p_adjusted, tests=tests, verdict=verdict, rows_to_tell=needed, visible_difference=visible
    )


def _rows_to_tell(found: Difference, alpha: float) -> int | None:
    """By the spread, by how rarely rows differ at all, and by those unseen; always more than there are."""
    needed = rows_needed(found.difference, found.standard_error, found.rows, alpha=alpha)
    if found.difference == 0 or not math.isfinite(found.difference):
        return None
    differing = max(1, found.wins + found.losses)
    enough_differ = fewest_differing_rows(alpha) * found.rows / differing
    return max(needed or 0, round(enough_differ), _rows_without_unseen(found), found.rows + 1)


def _rows_without_unseen(found: Difference) -> int:
    """With how many rows that all differ alike the unseen ones could no longer turn the difference round."""
    edge = found.low if found.difference > 0 else found.high
    if found.standard_error != 0 or math.isnan(edge):
        return 0
    unseen = unseen_share(found.rows, found.confidence)
    turning = unseen * found.difference / (found.difference - edge)  # the share that would move the edge to 0
    return math.ceil(math.log((1 - found.confidence) / 2) / math.log1p(-turning) - 1e-9)


def _sums(columns: Columns) -> Columns:
    return {name: np.asarray(np.sum(column)) for name, column in columns.items()}


def _rounded(own: Floats, their: Floats) -> Floats:
    """Differences with those that rounding alone makes set to 0."""
    gain = own - their
    return np.where(np.abs(gain) < 1e-9 * np.maximum(np.abs(own), np.abs(their)), 0.0, gain)


def stated(p: float) -> str:
    """A p-value behind the sign that it is stated with."""
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _rough(rows: int) -> str:
    """A number of rows to two digits: it is an estimate."""
    return f"about {float(f'{rows:.2g}'):,.0f}" if rows <= _MOST_ROWS else f"more than {_MOST_ROWS:,}"
