"""Plots of a quality report, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raytune_ft.core.figures import COLOURS, svg
from raytune_ft.data.quality import LENGTH_STEP

_GREY, _BLUE, _RED, *_ = COLOURS
_MOST_BARS = 12
_MOST_LETTERS = 34


def draw(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plots that a report's numbers give rise to: SVG document and caption; the same report, the same bytes."""
    plots = [(_lengths(report["balance"]["lengths"]), "Rows by the length of what is asked and answered.")]
    bars = {
        "Rows by source.": report["balance"]["sources"]["values"],
        "Answers by shape.": report["consistency"]["shapes"],
        **{f"Rows by {name}.": label["values"] for name, label in report["balance"]["labels"].items()},
    }
    plots += [(_bars(values), caption) for caption, values in bars.items() if len(values) > 1]
    relevance, clusters = report.get("relevance"), report["diversity"].get("clusters")
    if relevance:
        caption = "Sampled rows by relevance: cosine of a row and the task description. Orange: off the task."
        plots.append((_relevance(relevance), caption))
    if clusters:
        plots.append((_clusters(clusters["sizes"]), "Sampled rows by cluster of their meaning, the largest first."))
    losses = (report.get("suspects") or {}).get("losses")
    if losses:
        plots.append((_losses(losses), "Rows by loss per token of the answer under suspect_model. Orange: suspect."))
    return plots


def _lengths(lengths: Mapping[str, Sequence[int]]) -> str:
    used = [place for bins in lengths.values() for place, count in enumerate(bins) if count]
    low, high = min(used, default=0), max(used, default=0) + 1

    def paint(axes: Any) -> None:
        edges = [2 ** (place * LENGTH_STEP) for place in range(low, high + 1)]
        for (name, bins), colour in zip(lengths.items(), (_GREY, _BLUE), strict=True):
            if any(bins):
                axes.stairs(bins[low:high], edges, color=colour, fill=True, alpha=0.35)
                axes.stairs(bins[low:high], edges, color=colour, linewidth=1.5, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("words")
        axes.set_ylabel("rows")
        axes.legend(frameon=False)

    return svg(paint, grid="y", height=2.9)


def _bars(values: Mapping[str, int]) -> str:
    shown = sorted(values.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in shown[_MOST_BARS:])
    shown = shown[:_MOST_BARS] + ([(f"{len(shown) - _MOST_BARS} others", rest)] if rest else [])

    def paint(axes: Any) -> None:
        places = range(len(shown))
        axes.barh(places, [count for _, count in shown], color=[_BLUE] * _MOST_BARS + [_GREY], height=0.62)
        for place, (_, count) in enumerate(shown):
            axes.annotate(f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center", size=8)
        axes.set_yticks(places, [shortened(name) for name, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.margins(x=0.14)

    return svg(paint, height=0.7 + 0.27 * len(shown))


def shortened(name: str) -> str:
    """A name that fits beside a bar: its beginning and end where it is long."""
    name = " ".join(name.split())
    return name if len(name) <= _MOST_LETTERS else f"{name[: _MOST_LETTERS - 12]}…{name[-11:]}"


def _relevance(relevance: Mapping[str, Any]) -> str:
    counts = relevance["histogram"]
    width = 2 / len(counts)
    used = [place for place, count in enumerate(counts) if count]

    def paint(axes: Any) -> None:
        for place in range(min(used), max(used) + 1):
            left = -1 + place * width
            colour = _RED if left + width / 2 < relevance["below"] else _BLUE
            axes.bar(left + width / 2, counts[place], width=width * 0.9, color=colour)
        axes.axvline(relevance["mean"], color="#1f2630", linewidth=1, linestyle=":")
        axes.annotate(
            f"mean {relevance['mean']:.2f}",
            (relevance["mean"], 1),
            (4, -9),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            size=9,
        )
        axes.set_xlabel("cosine")
        axes.set_ylabel("rows")

    return svg(paint, grid="y", height=2.9)


def _clusters(sizes: Sequence[int]) -> str:
    def paint(axes: Any) -> None:
        axes.bar(range(1, len(sizes) + 1), sizes, color=_BLUE, width=0.75)
        axes.axhline(sum(sizes) / len(sizes), color="#1f2630", linewidth=1, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("cluster (dotted: all of one size)")
        axes.set_ylabel("rows")

    return svg(paint, grid="y", height=2.9)


def _losses(losses: Mapping[str, Any]) -> str:
    def paint(axes: Any) -> None:
        for place, count in enumerate(losses["counts"]):
            middle = (place + 0.5) * losses["width"]
            axes.bar(middle, count, width=losses["width"] * 0.9, color=_RED if middle > losses["limit"] else _BLUE)
        axes.set_xlabel("nats per token")
        axes.set_ylabel("rows")

    return svg(paint, grid="y", height=2.9)
