"""Plots of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from raytune_ft.core.figures import COLOURS, Paint, Plot
from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import Comparison, EvaluationResult, Slice, leading_metric

CAPTIONS = {
    "metrics": "Value and 95% interval of each metric, as a share of the best possible.",
    "perplexity": "Perplexity and its 95% interval.",
    "differences": "Difference on the same rows, with its 95% interval, as a share of the best possible. "
    "Hollow: cannot tell.",
    "fields": "Accuracy of each field of the JSON answers.",
    "lengths": "Length of the answers: the share of rows answered with at most so many tokens.",
    "calibration": "How often the likeliest choice is right, by the confidence in it. On the dotted line, a model is "
    "as sure as it is right; marks grow with the number of rows.",
    "slices": "The leading metric on each slice of the rows, with 95% intervals.",
}

_MOST_SLICES = 16


def draw(result: EvaluationResult) -> dict[str, Plot]:
    """The plots that the result gives rise to, by name (see `CAPTIONS`); the same result gives the same bytes."""
    plots = {}
    scaled = [metric for metric in result.metrics if metric.facts.best is not None]
    if scaled:
        plots["metrics"] = _dots(result, scaled)
    if EvaluationMetric.PERPLEXITY in result.metrics:
        plots["perplexity"] = _dots(result, [EvaluationMetric.PERPLEXITY])
    gained = [found for found in result.comparisons if found.metric.facts.best is not None]
    if gained:
        plots["differences"] = _differences(result, gained)
    if EvaluationMetric.FIELD_F1 in result.metrics:
        plots["fields"] = _fields(result)
    if all(answer.answer_tokens is not None for model in result.models for answer in model.answers):
        plots["lengths"] = _lengths(result)
    if EvaluationMetric.CALIBRATION in result.metrics:
        plots["calibration"] = _calibration(result)
    if result.slices:
        plots["slices"] = _slices(result, leading_metric(result))
    return plots


def _dots(result: EvaluationResult, metrics: list[EvaluationMetric]) -> Plot:
    """Value and interval of each model, a line a metric; the scaled ones as a share of the best."""
    titles, places = [], []
    for metric in metrics:
        titles.append(metric.facts.title)
        places.append(
            [
                (model.values[metric.facts.headline], *model.intervals[metric], metric.facts.best or 1.0)
                for model in result.models
            ]
        )

    def paint(axes: Any) -> None:
        _paint_dots(axes, places)
        if metrics[0].facts.best is None:
            _open_scale(axes, places, metrics[0].facts.lower_is_better)
        else:
            _share_scale(axes)

    return _lines(result, titles, paint)


def _paint_dots(axes: Any, places: Sequence[Sequence[tuple[float, float, float, float]]]) -> None:
    """Per line and model: value, low, high, and the best possible that they are a share of; finite ones alone."""
    for place, models in enumerate(places):
        for number, (value, low, high, best) in enumerate(models):
            if not math.isfinite(value):
                continue
            height = place + _offset(number, len(models))
            colour = COLOURS[number % len(COLOURS)]
            if math.isfinite(high - low):
                axes.plot([low / best, high / best], [height, height], color=colour, linewidth=2, alpha=0.5)
            axes.plot([value / best], [height], "o", color=colour, markersize=7)
            beside = (max(high, value) if math.isfinite(high) else value) / best
            axes.annotate(f"{value:.3g}", (beside, height), (7, 0), textcoords="offset points", va="center", size=9)


def _share_scale(axes: Any) -> None:
    axes.set_xlim(-0.02, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])


def _open_scale(axes: Any, places: Sequence[Sequence[tuple[float, ...]]], lower_is_better: bool) -> None:
    """A scale without an end, for what `_paint_dots` takes; logarithmic where all is positive and far apart."""
    numbers = [value for models in places for value, *_ in models if math.isfinite(value)]
    lows = [low for models in places for _, low, *_ in models if math.isfinite(low)]
    if numbers and min([*numbers, *lows]) > 0 and max(numbers) > 20 * min(numbers):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.2)
    axes.set_xlabel("lower is better" if lower_is_better else "higher is better")


def _differences(result: EvaluationResult, found: Sequence[Comparison]) -> Plot:
    """A line a comparison: how much better the later model is, with its interval; filled where it is told."""
    places = [model.label for model in result.models]
    several = len(places) > 2
    titles = [f"{gain.metric.facts.title}{f': {gain.model} - {gain.other}' if several else ''}" for gain in found]

    def paint(axes: Any) -> None:
        axes.axvline(0, color="#8b94a3", linewidth=1)
        for place, gain in enumerate(found):
            best = gain.metric.facts.best or 1.0
            colour = COLOURS[places.index(gain.model) % len(COLOURS)]
            axes.plot([gain.low / best, gain.high / best], [place, place], color=colour, linewidth=2, alpha=0.5)
            fill = "white" if gain.verdict == "cannot tell" else colour
            axes.plot([gain.difference / best], [place], "o", color=colour, markersize=7, markerfacecolor=fill)
        axes.margins(x=0.1)
        axes.set_xlabel(f"{found[0].model} minus {found[0].other}" if not several else "difference")
        axes.set_yticks(range(len(titles)), titles)
        axes.set_ylim(len(titles) - 0.5, -0.5)

    return Plot(paint, height=0.9 + 0.34 * len(titles))


def _fields(result: EvaluationResult) -> Plot:
    """The share of rows that have each field right, a bar a model."""
    prefix = "field_accuracy."
    names = [name for name in result.models[0].values if name.startswith(prefix)]

    def paint(axes: Any) -> None:
        thickness = 0.7 / len(result.models)
        for number, model in enumerate(result.models):
            heights = [place + _offset(number, len(result.models), 0.7) for place in range(len(names))]
            values = [model.values[name] for name in names]
            axes.barh(heights, values, height=thickness * 0.9, color=COLOURS[number % len(COLOURS)])
            for height, value in zip(heights, values, strict=True):
                axes.annotate(f"{value:.2f}", (value, height), (4, 0), textcoords="offset points", va="center", size=8)
        _share_scale(axes)
        axes.set_xlabel("share of rows with the field right")

    return _lines(result, [name.removeprefix(prefix) for name in names], paint)


def _lengths(result: EvaluationResult) -> Plot:
    """Cumulative shares of rows by the tokens of their answers, a step line a model."""

    def paint(axes: Any) -> None:
        for number, model in enumerate(result.models):
            sizes = sorted(answer.answer_tokens or 0 for answer in model.answers)
            shares = [(place + 1) / len(sizes) for place in range(len(sizes))]
            axes.step([0, *sizes], [0, *shares], where="post", color=COLOURS[number % len(COLOURS)], linewidth=2)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("tokens of the answer")
        axes.set_ylabel("share of rows")
        _legend(axes, result)

    return Plot(paint, height=3.0, grid="both")


def _calibration(result: EvaluationResult) -> Plot:
    """Reliability: per bin of confidence the share of rows whose likeliest choice is right."""
    from raytune_ft.evaluation.choice_metrics import BINS
    from raytune_ft.evaluation.measurement import columns_of
    from raytune_ft.evaluation.metrics import make_metric

    metric = make_metric(EvaluationMetric.CALIBRATION, result.settings)
    bins = []
    for model in result.models:
        sums = {name: float(column.sum()) for name, column in columns_of(model, metric).items()}
        filled = [number for number in range(BINS) if sums[f"rows.{number}"]]
        bins.append([[sums[f"{kind}.{n}"] for kind in ("confidence", "right", "rows")] for n in filled])

    def paint(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color="#8b94a3", linewidth=1, linestyle=":")
        for number, found in enumerate(bins):
            colour = COLOURS[number % len(COLOURS)]
            sure, right = ([part[place] / part[2] for part in found] for place in (0, 1))
            most = max(part[2] for part in found)
            axes.plot(sure, right, color=colour, linewidth=2, alpha=0.5)
            axes.scatter(sure, right, s=[20 + 60 * part[2] / most for part in found], color=colour, zorder=3)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence in the likeliest choice")
        axes.set_ylabel("share that is right")
        _legend(axes, result)

    return Plot(paint, height=3.6, grid="both")


def _slices(result: EvaluationResult, metric: EvaluationMetric) -> Plot:
    """The metric on each slice, a line a slice."""
    shown = result.slices[:_MOST_SLICES]
    best = metric.facts.best or 1.0
    places = [
        [(part.values[m.label][metric], *part.intervals[m.label][metric], best) for m in result.models]
        for part in shown
    ]

    def paint(axes: Any) -> None:
        _paint_dots(axes, places)
        if metric.facts.best is None:
            _open_scale(axes, places, metric.facts.lower_is_better)
        else:
            _share_scale(axes)
            axes.set_xlabel(metric.facts.title)

    return _lines(result, [slice_title(part) for part in shown], paint)


def slice_title(part: Slice) -> str:
    """What rows these are, and how many."""
    return f"{part.by}: {part.name} ({part.rows})"


def _offset(number: int, models: int, room: float = 0.5) -> float:
    """Where a model's mark lies around its line: the marks of all models share `room`."""
    return (number - (models - 1) / 2) * room / models


def _lines(result: EvaluationResult, lines: list[str], paint: Paint) -> Plot:
    """A plot with a named line for each thing, and the marks of all models around it."""

    def paint_lines(axes: Any) -> None:
        paint(axes)
        axes.set_yticks(range(len(lines)), [line if len(line) <= 44 else line[:43] + "…" for line in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        _legend(axes, result)

    return Plot(paint_lines, height=0.9 + len(lines) * (0.34 + 0.16 * len(result.models)))


def _legend(axes: Any, result: EvaluationResult) -> None:
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", color=COLOURS[number % len(COLOURS)], label=model.label)
        for number, model in enumerate(result.models)
    ]
    axes.figure.legend(handles=marks, loc="outside upper left", ncols=4, frameon=False, handletextpad=0.1)
