"""A gate: has a model kept, or bettered, a metric of another on the same rows, with the confidence asked for?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raytune_ft.core.errors import ConfigError, DataError
from raytune_ft.core.grammar import number_of
from raytune_ft.evaluation.compare import signed
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.joining import evaluated_models, same_rows
from raytune_ft.evaluation.measurement import columns_of
from raytune_ft.evaluation.metrics import make_metric
from raytune_ft.evaluation.results import EvaluationResult, ModelScores, leading_metric
from raytune_ft.evaluation.row_metric import Columns, RowMetric
from raytune_ft.evaluation.statistics import paired_interval, permutation_p_value


@dataclass(frozen=True)
class GateDecision:
    """Whether the gate opens, and the numbers behind it; true in a condition exactly if it does."""

    passed: bool
    metric: EvaluationMetric
    model: str
    other: str
    value: float
    other_value: float
    gain: float
    """How much better the model is, in the metric's own units (for perplexity: how much lower)."""
    least_gain: float
    """The one-sided bound: with the asked confidence the gain is at least this."""
    max_drop: float
    confidence: float
    rows: int
    words: str

    def __bool__(self) -> bool:
        return self.passed


def gate(
    model: ModelScores,
    other: ModelScores,
    metric: EvaluationMetric,
    *,
    max_drop: float = 0.0,
    confidence: float = 0.95,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> GateDecision:
    """Whether `model` is better than `other` (`max_drop` 0), or worse by less than `max_drop`, at this confidence.

    One-sided: the lower bootstrap bound of the gain must lie above -`max_drop`; where every row shows the same gain, it
    allows for rows that stayed unseen (`paired_interval`). Without a drop allowed, a one-sided permutation test has to
    reject, too. With one, there must be enough rows that a model with a share `max_drop` of ruined rows would not have
    gone unseen: (1 - max_drop)^rows <= 1 - confidence. Where a gain is sure, or the scale is open, it takes as many
    rows as let a sign test reject (five, at 95%).

    Args:
        model: the candidate.
        other: what it has to hold against.
        metric: that both were measured with.
        max_drop: in the metric's own units, 0 or more.
        confidence: from 0.5 up to, but not, 1.
        seed: of the resampling.
        settings: of the evaluation, where the metric reads answers by them (extraction, schema, functions).

    Raises:
        ConfigError: if `max_drop` or `confidence` is out of range.
        DataError: if the two were not measured on the same rows, or not with this metric.
    """
    _refuse_out_of_range(max_drop, confidence)
    other = same_rows(model, other)
    for scores in (model, other):
        if metric.facts.headline not in scores.values:
            raise DataError(f"{metric}: was not measured of {scores.label}; evaluate with this metric, or name another")
    measure = make_metric(metric, settings or {})
    own, their = columns_of(model, measure), columns_of(other, measure)
    value, other_value = (_checked(scores, measure, side) for scores, side in ((model, own), (other, their)))
    sign = -1.0 if metric.facts.lower_is_better else 1.0
    gain = sign * (value - other_value)
    least = _least_gain(gain, measure, own, their, confidence=confidence, seed=seed)
    rows = len(model.answers)
    reason = _short_of(gain, least, rows, metric, max_drop=max_drop, confidence=confidence)
    if not reason and max_drop == 0:
        reason = _by_chance(measure, own, their, confidence=confidence, seed=seed)
    decision = GateDecision(
        passed=not reason,
        metric=metric,
        model=model.label,
        other=other.label,
        value=value,
        other_value=other_value,
        gain=gain,
        least_gain=least,
        max_drop=max_drop,
        confidence=confidence,
        rows=rows,
        words="",
    )
    return replace(decision, words=_words(decision, reason))


def _refuse_out_of_range(max_drop: float, confidence: float) -> None:
    if not (0 <= max_drop < math.inf):
        raise ConfigError(f"max_drop: must be 0 or more (got {max_drop:g})")
    if not (0.5 <= confidence < 1):
        raise ConfigError(f"confidence: must be at least 0.5 and below 1 (got {confidence:g})")


def _least_gain(
    gain: float, measure: RowMetric, own: Columns, their: Columns, *, confidence: float, seed: int
) -> float:
    """The lower bound of the gain; the gain itself where all rows of an open scale agree on it."""
    facts = measure.name_in_settings.facts
    with np.errstate(invalid="ignore"):  # infinity minus infinity is no number, and does not pass
        found = paired_interval(measure.headline, own, their, confidence=2 * confidence - 1, seed=seed, best=facts.best)
    if math.isnan(found.low) and found.standard_error == 0:
        return gain
    return -found.high if facts.lower_is_better else found.low


def _short_of(
    gain: float, least: float, rows: int, metric: EvaluationMetric, *, max_drop: float, confidence: float
) -> str:
    """Why a gain of at least `least` on so many rows does not pass; empty if it does."""
    if not math.isfinite(least):
        return "which is no number to go by: a value is beyond numbers, as an overflowed perplexity is"
    needed = rows_to_see(max_drop, metric.facts.best, confidence)
    if least > 0:
        needed = min(needed, _rows_of_sign_test(confidence))
    if rows < needed and (gain == 0 or least > -max_drop):
        return f"but {number_of(rows, 'row is', 'rows are')} too few to see a drop of {max_drop:g}; it takes {needed}"
    if least <= -max_drop:
        return f"that is not above {signed(-max_drop) if max_drop else '0'}"
    return ""


def _by_chance(measure: RowMetric, own: Columns, their: Columns, *, confidence: float, seed: int) -> str:
    """Why a one-sided permutation test does not call `own` better; empty if it does."""
    alternative = "less" if measure.name_in_settings.facts.lower_is_better else "greater"
    p_value = permutation_p_value(measure.headline, own, their, alternative=alternative, seed=seed)  # type: ignore[arg-type]
    if p_value > 1 - confidence + 1e-12:
        return f"but a permutation test finds it by chance with p = {p_value:.3f}"
    return ""


def gate_results(
    result: EvaluationResult,
    other: EvaluationResult,
    metric: EvaluationMetric | str | None = None,
    *,
    max_drop: float = 0.0,
    confidence: float = 0.95,
) -> GateDecision:
    """The gate between the evaluated models of two reports; `metric` is the strictest of the first by default.

    Raises:
        ConfigError: if the metric is unknown or a number out of range.
        DataError: if the reports are not of the same rows, or one lacks the metric.
    """
    try:
        taken = leading_metric(result) if metric is None else EvaluationMetric(metric)
    except ValueError:
        known = ", ".join(EvaluationMetric)
        raise ConfigError(f"metric: there is no metric {metric!r}; known: {known}") from None
    first, second = evaluated_models([result, other])
    return gate(
        first,
        second,
        taken,
        max_drop=max_drop,
        confidence=confidence,
        seed=int(result.settings["seed"]),
        settings=result.settings,
    )


def rows_to_see(max_drop: float, best: float | None, confidence: float) -> int:
    """With how many rows a share `max_drop` / `best` of ruined ones shows up at least once, at this confidence.

    On an open scale, where one row may ruin any mean: with how many a sign test can reject.
    """
    if max_drop == 0 or (best is not None and max_drop >= best):
        return 1
    if best is None:
        return _rows_of_sign_test(confidence)
    return math.ceil(math.log(1 - confidence) / math.log(1 - max_drop / best) - 1e-9)


def _rows_of_sign_test(confidence: float) -> int:
    """With how many rows, all in one direction, a one-sided sign test can reject: 1 / 2^n <= 1 - confidence."""
    return math.ceil(-math.log2(1 - confidence) - 1e-9)


def _checked(model: ModelScores, measure: RowMetric, columns: Columns) -> float:
    """The metric's value, which has to be the one in the report: else its answers were read by other settings."""
    metric = measure.name_in_settings
    value = measure.summary(columns)[metric.facts.headline]
    recorded = model.values[metric.facts.headline]
    if not math.isfinite(value) and not math.isfinite(recorded):
        return value  # a report cannot say which of the values that are no numbers it was
    if not math.isclose(value, recorded, rel_tol=1e-6, abs_tol=1e-9):
        raise DataError(
            f"{metric}: the report says {recorded:.6g} of {model.label}, its answers give {value:.6g}: they were "
            "measured with other settings or another version; evaluate again"
        )
    return value


def _words(found: GateDecision, reason: str) -> str:
    title = found.metric.facts.title
    asked = f"is better than {found.other}"
    if found.max_drop:
        asked = f"is at most {found.max_drop:g} worse than {found.other}"
    numbers = (
        f"{found.value:.4g} against {found.other_value:.4g} on {number_of(found.rows, 'row')}; with "
        f"{found.confidence:.0%} "
        f"confidence the gain is at least {signed(found.least_gain)}"
    )
    if found.passed:
        return f"passed: {title}: {found.model} {asked} ({numbers})."
    return f"failed: {title}: not shown that {found.model} {asked} ({numbers}, {reason})."
