"""Plots of an evaluation, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from raytune_ft.evaluation.config import EvaluationMetric
from raytune_ft.evaluation.results import EvaluationResult

COLOURS = ("#8d99a6", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5f4b8b")
"""One a model, in order: grey for the first, which is the base where there is one, then Okabe and Ito's."""

Paint = Callable[[Any], None]

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "raytune_ft",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#c9ced6",
    "axes.labelcolor": "#4a5361",
    "xtick.color": "#6b7482",
    "ytick.color": "#1f2630",
    "grid.color": "#e6e9ee",
}


def draw(result: EvaluationResult) -> dict[str, str]:
    """The plots that the metrics give rise to: ``metrics``, ``perplexity``, ``fields``; each an SVG document.

    Drawn without pyplot's global state; the same result gives the same bytes.
    """
    plots = {}
    scaled = [metric for metric in result.metrics if metric.facts.best is not None]
    if scaled:
        plots["metrics"] = _dots(result, scaled)
    if EvaluationMetric.PERPLEXITY in result.metrics:
        plots["perplexity"] = _dots(result, [EvaluationMetric.PERPLEXITY])
    if EvaluationMetric.FIELD_F1 in result.metrics:
        plots["fields"] = _fields(result)
    return plots


def _dots(result: EvaluationResult, metrics: list[EvaluationMetric]) -> str:
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
        for place, models in enumerate(places):
            for number, (value, low, high, best) in enumerate(models):
                height = place + _offset(number, len(models))
                colour = COLOURS[number % len(COLOURS)]
                axes.plot([low / best, high / best], [height, height], color=colour, linewidth=2, alpha=0.5)
                axes.plot([value / best], [height], "o", color=colour, markersize=7)
                beside = max(high, value) / best
                axes.annotate(f"{value:.3g}", (beside, height), (7, 0), textcoords="offset points", va="center", size=9)
        if metrics[0].facts.best is None:
            numbers = [value for models in places for value, *_ in models]
            if max(numbers) > 20 * min(numbers):
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")
            axes.margins(x=0.2)
            axes.set_xlabel("lower is better")
        else:
            axes.set_xlim(-0.02, 1.12)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1])

    return _figure(result, titles, paint)


def _fields(result: EvaluationResult) -> str:
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
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axes.set_xlabel("share of rows with the field right")

    return _figure(result, [name.removeprefix(prefix) for name in names], paint)


def _offset(number: int, models: int, room: float = 0.5) -> float:
    """Where a model's mark lies around its line: the marks of all models share `room`."""
    return (number - (models - 1) / 2) * room / models


def _figure(result: EvaluationResult, lines: list[str], paint: Paint) -> str:
    from matplotlib.lines import Line2D

    def paint_lines(axes: Any) -> None:
        paint(axes)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        marks = [
            Line2D([], [], marker="o", linestyle="", color=COLOURS[number % len(COLOURS)], label=model.label)
            for number, model in enumerate(result.models)
        ]
        axes.figure.legend(handles=marks, loc="outside upper left", ncols=4, frameon=False, handletextpad=0.1)

    return svg(paint_lines, height=0.9 + len(lines) * (0.34 + 0.16 * len(result.models)))


def svg(paint: Paint, *, height: float = 3.6, grid: str = "x") -> str:
    """A plot in the style of all our pages, 5.8 inches wide: `paint` gets its axes; the same paint, the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.8, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(axis=grid)
        axes.tick_params(length=0)
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def log_scale(axes: Any) -> None:
    """A logarithmic y axis with plain numbers; our style leaves the formulas raw that matplotlib would write."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
