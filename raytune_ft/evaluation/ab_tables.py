"""The tables of an A/B test's page."""

from __future__ import annotations

import math
from collections.abc import Mapping

from raytune_ft.evaluation.ab_result import QUANTILES, ABResult, Span
from raytune_ft.evaluation.config_ab import ABAnalysisConfig
from raytune_ft.evaluation.tables import TextTable, probability


def variant_table(result: ABResult) -> TextTable:
    """A line a variant: requests, subjects, and shares with their intervals."""
    heads = ["Variant", "Share", "Subjects", "Requests", "Errors", "Rated answers", "Good ratings", "Ratings", "Tokens"]
    rows = [
        [
            one.name,
            f"{one.share:.0%}",
            str(one.subjects),
            str(one.requests),
            *(_span(one.values[name]) for name in ("errors", "rated", "good")),
            str(one.ratings),
            "-" if math.isnan(one.tokens) else f"{one.tokens:.1f}",
        ]
        for one in result.variants
    ]
    note = (
        "Shares are means over subjects, each of whom counts once; in brackets 95% bootstrap intervals of this look. "
        f"That subjects are split as set: chi-square p {probability(result.mismatch_p)}."
    )
    return TextTable("Variants", heads, rows, note)


def time_table(result: ABResult) -> TextTable:
    """A line a variant: quantiles of the times with their intervals."""
    names = [f"p{100 * quantile:g}" for quantile in QUANTILES]
    heads = ["Variant", *(f"{what}, {name}" for what in ("First token", "Whole answer") for name in names)]
    rows = [
        [one.name, *(_seconds(times, name) for times in (one.first_token_s, one.latency_s) for name in names)]
        for one in result.variants
    ]
    return TextTable("Times", heads, rows, "Seconds over requests; in brackets 95% intervals that count subjects.")


def contrast_table(result: ABResult, config: ABAnalysisConfig) -> TextTable:
    """A line a variant and measure: difference, interval, p-values and verdict."""
    heads = ["Measure", "Control", "Variant", "Difference", f"{config.confidence:.0%} interval", "p", "p corrected"]
    several = len(result.variants) > 2
    rows = []
    for found in result.contrasts:
        measure = found.measure
        name = measure.title + (f": {found.variant}" if several else "")
        span = f"{measure.difference_text(found.low)} to {measure.difference_text(found.high)}"
        rows.append(
            [
                name,
                measure.value_text(found.control_sample.mean),
                measure.value_text(found.sample.mean),
                measure.difference_text(found.difference),
                span,
                probability(found.p_value),
                probability(found.p_adjusted),
                found.verdict if found.enough else "cannot tell",
            ]
        )
    note = (
        "Intervals and p-values are right at every look at the running test together (mixture sequential probability "
        f"ratio test), and count subjects. P-values are corrected (Holm) for all {len(result.contrasts)}, intervals "
        "are not. Of guardrails p is that of a rise beyond what is allowed. Times are geometric means."
    )
    return TextTable(f"Against {result.control}", [*heads, "Verdict"], rows, note)


def _span(span: Span | None) -> str:
    return "-" if span is None else f"{span[0]:.3f} [{span[1]:.3f}, {span[2]:.3f}]"


def _seconds(times: Mapping[str, Span], name: str) -> str:
    return _span(times.get(name))
