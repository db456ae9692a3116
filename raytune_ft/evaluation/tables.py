"""The tables of a report, as texts that a page and Markdown show alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.evaluation.compare import interval_text, signed
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.results import Comparison, ComparisonResult, EvaluationResult, Slice, leading_metric

MOST_VERDICTS = 6
"""Sentences that a reader takes in at the head of a report."""


@dataclass(frozen=True)
class TextTable:
    """Heads and rows; the first column holds names, the others numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def title(result: EvaluationResult) -> str:
    """What the report is of."""
    labels = [model.label for model in result.models]
    if isinstance(result, ComparisonResult):
        return f"Comparison of {', '.join(labels[:-1])} and {labels[-1]}"
    return "The tuned model against its base" if len(labels) == 2 else f"Evaluation of {Path(result.model.path).name}"


def value_table(result: EvaluationResult) -> list[dict[str, Any]]:
    """A line a value: its title, whether it is a metric's headline, and value, interval and best mark per model."""
    headlines = {metric.facts.headline: metric for metric in result.metrics}
    lines = []
    for name in result.models[0].values:
        metric = headlines.get(name)
        numbers = [model.values[name] for model in result.models]
        known = [number for number in numbers if math.isfinite(number)]
        best = None
        if metric is not None and known and len(set(numbers)) > 1:
            best = min(known) if metric.facts.lower_is_better else max(known)
        cells = []
        for model, number in zip(result.models, numbers, strict=True):
            low, high = model.intervals[metric] if metric else (math.nan, math.nan)
            span = "" if math.isnan(low) or math.isnan(high) else f"[{number_text(low)}, {number_text(high)}]"
            cells.append({"value": number_text(number), "interval": span, "best": number == best})
        shown = name.replace("_", " ").replace("field accuracy.", "field accuracy: ")
        if metric is not None:
            shown = metric.facts.title + (" (lower is better)" if metric.facts.lower_is_better else "")
            tokens = result.settings.get("bleu_tokenizer", "13a")
            shown += f" ({tokens} tokens)" if metric is EvaluationMetric.BLEU and tokens != "13a" else ""
        lines.append({"title": shown, "headline": metric is not None, "cells": cells})
    return lines


def comparison_table(result: EvaluationResult) -> TextTable:
    """A line a comparison: difference, interval, p-values, and rows won, tied and lost."""
    heads = ["Metric", "Difference", "95% interval", "p", "p corrected", "Won", "Tied", "Lost", "Verdict"]
    several = len(result.models) > 2
    rows = []
    for found in result.comparisons:
        name = found.metric.facts.title + (f": {found.model} against {found.other}" if several else "")
        p_values = [probability(found.p_value), probability(found.p_adjusted)]
        counts = [str(count) for count in (found.wins, found.ties, found.losses)]
        rows.append([name, signed(found.difference), interval_text(found), *p_values, *counts, found.verdict])
    note = "Differences are of the same rows (paired): bootstrap intervals, permutation tests. " + correction(result)
    return TextTable("Differences", heads, rows, note.strip())


def verdicts(result: EvaluationResult) -> tuple[Comparison, ...]:
    """The comparisons whose words open the report: all, or, where they are many, those of the leading metric."""
    if len(result.comparisons) <= MOST_VERDICTS:
        return result.comparisons
    metric = leading_metric(result)
    return tuple(found for found in result.comparisons if found.metric == metric)


def slice_table(result: EvaluationResult) -> TextTable:
    """A line a slice: the leading metric of each model, and how the last one compares with the first."""
    metric = leading_metric(result)
    labels = [model.label for model in result.models]
    heads = ["Rows", "Number", *labels]
    if len(labels) > 1:
        heads += [f"{labels[-1]} against {labels[0]}", "p corrected", "Verdict"]
    rows = []
    for part in result.slices:
        cells = [number_text(part.values[label][metric]) for label in labels]
        rows.append([f"{part.by}: {part.name}", str(part.rows), *cells, *_slice_verdict(part, metric, labels)])
    tests = max((found.tests for part in result.slices for found in part.comparisons), default=0)
    note = f"{metric.facts.title} on parts of the rows. "
    if tests > 1:
        note += f"The p-values are corrected (Holm) for the {tests} slices."
    return TextTable("Slices", heads, rows, note.strip())


def _slice_verdict(part: Slice, metric: str, labels: Sequence[str]) -> list[str]:
    if len(labels) < 2:
        return []
    found = next(found for found in part.comparisons if (found.metric, found.model) == (metric, labels[-1]))
    return [f"{signed(found.difference)} [{interval_text(found)}]", probability(found.p_adjusted), found.verdict]


def correction(result: EvaluationResult) -> str:
    """What the p-values are corrected for."""
    count = len(result.comparisons)
    return f"P-values are corrected (Holm) for all {count} comparisons; intervals are not." if count > 1 else ""


def probability(p: float) -> str:
    """A p-value for a table."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def span_text(ends: Sequence[float]) -> str:
    """Both ends of an interval; ``none`` where there is none."""
    return "none" if any(map(math.isnan, ends)) else " to ".join(map(number_text, ends))


def number_text(value: float) -> str:
    """A number for a table: three decimals below 10, else four digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 1e4 else f"{value:.3g}"
